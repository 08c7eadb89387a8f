"""Scores and curves of URPO runs.

    python eval.py curves runs/A runs/B [--out curves.png]     draw metrics.jsonl of runs over each other

`curves` draws with matplotlib where it is installed (it is not a requirement) and prints a table in any case.
"""

import argparse
import json
from pathlib import Path

from urpo import BadInput

# what a reader looks at first: (title, metric names that are drawn into one panel)
PANELS = [
    ("reward", ["reward/verifiable", "reward/preference", "reward/open"]),
    ("held out, sampled", ["eval/verifiable_accuracy", "eval/referee_accuracy", "eval/true_quality"]),
    ("held out, greedy", ["eval/verifiable_accuracy_greedy", "eval/referee_accuracy_greedy", "eval/true_quality_greedy"]),
    ("flat groups", ["flat/verifiable", "flat/preference", "flat/open"]),
    ("judgements that parse", ["parse_rate/preference", "parse_rate/open"]),
    ("length, tokens", ["length/verifiable", "length/preference", "length/open"]),
    ("entropy, nats", ["entropy"]),
    ("KL, nats", ["kl"]),
]


def read_run(folder: str) -> list[dict]:
    """The lines of a run's metrics.jsonl; BadInput if it is not a run."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise BadInput(f"{folder}: not a run (it has no metrics.jsonl)")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not lines:
        raise BadInput(f"{path}: has no lines yet")
    return lines


def smooth(values: list[float], window: int = 10) -> list[float]:
    """Mean over the last `window` values: single steps are noise."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def curves(folders: list[str], out: str) -> None:
    """One panel for each group of metrics, one line style for each run; and the held-out scores as a table."""
    runs = {Path(folder).name: read_run(folder) for folder in folders}
    for name, lines in runs.items():
        held_out = [line for line in lines if any(key.startswith("eval/") for key in line)]
        for key in held_out[-1] if held_out else []:
            if key != "step":
                points = "  ".join(f"{line['step']}: {line[key]:.3f}" for line in held_out if key in line)
                print(f"{name}  {key.removeprefix('eval/'):<28} {points}")
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")  # to a file, also where there is no screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(18, 8))
    for axis, (title, keys) in zip(axes.flat, PANELS):
        for style, (name, lines) in zip(["-", "--", ":", "-."] * len(runs), runs.items()):
            for colour, key in enumerate(keys):
                points = [(line["step"], line[key]) for line in lines if key in line]
                if points:
                    steps, values = zip(*points)
                    values = values if key.startswith("eval/") else smooth(values)
                    label = f"{key.split('/')[-1]} ({name})" if len(runs) > 1 else key.split("/")[-1]
                    axis.plot(steps, values, style, color=f"C{colour}", label=label)
        axis.set_title(title)
        axis.set_xlabel("step")
        if axis.get_lines():
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("curves", help="draw metrics of runs", allow_abbrev=False)
    command.add_argument("runs", nargs="+", help="run folders")
    command.add_argument("--out", default="curves.png", help="picture to write (default curves.png)")
    arguments = parser.parse_args()
    curves(arguments.runs, arguments.out)


if __name__ == "__main__":
    main()
