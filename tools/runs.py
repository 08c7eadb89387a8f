"""What a run looks like: `python eval.py curves RUNS` and `python eval.py samples RUN` end here.

A table and a picture of metrics.jsonl, and a page of samples.jsonl; both files are written by
urpo.py (README, What a run writes). Nothing here knows how a model is evaluated."""

import html
import importlib.util
import json
import math
import os
import re
from argparse import Namespace
from pathlib import Path
from statistics import fmean, stdev

import torch

import urpo
from data_prep import LABELS, BadInput, in_one_line

WIDTH = 100  # columns of what is printed: a terminal beside an editor


def cut(name: str, most=30) -> str:
    """A long name without its middle, so that a table or a legend has room for it."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}..{name[-most // 2 + 1 :]}"


def print_table(header: list[str], rows: list[list]):
    """At most WIDTH wide: columns that find no room stand below, beside the first one again."""
    table = [list(map(str, row)) for row in [map(cut, header), *rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    fit = max(1, (WIDTH - len("|  |") - widths[0]) // (len(" | ") + max(widths[1:])))
    for start in range(1, len(widths), fit):
        columns = [0, *range(start, min(start + fit, len(widths)))]
        for row in table:
            print("|", " | ".join(row[i].ljust(widths[i]) for i in columns), "|")
        print()


def read_lines(path: Path, *fields: str) -> list[dict]:
    """Of a JSONL file of ours, without a last line that is cut (by a kill, or written just now)."""
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        with in_one_line(f"{path}:{number}: not JSON with {', '.join(fields)}", AttributeError):
            lines.append(json.loads(line))
            if not lines[-1].keys() >= set(fields):
                raise ValueError(f"only {', '.join(lines[-1])}")
    return lines


def read_verdict(text: str, n: int) -> list[float] | None:
    return urpo.JUDGE.parse(text, n)


# ================================================================================= Curves
HELD_OUT = {
    name: [f"eval/{name}", f"eval/{name}_greedy"]
    for name in ("referee_accuracy", "true_quality", "verifiable_accuracy")
}
PANELS = {  # metrics, in the order of STYLES; what a reader looks at first stands first
    "open: referee's score (solid), truth (dashed)": ["raw_score/open", "true_quality/open"],
    "referee's accuracy (solid), greedy (dashed)": HELD_OUT["referee_accuracy"],
    "open quality (solid), greedy (dashed)": HELD_OUT["true_quality"],
    "problems (solid), greedy (dashed)": HELD_OUT["verifiable_accuracy"],
    "open: does the reward order rightly?": ["reward_tau/open"],
    "reward: problems (solid), judging (dashed)": ["reward/verifiable", "reward/preference"],
    "tokens: problems -, judging --, open :": [f"length/{kind}" for kind in urpo.KINDS],
    "flat groups: problems -, judging --, open :": [f"flat/{kind}" for kind in urpo.KINDS],
    "parsed: open (solid), judging (dashed)": ["parse_rate/open", "parse_rate/preference"],
    "nats: entropy (solid), kl (dashed)": ["entropy", "kl"],
}
FIRST = 3  # panels that are drawn without --all_panels
STYLES = ["-", "--", ":"]
WINDOW = 10  # steps of training that a value is the mean of: single ones are noise
Series = dict[str, dict[int, float]]  # metric -> step -> its value in one run


def read_series(run: str) -> Series:
    """What is held out as it is, of training means of the last WINDOW steps."""
    series, recent = {}, {}
    for line in read_lines(Path(run) / "metrics.jsonl", "step"):
        step = line.pop("step")
        for name, value in line.items():
            if step in series.setdefault(name, {}):
                raise BadInput(f"{run}: step {step} is logged twice: two runs in one file?")
            window = 1 if name.startswith("eval/") else WINDOW
            recent[name] = [*recent.get(name, []), value][-window:]
            series[name][step] = fmean(recent[name])
    if not series:
        raise BadInput(f"{run}: no metrics yet")
    return series


def read_arms(runs: list[str]) -> dict[str, list[Series]]:
    """Arm -> its seeds: runs in one folder whose names differ only in a last -sN. Arms of several
    folders are called by as much of their paths as differs."""
    arms = {}
    if len(set(map(os.path.realpath, runs))) < len(runs):
        raise BadInput("a run is given twice: as two seeds of one arm it would show no error")
    for run in runs:
        path = Path(run).resolve()
        arm = path.with_name(re.sub(r"-s\d+$", "", path.name))
        arms.setdefault(arm, []).append(read_series(run))
    shared = os.path.commonpath([arm.parent for arm in arms])
    return {os.path.relpath(arm, shared): seeds for arm, seeds in arms.items()}


def points(seeds: list[Series], name: str) -> dict[int, tuple[float, float]]:
    """Step -> mean of a metric over seeds and its standard error: over seeds, or of one seed over
    prompts (`NAME_se`, where the run wrote it). Only steps to which all seeds have come."""
    found = {}
    for step in seeds[0].get(name, {}):
        values = [series[name][step] for series in seeds if step in series.get(name, {})]
        error = seeds[0].get(f"{name}_se", {}).get(step, math.nan)
        if len(values) > 1:
            error = stdev(values) / len(values) ** 0.5
        if len(values) == len(seeds):
            found[step] = fmean(values), error
    return found


def curve_table(arms: dict[str, list[Series]]):
    """The first and the last value of everything held out and of what is drawn of training."""
    header, names, rows = ["metric (n held out)"], {}, []
    for arm, seeds in arms.items():
        header += [f"{cut(arm, 22)}, first", f"{cut(arm, 22)}, last"]
        names |= seeds[0]
    for name in names:
        held_out = name.startswith("eval/") and not name.endswith(("_n", "_se"))
        if held_out or name in sum(PANELS.values(), []):
            counts, cells = {}, []
            for seeds in arms.values():
                counts |= {f"{n:g}": 0 for n in seeds[0].get(f"{name}_n", {}).values()}
                found = list(points(seeds, name).values()) or [(math.nan, math.nan)]
                for mean, error in (found[0], found[-1]):
                    text = f"{mean:.3f} ± {error:.3f}".removesuffix(" ± nan")
                    cells.append(text.replace("nan", ""))
            rows.append([f"{name} ({'/'.join(counts)})" if counts else name, *cells])
    print_table(header, rows)
    print(f"eval/ is held out; all else are means of {WINDOW} steps")
    for arm, seeds in arms.items():
        lasts = ", ".join(str(max(map(max, series.values()))) for series in seeds)
        over = "seeds" if len(seeds) > 1 else "prompts"
        print(f"{cut(arm, 60)}: n {len(seeds)}, ± over {over}; to step {lasts}")


def curves(options: Namespace):
    """A table and a picture of the metrics of runs: a colour for each arm, its standard error as a
    band, a style for each metric. The first three panels that have something, or all of them."""
    arms, out = read_arms(options.run), options.out or "curves.png"
    curve_table(arms)
    if not importlib.util.find_spec("matplotlib"):
        return print("no picture: pip install matplotlib")
    import matplotlib

    matplotlib.use("Agg")  # to a file, also where there is no screen
    from matplotlib import pyplot

    known = {name for seeds in arms.values() for name in seeds[0]}
    panels = [panel for panel in PANELS.items() if known.intersection(panel[1])]
    panels = panels if options.all_panels else panels[:FIRST]
    rows, columns = math.ceil(len(panels) / 5), min(5, len(panels))
    figure = pyplot.figure(figsize=(4 * columns, 4 * rows), layout="constrained")
    for place, (title, metrics) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, place, xlabel="step")
        axis.set_title(title, fontsize=10)
        for colour, seeds in enumerate(arms.values()):
            for style, metric in zip(STYLES, metrics):
                draw(axis, points(seeds, metric), style, f"C{colour}")

    labels = [f"{cut(arm, 40)} (n {len(seeds)})" for arm, seeds in arms.items()]
    keys = [pyplot.Line2D([], [], color=f"C{colour}") for colour in range(len(arms))]
    ncols = int(4 * columns / (0.6 + 0.085 * max(map(len, labels))))  # inches of a line and a label
    figure.legend(keys, labels, loc="outside upper center", ncols=max(1, ncols))
    if Path(out).suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise BadInput(f"--out {out}: not a kind of picture that matplotlib writes")
    figure.savefig(out, dpi=75)
    print(out)


def draw(axis, found: dict[int, tuple[float, float]], style: str, color: str):
    """A line and its band; single points are marked where they are few."""
    steps, (means, errors) = list(found), torch.tensor([*found.values()]).reshape(-1, 2).T
    marker = "o" if len(steps) <= 20 else ""
    axis.plot(steps, means, style, marker=marker, markersize=4, color=color)
    axis.fill_between(steps, means - errors, means + errors, alpha=0.15, color=color)


# ================================================================================= Samples
# Only the last column holds texts: it may break anywhere, the numbers before it never
STYLE = """<style> body { font: 14px/1.5 sans-serif } tr:first-child { background: #eee }
table { border-collapse: collapse; margin: 1em 0 } pre { white-space: pre; margin: 0 }
td:last-child pre { white-space: pre-wrap; overflow-wrap: anywhere }
td { border: 1px solid #ccc; padding: .3em .6em; vertical-align: top } </style>"""


def html_table(rows: list[dict]) -> str:
    """All that models and data say passes here, and is escaped: nothing in it is markup."""
    parts = ["<table>"]
    for values in [rows[0], *map(dict.values, rows)]:
        parts.append("<tr>")
        for value in values:
            text = f"{value:.2f}" if isinstance(value, float) else str(value)
            parts.append(f"<td><pre>{html.escape(text)}</pre></td>")
    return "".join([*parts, "</table>"])


def group_tables(lines: list[dict]) -> list[str]:
    """One prompt's group, a line for each completion: what was asked, what was paid for what."""
    first, rows, shown = lines[0], [], lines[0].get("responses") or []  # shown: of a judge list
    labels, truth = LABELS[: len(shown)], lines[0]["truth"]
    tables = [[{message["role"]: message["content"]}] for message in first["prompt"]]
    if shown and truth:
        of_list = zip(labels, truth, shown)
        tables.append([{"response": a, "true score": t, "": text} for a, t, text in of_list])
    elif truth is not None:
        tables.append([{"true answer": truth}])
    for i, line in enumerate(lines):
        rows.append({"completion": i, "reward": line["reward"]})
        if shown:
            scores = read_verdict(line["completion"], len(shown)) or ["does not parse"]
            rows[-1][f"scores of {labels}"] = " ".join(map(str, scores))
        if "true_quality" in line:
            rows[-1]["true quality"] = line["true_quality"]
        rows[-1][""] = line["completion"]
    rows.sort(key=lambda row: math.inf if row["reward"] is None else -row["reward"])
    tables.append(rows)
    for judged in first.get("judged") or []:  # of an open group: who was shown, what was said
        scores = judged["scores"] or ["does not parse"] * len(judged["shown"])
        given = [f"completion {i}: {score}" for i, score in zip(judged["shown"], scores)]
        tables.append([{"the referee": "\n".join(given), "its critique": judged["critique"]}])
    return list(map(html_table, tables))


def samples(options: Namespace):
    """A page (HTML, self-contained) of what a run sampled and what it paid, newest step first."""
    name, groups = html.escape(Path(options.run).resolve().name), {}
    out = options.out or f"{options.run}/samples.html"
    fields = "step", "kind", "prompt", "truth", "completion", "reward"
    for line in read_lines(Path(options.run) / "samples.jsonl", *fields):
        groups.setdefault(line["step"], {}).setdefault(line["kind"], []).append(line)
    steps = [step for step in sorted(groups, reverse=True) if step in (options.steps or groups)]
    if not steps:
        there = f"samples of {', '.join(map(str, groups))}" if groups else "no samples yet"
        raise BadInput(f"{options.run}: --steps: there are {there}"[:300])
    parts = [f'<!doctype html><meta charset="utf-8"><title>{name}</title>{STYLE}<h1>{name}</h1>']
    for step in steps:
        details = "<details open>" if step == steps[0] else "<details>"
        parts.append(f"{details}<summary>step {step}</summary>")
        for kind, lines in groups[step].items():
            parts += [f"<h3>{html.escape(kind)}</h3>", *group_tables(lines)]
        parts.append("</details>")
    # half a surrogate, which a model of bytes may write, has no UTF-8
    Path(out).write_text("\n".join(parts), encoding="utf-8", errors="replace")
    print(out)
