"""The paper's three scores, counted as the official evaluators count them; and curves of runs.

    python eval.py alpaca      --model M [--reference outputs.json] [--judge J]     AlpacaEval 2: win rates
    python eval.py alpaca      --annotations annotations.json          the same of what somebody has judged
    python eval.py rewardbench --model M [--data FILE_OR_NAME ...] [--v2]                   M is the judge
    python eval.py reasoning   --model M [--data FILE_OR_NAME ...] [--samples n]   problems with an answer
    python eval.py all         --model A [B C ...] --judge J                  all three, one row for a model
    python eval.py all                     without a GPU or a network: the tiny run, on the tiny world
    python eval.py curves      runs/A runs/B [--out curves.png]                        metrics.jsonl, drawn

M and J are model folders or Hub names. Data are FILE_OR_NAME[@CONFIG][#SPLIT] of any schema in data_prep.py;
what is left out comes from the Hub. `torchrun --nproc_per_node N eval.py ...` splits the work over N ranks.
A command writes OUT_DIR/NAME/COMMAND/:

    results.json        every score with its standard error and n; settings, seed, versions, git hash
    samples.jsonl       a line for every answer or judged list
    answers-RANK.jsonl  what models said, as it comes: the same command, given again, asks for the rest only
    alpaca              model_outputs.json and annotations.json, as the official alpaca_eval reads them
    rewardbench         eval-set/NAME.json and eval-set-scores/NAME.json, the official formats: scale 0 to 1

All else is in percent. A standard error is the deviation (ddof 1) over instructions, judged lists or
problems, over the root of their number. --limit N, the first N of each set, is a trial, and marked so.

How this differs from the official tools: a local judge, whose numbers are not GPT-4's; difficulty goes by
instruction, not by row (the official number is shown where it differs); judge lists are shown in two orders,
in the prompt that the referee was trained on; what is missing is called missing, not 0.
"""

import argparse
import csv
import hashlib
import importlib.util
import itertools
import json
import math
import platform
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub import hf_hub_download
from torch.nn.functional import softplus
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

import data_prep
import urpo
from urpo import BadInput, Config, Ranks


def mean(values) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def standard_error(values) -> float:
    """Standard deviation (ddof 1) / sqrt(n); NaN for fewer than two values: they show no spread."""
    n, middle = len(values), mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan


class Score(NamedTuple):
    """A number in percent and its standard error, from n instructions, lists or problems. NaN: missing."""
    value: float = math.nan
    error: float = math.nan
    n: int = 0
    note: str = ""

    def __str__(self):
        error = "" if math.isnan(self.error) else f" ± {self.error:.2f}"
        return "missing" if math.isnan(self.value) else f"{self.value:.2f}{error}"


def percent(values, note="") -> Score:
    """Mean of those values in [0, 1] that are there: None is not."""
    values = [100 * value for value in values if value is not None]
    return Score(mean(values), standard_error(values), len(values), note)


def weighted(scores, weights, note="") -> Score:
    """Weighted mean of independent scores."""
    total, pairs = sum(weights), list(zip(scores, weights))
    if not total:
        return Score(note=note)
    value, error = math.fsum(w * s.value for s, w in pairs), math.hypot(*(w * s.error for s, w in pairs))
    return Score(value / total, error / total, sum(s.n for s, _ in pairs), note)


# ================================================================================ Asking a model
CHUNK = 64  # answers between two writes: what a kill costs at most
NO_EFFECT = {"out_dir", "name", "device", "rollout_tokens"}  # settings that do not define what is measured


class Evaluation:
    """One command on one model: its folder, what was answered so far, its results. Alike on every rank."""

    def __init__(self, command: str, options, ranks: Ranks, files: list[str]):
        self.options, self.ranks, self.loaded, self.start = options, ranks, (None, None), time.time()
        self.name = options.name or model_name(options.model or options.annotations)
        self.folder = Path(options.out_dir) / f"{self.name}{trial_suffix(options.limit)}" / command
        used = [options.model, getattr(options, "judge", ""), *files]
        self.settings = {key: value for key, value in vars(options).items() if key not in NO_EFFECT}
        self.settings["contents"] = {name: content_hash(name) for name in used if name}
        if problem := ranks.gather(self.open_folder() if ranks.main else None)[0]:
            raise BadInput(problem)

    def open_folder(self) -> str | None:
        """Results are never mixed, nor overwritten by those of other settings, weights or files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, settings = self.folder / "settings.json", self.settings
        was = json.loads(path.read_text()) if any(self.folder.glob("*.jsonl")) else settings
        if differ := sorted(key for key in {*was, *settings} if was.get(key) != settings.get(key)):
            return f"{self.folder} holds results of other {', '.join(differ)}: give another --name"
        self.write("settings.json", settings)
        for answers in self.folder.glob("answers-*.jsonl"):  # a line that a kill cut short is asked again
            kept = answers.read_bytes()
            answers.write_bytes(kept[: kept.rfind(b"\n") + 1])

    def answered(self) -> dict[str, dict]:
        files = self.folder.glob("answers-*.jsonl")
        records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        self.ranks.gather(None)  # nobody writes while others read
        return {record["key"]: record for record in records}

    def ask(self, what: str, model: str, prompts: list[list[int] | None], answer) -> list[dict | None]:
        """The record of every prompt, in order and on all ranks: by answer(actor, some prompts, n) -> n for
        each, or noted by an earlier start. A prompt that comes n times gets n. None, what does not fit the
        model's context, is not asked and gives None."""
        known, seen, keys, missing = self.answered(), Counter(), [], {}
        for ids in prompts:
            digest = hashlib.sha256(f"{what} {ids}".encode()).hexdigest()[:20]  # by content: data may change
            keys.append(f"{digest}/{seen[digest]}")
            seen[digest] += 1
            if ids is not None and keys[-1] not in known:
                missing.setdefault(digest, (ids, []))[1].append(keys[-1])
        if missing:
            actor = self.load(model)
            ordered = sorted(missing.values(), key=lambda item: (len(item[1]), len(item[0])))
            with self.ranks.unsharded(actor.model):
                self.ask_part(what, actor, ordered[self.ranks.rank :: self.ranks.world], answer)
            self.ranks.gather(None)  # all have written
            known = self.answered()
        return [known.get(key) for key in keys]

    def ask_part(self, what, actor, items: list[tuple[list[int], list[str]]], answer):
        """items: (prompt, keys of the samples it still needs); as many for each prompt of a chunk."""
        count = sum(len(keys) for _, keys in items)
        bar = tqdm(total=count, desc=f"{self.name} {what}", disable=not self.ranks.main)
        with bar, open(self.folder / f"answers-{self.ranks.rank}.jsonl", "a") as file:
            for n, group in itertools.groupby(items, key=lambda item: len(item[1])):
                group, size = list(group), max(1, CHUNK // n)
                for chunk in (group[i : i + size] for i in range(0, len(group), size)):
                    # the same command on as many ranks gives the same samples
                    torch.manual_seed(random.Random(f"{self.options.seed} {chunk[0][1]}").getrandbits(63))
                    answers = answer(actor, [ids for ids, _ in chunk], n)
                    lines = [json.dumps({"key": key, **record}) + "\n" for (_, keys), records
                             in zip(chunk, answers) for key, record in zip(keys, records)]
                    file.write("".join(lines))
                    file.flush()
                    bar.update(len(lines))

    def load(self, model: str) -> urpo.Actor:
        if self.loaded[0] != model:
            self.loaded = (None, None)  # frees the memory of the one before
            config = Config(device=self.options.device, stop_tokens=self.options.stop_tokens)
            self.loaded = (model, urpo.load_actor(model, config, self.ranks, trainable=False))
        return self.loaded[1]

    def generate(self, what, prompts, limit: int, temperature: float = 0.0) -> list[dict | None]:
        """Completions of the model: {"text", "tokens", "truncated"}."""
        def answer(actor, some, n):
            groups = urpo.sample(actor.model, some, n, [limit] * len(some), temperature, actor.stop_ids,
                                 self.options.rollout_tokens)
            return [[{"text": actor.text(ids), "tokens": len(ids), "truncated": cut} for ids, cut, _ in group]
                    for group in groups]
        return self.ask(what, self.options.model, prompts, answer)

    def write(self, name: str, value):
        """JSON, or JSON lines if the name ends so; by rank 0, whole or not at all."""
        if self.ranks.main:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".tmp")
            lines = map(to_json, value) if path.suffix == ".jsonl" else [to_json(value, indent=2)]
            temporary.write_text("".join(lines))
            temporary.replace(path)

    def finish(self, title: str, scores: dict[str, Score], notes: list[str], **more) -> dict[str, Score]:
        """Print the scores and write results.json."""
        self.write("results.json", {
            "title": title, "name": self.name, "trial": self.options.limit > 0, "scale": "percent",
            "scores": {name: score._asdict() for name, score in scores.items()}, "notes": notes, **more,
            "seconds": time.time() - self.start, "settings": self.settings, "versions": versions()})
        if self.ranks.main:
            print(f"\n{title}. {trial_mark(self.options.limit)}Percent.")
            print_table(["score", "value ± standard error", "n", ""],
                        [[name, score, score.n, score.note] for name, score in scores.items()])
            print("\n".join([*notes, f"written to {self.folder}"]), flush=True)
        return scores


def trial_suffix(limit: int) -> str:
    return f"-limit{limit}" if limit else ""


def trial_mark(limit: int) -> str:
    return f"TRIAL on the first {limit} of each set. " if limit else ""


def model_name(path: str) -> str:
    """What a model is called in tables: runs/NAME/final is NAME."""
    parts = Path(path).parts
    return parts[-2] if parts[-1] == "final" and len(parts) > 1 else parts[-1]


def set_name(source: str) -> str:
    """aime24/test.jsonl is aime24, openai/gsm8k@main#test is gsm8k."""
    path = Path(data_prep.parse_source(source).name)
    name = re.sub(r"\.(jsonl?|parquet)$", "", path.name)
    return path.parent.name if name in ("test", "train") and path.parent.name else name


def content_hash(name: str) -> str:
    """Of a file, or a folder's weights: sizes and last MiB. A Hub name stands for itself."""
    path, digest = Path(name), hashlib.sha256()
    if not path.exists():
        return name
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            opened.seek(max(0, file.stat().st_size - 2**20))
            digest.update(f"{file.stat().st_size} ".encode() + opened.read())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    options = dict(cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    git = shutil.which("git") and subprocess.run(command, **options).stdout.strip()
    return {"git": git or "unknown", "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "datasets": data_prep.datasets.__version__}


def to_json(value, indent=None) -> str:
    """JSON that every reader takes: NaN, which is none, becomes null."""
    def clean(value):
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps(clean(value), indent=indent) + "\n"


def print_table(header: list, rows: list[list]):
    """In Markdown."""
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def fitting(ids: list[int], context: int, limit: int) -> list[int] | None:
    """The prompt, or None if it and `limit` more tokens are longer than the model's context."""
    return ids if len(ids) + limit <= context else None


def read_rows(source: str, limit: int = 0) -> list:
    """Raw rows of a file or Hub set; BadInput if it cannot be read or is empty."""
    rows = list(data_prep.load(data_prep.parse_source(source), random.Random(0)))
    if not rows:
        raise BadInput(f"{source}: has no rows")
    return rows[: limit or None]


def read_tasks(source: str, kind: str, limit: int, convert) -> list[tuple[int, dict, dict]]:
    """(row number, raw row, task) of one kind; convert(row) -> its tasks. Rows of our own format and another
    kind are left out; BadInput names any other row that is of no use: benchmarks have none to spare."""
    found, rows = [], enumerate(read_rows(source), 1)
    rows = [(i, row) for i, row in rows if not isinstance(row, dict) or row.get("kind", kind) == kind]
    for number, row in rows[: limit or None]:
        try:
            tasks = convert(row)
        except data_prep.Drop as reason:
            raise BadInput(f"{source}: row {number}: {reason}")
        if wrong := [task["kind"] for task in tasks if task["kind"] != kind]:
            raise BadInput(f"{source}: row {number}: a task of kind {wrong[0]}, expected {kind}")
        found += [(number, row, task) for task in tasks]
    if not found:
        raise BadInput(f"{source}: has no rows of kind {kind}")
    return found


# ================================================================================ AlpacaEval 2
def is_switched(instruction: str, seed: int = 0) -> bool:
    """Whether the judge is shown the model first (processors.py, RandomSwitchTwoColumnsProcessor)."""
    return random.Random(f"is_switched_outputs{instruction}{seed}").choices([False, True])[0]


def preference_from_logprobs(logprobs: dict, switched: bool = False) -> float:
    """1 (the reference wins) to 2 (the model wins), from the top log-probabilities of the judge's one token.

    `m` names the output shown first, `M` the second: 2 - p_m / (p_m + p_M) (completion_parsers.py,
    logprob_parser). A token outside of the top has probability 0; with neither there is no verdict: NaN.

    >>> preference_from_logprobs({"m": math.log(0.2), "M": math.log(0.6), "x": -3.0}, switched=True)
    1.25
    """
    found = [logprobs.get(token, -math.inf) for token in ("m", "M")]
    if max(found) == -math.inf:
        return math.nan
    first, second = (math.exp(logprob - max(found)) for logprob in found)   # exp(-9999) alone would be 0/0
    preference = 2 - first / (first + second)
    return 3 - preference if switched else preference


def alpaca_win_rate(preferences) -> dict:
    """Win rates in percent from preferences in [1, 2] (alpaca_eval metrics/helpers.py, metrics/winrate.py).

    0 is an old spelling of a draw. What is None, NaN or outside of [1, 2] (the cache writes -1) was never
    judged: it is left out, not lost. Only an exact 1.5 is a draw, anything else goes to the nearer side.

    >>> alpaca_win_rate([1, 2, None, 1.75])["win_rate"]
    58.333333333333336
    """
    known = [1.5 if p == 0 else p for p in preferences if p is not None]
    wins = [p - 1 for p in known if 1 <= p <= 2]
    draws, n_wins = wins.count(0.5), sum(w > 0.5 for w in wins)
    discrete = [0.5 if w == 0.5 else float(w > 0.5) for w in wins]
    return {"win_rate": 100 * mean(wins), "standard_error": 100 * standard_error(wins), "n_wins": n_wins,
            "n_wins_base": len(wins) - n_wins - draws, "n_draws": draws, "n_total": len(wins),
            "discrete_win_rate": 100 * mean(discrete),
            "discrete_standard_error": 100 * standard_error(discrete)}


def fit_l1_logistic(X, y, s, C):
    """The w that minimises |w|_1 + C * sum_i s_i CE(y_i, sigmoid(X_i w)), y in [0, 1]: proximal Newton steps.

    Each goes towards the minimum of the quadratic model plus |w|_1. For known signs that is a linear system,
    and of three weights all 27 combinations of -, 0, + can be tried. The problem is convex, with one optimum;
    liblinear, which alpaca_eval uses, stops shortly before it.
    """
    def objective(w):
        return w.abs().sum() + C * (s * (softplus(X @ w) - y * (X @ w))).sum()

    w = X.new_zeros(X.shape[1])
    signs = torch.cartesian_prod(*[X.new_tensor([-1, 0, 1])] * len(w)).reshape(-1, len(w))         # [27, 3]
    on = signs.abs()
    for _ in range(100):
        p = torch.sigmoid(X @ w)
        g, H = C * X.T @ (s * (p - y)), C * X.T @ (X * (s * p * (1 - p))[:, None])
        H = H + 1e-12 * torch.eye(len(w))                                               # for an empty column
        systems = H * on[:, :, None] * on[:, None, :] + torch.diag_embed(1 - on)    # off: stays 0
        ends = torch.linalg.solve(systems, on * (H @ w - g) - signs)
        steps = ends - w
        model = steps @ g + ((steps @ H) * steps).sum(1) / 2 + ends.abs().sum(1)
        step, small = steps[model.argmin()], 1e-11 * (1 + w.abs().max())
        while step.abs().max() > small and objective(w + step) >= objective(w):
            step = step / 4
        w = w + step
        if step.abs().max() <= small:                                           # float64 sees nothing lower
            return w
    raise RuntimeError(f"the fit did not converge at C = {C}")


GRID = [10 ** (-4 + 8 * i / 9) for i in range(10)]


def choose_C(X, y, s) -> float:
    """C by cross-validation over GRID, as LogisticRegressionCV and GroupKFold(5) choose it for alpaca_eval.

    Every row is a group, gamed rows first, and scikit-learn 1.9 deals out groups of one size in turn. Older
    versions deal them in an order that depends on the machine, which moves scores by up to 0.15.
    """
    if len(y) < 5:
        raise ValueError(f"five-fold cross-validation of {len(y)} rows: give C")
    fold, losses = torch.arange(len(y)) % 5, []
    for C in GRID:
        losses.append(0.0)
        for test in (fold == k for k in range(5)):
            z = X[test] @ fit_l1_logistic(X[~test], y[~test], s[~test], C)
            losses[-1] += (s[test] * (softplus(z) - y[test] * z)).mean().item()
    return GRID[losses.index(min(losses))]


def length_controlled(rows, difficulty=None, gamed=None, C=None) -> dict:
    """Length-controlled win rate in percent (alpaca_eval metrics/glm_winrate.py, "length_controlled_v1").

    The preference is fitted by sigmoid(w1 tanh(length difference) + w2 difficulty + w3); the score is the
    mean prediction without w1. (The reference against itself is 50 by definition: do not fit it.)

    rows        {"preference", "len_1", "len_2"} of reference and model, characters, in annotation order.
                Rows without a valid preference are predicted, but not fitted.
    difficulty  instruction_difficulty.csv BY ROW POSITION, as in the official code: a gap shifts the rest.
    gamed       rows of df_gamed.csv, the reference's own verbose and concise variants: (preference in [0, 1],
                standardised length difference, difficulty). At weight 0.1 and without w3 they pin w1 and w2.
                None is "length_controlled_noreg"; no difficulty either, "length_controlled_minimal".
    C           strength of the data against the l1 term; None: choose_C.
    """
    lengths = torch.tensor([row["len_1"] - row["len_2"] for row in rows], dtype=torch.float64)
    if len(rows) < 2 or lengths.std() == 0:
        raise ValueError("length control needs two rows or more, with different length differences")
    if difficulty is not None and len(difficulty) < len(rows):
        raise ValueError(f"{len(rows)} rows, but difficulties for {len(difficulty)}")
    if gamed is not None and difficulty is None:
        raise ValueError("the gamed rows go with the difficulty table")
    ones = torch.ones_like(lengths)
    X = torch.stack([torch.tanh(lengths / lengths.std()), ones], 1)
    if difficulty is not None:
        X = torch.stack([X[:, 0], lengths.new_tensor(difficulty[:len(rows)]), ones], 1)
    without_length = X * X.new_tensor([0] + [1] * (X.shape[1] - 1))
    preferences = [1.5 if row["preference"] == 0 else row["preference"] for row in rows]
    judged = [i for i, p in enumerate(preferences) if p is not None and 1 <= p <= 2]
    if not judged:
        raise ValueError("no pair has a valid verdict")
    X, y, s = X[judged], X.new_tensor([preferences[i] - 1 for i in judged]), ones[judged]
    if gamed is not None:
        labels, length, level = X.new_tensor([list(row) for row in gamed]).T
        X = torch.cat([torch.stack([torch.tanh(length), level, torch.zeros_like(level)], 1), X])
        y, s = torch.cat([labels, y]), torch.cat([torch.full_like(labels, 0.1), s])
    C = choose_C(X, y, s) if C is None else C
    w = fit_l1_logistic(X, y, s, C)
    predictions = (100 * torch.sigmoid(without_length @ w)).tolist()
    return {"length_controlled_winrate": mean(predictions), "C": C, "weights": w.tolist(),
            "lc_standard_error": standard_error(predictions)}   # without the fit's doubt


HUB = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json"  # of gpt4_1106_preview
INSTRUCTIONS = 805  # of AlpacaEval, the set that the Hub's tables belong to
TOP = 5  # the likeliest tokens of the judge are looked at, as the official configuration does


def duel_prompt(instruction: str, first: str, second: str) -> list[dict]:
    """The official judge prompt (alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt, Apache 2.0)."""
    system = (
        "You are a highly efficient assistant, who evaluates and selects the best large language model "
        "(LLMs) based on the quality of their responses to a given instruction. This process will be used to "
        "create a leaderboard reflecting the most accurate and human-preferred answers.")
    parts = [
        "I require a leaderboard for various large language models. I'll provide you with prompts given to "
        "these models and their corresponding outputs. Your task is to assess these responses, and select "
        "the model that produces the best output from a human perspective.\n\n## Instruction\n\n{\n"
        '    "instruction": """', instruction, '""",\n}\n\n## Model Outputs\n\n'
        "Here are the unordered outputs from the models. Each output is associated with a specific model, "
        'identified by a unique model identifier.\n\n{\n    {\n        "model_identifier": "m",\n'
        '        "output": """', first, '"""\n    },\n    {\n        "model_identifier": "M",\n'
        '        "output": """', second, '"""\n    }\n}\n\n## Task\n\n'
        "Evaluate the models based on the quality and relevance of their outputs, and select the model that "
        "generated the best output. Answer by providing the model identifier of the best model. We will use "
        "your output as the name of the best model, so make sure your output only contains one of the "
        "following model identifiers and nothing else (no quotes, no spaces, no new lines, ...): m or M.\n\n"
        "## Best Model Identifier"]
    return [{"role": "system", "content": system}, {"role": "user", "content": "".join(parts)}]


@torch.no_grad()
def next_tokens(actor: urpo.Actor, prompts: list[list[int]], n: int) -> list[list[dict]]:
    """{"top": the likeliest next tokens, likeliest first, as [text, log-prob]} for each prompt."""
    answers = []
    for ids in prompts:
        ids = torch.tensor([ids], device=actor.model.get_input_embeddings().weight.device)
        logprobs, tokens = actor.model(ids, logits_to_keep=1).logits[0, -1].float().log_softmax(-1).topk(TOP)
        texts = [actor.tokenizer.decode([token]) for token in tokens.tolist()]
        answers.append([{"top": list(zip(texts, logprobs.tolist()))}] * n)
    return answers


def read_outputs(source: str) -> list[dict]:
    """Outputs to compare with: {"instruction", "output", "generator"}. tiny: what people answer there."""
    if source == "tiny":
        rows = [row for row in urpo.load_rows(urpo.PRESETS["tiny"]["eval_data"]) if row["kind"] == "open"]
        texts = [row["prompt"][-1]["content"] for row in rows]
        return [{"instruction": text, "output": data_prep.tiny_player(random.Random(f"people/{i}"), text),
                 "generator": "people"} for i, text in enumerate(texts)]
    return check_texts(read_rows(source), source, "instruction", "output")


def check_texts(rows: list, source: str, *columns: str) -> list[dict]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in columns):
            raise BadInput(f"{source}: row {number}: expected strings as {', '.join(columns)}")
        if type(row.get("preference")) not in (int, float, type(None)):
            raise BadInput(f"{source}: row {number}: preference: expected a number or null")
    return rows


def model_outputs(run: Evaluation, reference: list[dict]) -> list[dict]:
    """The model's answers to the same instructions, for our judge and for `alpaca_eval --model_outputs`."""
    tokenizer, context = urpo.load_tokenizer(run.options.model)
    limit = run.options.max_new_tokens
    prompts = [urpo.encode(tokenizer, urpo.chat(row["instruction"])) for row in reference]
    prompts = [fitting(ids, context, limit) for ids in prompts]
    answers = run.generate("outputs", prompts, limit, run.options.temperature)
    outputs = [{"dataset": row.get("dataset", ""), "instruction": row["instruction"],
                "output": answer["text"].strip() if answer else "", "generator": run.name}
               for row, answer in zip(reference, answers)]
    run.write("model_outputs.json", outputs)
    return outputs


def annotate(run: Evaluation, reference: list[dict], outputs: list[dict]) -> list[dict]:
    """Every pair judged in the official way: one token, m or M, in the order that is_switched draws.
    Identical outputs are a draw and not asked about. The judge "tiny" is the tiny world's own ruler."""
    judge, pairs, prompts = run.options.judge, list(zip(reference, outputs)), []
    name = "tiny_ruler" if judge == "tiny" else f"weighted_alpaca_eval_{model_name(judge)}"
    if judge != "tiny":
        tokenizer, context = urpo.load_tokenizer(judge)
        for one, two in pairs:
            shown = [one["output"], two["output"]][:: -1 if is_switched(one["instruction"]) else 1]
            ids = urpo.encode(tokenizer, duel_prompt(one["instruction"], *shown))
            prompts.append(fitting(ids, context, 1) if shown[0] != shown[1] else None)
    answers = run.ask("duels", judge, prompts, next_tokens) if prompts else [None] * len(pairs)
    annotations = []
    for (one, two), answer in zip(pairs, answers):
        top = answer["top"] if answer else []
        if one["output"] == two["output"]:
            preference = 1.5
        elif judge == "tiny":
            theirs, ours = (data_prep.tiny_quality(one["instruction"], side["output"]) for side in (one, two))
            preference = 1.5 + ((ours > theirs) - (ours < theirs)) / 2
        else:  # of two tokens that are spelled alike the likelier one counts
            preference = preference_from_logprobs(dict(reversed(top)), is_switched(one["instruction"]))
        raw = {"logprobs": {"content": [{"top_logprobs": [{"token": t, "logprob": lp} for t, lp in top]}]}}
        annotations.append({
            "instruction": one["instruction"], "dataset": one.get("dataset", ""),
            "output_1": one["output"], "generator_1": one.get("generator", "reference"),
            "output_2": two["output"], "generator_2": run.name, "annotator": name,
            "preference": preference, "raw_completion": raw if top else None})
    run.write("annotations.json", annotations)
    return annotations


def read_tables(gamed_file: str, difficulty_file: str, ours: bool):
    """-> (difficulty by position or None, gamed rows or None, where they come from or why there are none)."""
    source, difficulty, gamed = " and ".join(filter(None, [gamed_file, difficulty_file])), None, None
    if not source and not ours:
        return None, None, f"none, the Hub's belong to the {INSTRUCTIONS} instructions of AlpacaEval"
    try:
        if not source:
            gamed_file = hf_hub_download("tatsu-lab/alpaca_eval", "df_gamed.csv", repo_type="dataset")
            source = "df_gamed.csv of the Hub"
    except (OSError, ValueError) as error:  # no network, or no such file there
        return None, None, f"none, the Hub cannot be reached ({type(error).__name__}); --gamed names a file"
    try:
        if gamed_file:
            with open(gamed_file, newline="") as file:
                rows = list(csv.DictReader(file))
            columns = "preference", "std_delta_len", "instruction_difficulty"
            gamed = [tuple(float(row[column]) for column in columns) for row in rows]
            difficulty = list({row["index"]: level for row, (_, _, level) in zip(rows, gamed)}.values())
        if difficulty_file:
            with open(difficulty_file, newline="") as file:
                difficulty = [float(row["instruction_difficulty"]) for row in csv.DictReader(file)]
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{source}: not such a table: {type(error).__name__} {error}")
    return difficulty, gamed, source


def alpaca_scores(annotations: list[dict], instructions: list[str], difficulty, gamed):
    """-> (scores, notes, more). `instructions`: the whole set in its published order, that of the tables."""
    rows = [{"preference": row["preference"], "len_1": len(row["output_1"]), "len_2": len(row["output_2"])}
            for row in annotations]
    place = {instruction: i for i, instruction in enumerate(instructions)}
    places = [place.get(row["instruction"]) for row in annotations]
    applies = difficulty is not None and len(place) == len(difficulty) and None not in places
    scores, fits = {}, {}

    def control(name, note, *tables):
        form = "minimal" if not tables else "v1" if gamed else "noreg"
        note += "; the error is without the fit's own"
        try:
            fits[name] = fit = length_controlled(rows, *tables)
            scores[name] = Score(fit["length_controlled_winrate"], fit["lc_standard_error"], len(rows),
                                 f"length_controlled_{form}{note}")
        except ValueError as error:
            scores[name] = Score(n=len(rows), note=str(error))

    if annotations[0].get("generator_1", 1) == annotations[0].get("generator_2", 2):
        scores["length-controlled win rate"] = Score(50.0, 0.0, len(rows), "the reference against itself")
    else:
        tables = ([difficulty[i] for i in places], gamed) if applies else ()
        control("length-controlled win rate", ", difficulty by instruction" if applies else "", *tables)
        if difficulty is not None and not (applies and places == list(range(len(rows)))):
            control("as alpaca_eval would", ", difficulty by row", difficulty, gamed)
    win = alpaca_win_rate([row["preference"] for row in annotations])
    n = win["n_total"]
    scores["win rate"] = Score(win["win_rate"], win["standard_error"], n)
    scores["discrete win rate"] = Score(win["discrete_win_rate"], win["discrete_standard_error"], n)
    win["avg_length"] = int(mean([row["len_2"] for row in rows]))
    notes = ["{n_wins} wins, {n_wins_base} losses, {n_draws} draws; {avg_length} characters".format(**win)]
    if n < len(rows):
        notes.append(f"{len(rows) - n} pairs without a valid verdict are left out, as officially")
    if len({row["instruction"] for row in annotations}) < len(rows):
        notes.append(f"{len(place)} different instructions only: rows of one are not independent")
    if abs(scores["length-controlled win rate"].value - win["win_rate"]) > 10:  # as alpaca_eval warns, about
        notes.append("length control changes the win rate by more than 10: look at the lengths and the fit")
    return scores, notes, {"counts": win, "fits": fits}


def alpaca(options, ranks: Ranks) -> dict[str, Score]:
    files = [options.annotations, options.reference, options.gamed, options.difficulty]
    run = Evaluation("alpaca", options, ranks, files)
    reference = read_outputs(options.reference or HUB) if options.reference or not options.annotations else []
    if options.annotations:
        annotations = read_rows(options.annotations, options.limit)
        check_texts(annotations, options.annotations, "instruction", "output_1", "output_2")
    else:
        shown = reference[: options.limit or None]
        outputs = model_outputs(run, shown)
        if not options.judge:
            return run.finish("AlpacaEval", {}, ["outputs only; --judge J, or alpaca_eval, judges them"])
        annotations = annotate(run, shown, outputs)
    run.write("samples.jsonl", annotations)
    instructions = [row["instruction"] for row in reference or annotations]
    ours = len(set(instructions)) == INSTRUCTIONS
    difficulty, gamed, source = read_tables(options.gamed, options.difficulty, ours)
    scores, notes, more = alpaca_scores(annotations, instructions, difficulty, gamed)
    names = [annotations[0].get(key, "unknown") for key in ("generator_2", "generator_1", "annotator")]
    notes.append(f"tables of difficulty and gamed rows: {source}")
    return run.finish("AlpacaEval: {} against {}, judged by {}".format(*names), scores, notes, **more)


# ================================================================================ RewardBench 1 and 2
# rewardbench/constants.py: SUBSET_MAPPING, EXAMPLE_COUNTS. The weights are constants, whatever was
# evaluated; math-prm has 447 pairs, but weighs as much as the six code subsets together.
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                  "hep-python": 164, "hep-rust": 164},
}
SUBSETS_2 = ["Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"]  # of RewardBench 2
HUB_1, HUB_2 = "allenai/reward-bench#filtered", "allenai/reward-bench-2#test"


def rewardbench_sections(subsets: dict[str, Score]) -> dict[str, Score]:
    """Sections of RewardBench 1, weighted means of those of their subsets that are here, and their mean.

    The official mean (utils.calculate_scores_per_section) counts a section of which nothing is here as 0 and
    does not see a subset that is missing. Ours is missing where anything is."""
    scores = {}
    for section, weights in SECTIONS.items():
        here = [name for name in weights if name in subsets]
        missing = ", ".join(name for name in weights if name not in subsets)
        scores[section] = weighted([subsets[name] for name in here], [weights[name] for name in here],
                                   f"missing: {missing}" if missing else "")
    sections = list(scores.values())
    complete = not any(score.note for score in sections)
    mean_of_four = weighted(sections, [1] * 4) if complete else Score(note="subsets are missing")
    scores["mean of four sections"] = mean_of_four
    scores["as rewardbench would"] = weighted([s if s.n else Score(0, 0) for s in sections], [1] * 4,
                                              "" if complete else "an absent section counts 0")
    return scores


def rewardbench2_best_of(scores) -> float:
    """Credit for a list whose first score is the right response's: 1/k if it is one of the k best, else 0.

    None, no valid score, is below all others; nothing but None makes a guess. Of four this is RewardBench 2
    (utils.reroll_and_score_dataset), of two RewardBench 1 with a judge (ties and failures count one half).

    >>> [rewardbench2_best_of(scores) for scores in ([7, 7, 3, 1], [None] * 4, [5, 6, 5, 5])]
    [0.5, 0.25, 0.0]
    """
    scores = [-math.inf if score is None else score for score in scores]
    return 1 / scores.count(scores[0]) if scores[0] == max(scores) else 0.0


def rewardbench2_ties(items) -> float:
    """Score of the Ties subset: 60% accuracy, 40% margins (rewardbench/utils.py, process_single_model).

    items: {"id": "ref:3" or "tied:3", "scores", "num_correct"}, those of the right first. "ref" has one,
    "tied" several, whose scores should differ less from each other than from the wrong ones.
    Accuracies are over all prompts of a kind, margins over the prompts with both kinds. Up to 1.01.
    """
    margin, spread = {"ref": {}, "tied": {}}, {}
    for item in items:
        kind, prompt = item["id"].split(":")
        right, wrong = item["scores"][:item["num_correct"]], item["scores"][item["num_correct"]:]
        margin[kind][prompt] = min(right) - max(wrong)
        if kind == "tied":
            spread[prompt] = max(right) - min(right)
    both = [prompt for prompt in margin["tied"] if prompt in margin["ref"]]
    hard = {prompt: min(margin["ref"][prompt], margin["tied"][prompt]) for prompt in both}
    ratio = {p: hard[p] / spread[p] if spread[p] else math.copysign(math.inf, hard[p]) for p in both}
    return (0.3 * mean([m > 0 for m in margin["tied"].values()])
            + 0.3 * mean([m > 0 for m in margin["ref"].values()])
            + 0.2 * mean([margin["tied"][p] > spread[p] for p in both])
            + 0.2 * mean([hard[p] > spread[p] for p in both])
            + 0.01 * mean([0 if hard[p] == spread[p] == 0 else math.tanh(ratio[p] - 1) for p in both]))


class Item(NamedTuple):
    """A list to judge, its right responses first."""
    id: str
    subset: str
    prompt: list[dict]
    responses: list[str]
    num_correct: int
    ties: bool  # of RewardBench 2: several are right; each response is shown and scored alone


def preference_tasks(row) -> list[dict]:
    """RewardBench 2 has lists of texts as `chosen` and `rejected`; the rest are schemas of data_prep.py."""
    if isinstance(row, dict) and all(isinstance(row.get(key), list) for key in ("chosen", "rejected")):
        good, bad = row["chosen"], row["rejected"]
        if good and bad and all(isinstance(text, str) for text in [row.get("prompt"), *good, *bad]):
            return [data_prep.task("preference", urpo.chat(row["prompt"]), responses=good + bad,
                                   scores=[1.0] * len(good) + [0.0] * len(bad))]
    return data_prep.convert(row)


def read_items(source: str, options) -> tuple[list[Item], int]:
    """-> pairs, or for --v2 lists of four with one best and Ties; and how many lists were of other sizes."""
    items, others, size = [], 0, 4 if options.v2 else 2
    for number, row, task in read_tasks(source, "preference", options.limit, preference_tasks):
        ranked = sorted(zip(task["scores"], task["responses"]), key=lambda pair: -pair[0])
        right = sum(score == ranked[0][0] for score, _ in ranked)
        subset = row.get("subset") or options.subset or set_name(source)
        item = Item(str(row.get("id", number)), subset, task["prompt"], [text for _, text in ranked], right,
                    options.v2 and subset == "Ties")
        if item.ties and not re.fullmatch("(ref|tied):[^:]+", item.id):
            raise BadInput(f"{source}: row {number}: id: expected ref:N or tied:N, got {item.id}")
        if item.ties and right < len(ranked) or (right, len(ranked)) == (1, size):
            items.append(item)
        else:
            others += 1
    if not items:
        raise BadInput(f"{source}: has no list of {size} responses with one best")
    return items, others


def judge_items(run: Evaluation, items: list[Item]) -> list[list[list[float] | None]]:
    """Verdicts on each item, scores of its responses in its own order or None: one for a random order of
    showing them, one for the reverse. Ties: one of all responses, -1 for a score that does not parse."""
    options, prompts, shown = run.options, [], []
    tokenizer, context = urpo.load_tokenizer(options.model)
    budget = min(options.judge_prompt_tokens, context - options.judge_max_new_tokens)
    for k, item in enumerate(items):
        rng, everyone = random.Random(f"{options.seed}/{k}"), range(len(item.responses))
        order = rng.sample(everyone, len(everyone))
        for places in [[i] for i in everyone] if item.ties else [order, order[::-1]]:
            shown.append((k, places))
            texts = [item.responses[i] for i in places]
            try:
                prompts.append(urpo.judge_prompt(tokenizer, item.prompt, texts, rng, budget))
            except ValueError:  # does not fit, even cut: not asked
                prompts.append(None)
    verdicts: list[list] = [[] for _ in items]
    for (k, places), answer in zip(shown, run.generate("judgements", prompts, options.judge_max_new_tokens)):
        scores = urpo.parse_scores(answer["text"], len(places)) if answer else None
        verdicts[k].append([scores[places.index(i)] for i in sorted(places)] if scores else None)
    return [[[v[0] if v else -1.0 for v in of_item]] if item.ties else of_item
            for item, of_item in zip(items, verdicts)]


RATES = ["strict", "tie", "flip", "parsed"]


def item_record(item: Item, verdicts: list[list[float] | None]) -> dict:
    """What is kept of an item. `score`: the official credit, mean of both orders. `strict`: a tie or no
    verdict is wrong. `tie`: the right response shares the first place. `flip`: the orders have no best
    response in common."""
    record = {"id": item.id, "subset": item.subset, "num_correct": item.num_correct, "verdicts": verdicts}
    if item.ties:  # scored as a whole, by rewardbench2_ties
        return record | {"score": None, "parsed": mean([float(score > 0) for score in verdicts[0]])}
    best = [{i for i, score in enumerate(v) if score == max(v)} for v in verdicts if v]
    return record | {
        "score": mean([rewardbench2_best_of(v or [None] * len(item.responses)) for v in verdicts]),
        "strict": sum(b == {0} for b in best) / len(verdicts), "parsed": len(best) / len(verdicts),
        "tie": mean([float(0 in b and len(b) > 1) for b in best]) if best else None,
        "flip": float(not best[0] & best[1]) if len(best) == 2 else None}


def ties_score(records: list[dict]) -> Score:
    """Of the subset Ties, with the standard error of the jackknife over prompts."""
    items = [{"id": r["id"], "scores": r["verdicts"][0], "num_correct": r["num_correct"]} for r in records]
    prompts = sorted({item["id"].partition(":")[2] for item in items})
    without = [rewardbench2_ties([item for item in items if item["id"].partition(":")[2] != prompt])
               for prompt in prompts] if len(prompts) > 1 else []
    error = (len(prompts) - 1) * standard_error(without)
    return Score(100 * rewardbench2_ties(items), 100 * error, len(prompts), "n: prompts; at most 101")


def rewardbench(options, ranks: Ranks) -> dict[str, Score]:
    sources = options.data or [HUB_2 if options.v2 else HUB_1]
    run = Evaluation("rewardbench2" if options.v2 else "rewardbench", options, ranks, sources)
    parts = [read_items(source, options) for source in sources]
    items = [item for part, _ in parts for item in part]
    records = [item_record(item, verdicts) for item, verdicts in zip(items, judge_items(run, items))]
    grouped = {item.subset: [r for r in records if r["subset"] == item.subset] for item in items}
    is_ties = {item.subset: item.ties for item in items}
    subsets = {name: ties_score(part) if is_ties[name] else percent([r["score"] for r in part])
               for name, part in grouped.items()}
    rates = {name: {rate: percent([r.get(rate) for r in part]) for rate in RATES}
             for name, part in [*grouped.items(), ("all", records)]}
    if options.v2:
        scores = {name: subsets.get(name, Score()) for name in SUBSETS_2}
        scores["mean of six subsets"] = weighted(scores.values(), [1] * 6)
    else:
        scores = rewardbench_sections(subsets)
    if not any(score.n for score in scores.values()):
        scores = {}  # other data than RewardBench's
    scores["all lists"] = percent([r["score"] for r in records], "their plain mean")
    scores |= {f"all lists, {rate}": score for rate, score in rates["all"].items()}

    run.write("samples.jsonl", records)
    official = {"model": run.name, "model_type": "Generative RM", "chat_template": None}
    accuracies = official | {name: score.value / 100 for name, score in subsets.items()}
    run.write(f"eval-set/{run.name}.json", dict(sorted(accuracies.items())))
    texts = [[[*item.prompt, {"role": "assistant", "content": text}] for text in item.responses]
             for item in items]
    run.write(f"eval-set-scores/{run.name}.json", official | {
        "text_chosen": [part[: item.num_correct] for item, part in zip(items, texts)],
        "text_rejected": [part[item.num_correct :] for item, part in zip(items, texts)],
        "results": [record["score"] for record in records],
        "subset": [item.subset for item in items], "id": [item.id for item in items]})
    if ranks.main:
        print_table(["subset", "n", "score", *RATES],
                    [[name, score.n, score, *rates[name].values()] for name, score in subsets.items()])
    others = sum(count for _, count in parts)
    kept = {name: {rate: part._asdict() for rate, part in {"score": score, **rates[name]}.items()}
            for name, score in subsets.items()}
    return run.finish(f"RewardBench {2 if options.v2 else 1}, {run.name} as the judge", scores,
                      [f"{others} lists of other sizes are left out"] * (others > 0), subsets=kept)


# ================================================================================ Reasoning
def avg_at_n(outcomes) -> dict:
    """Mean over problems of the share of right samples, from one list of 0 and 1 for each problem.

    The standard error is over problems: samples of one problem share its luck, to pool them flatters it.
    """
    shares = [mean(samples) for samples in outcomes]
    return {"avg": mean(shares), "standard_error": standard_error(shares), "n_problems": len(shares)}


def pass_at_k(outcomes, k: int) -> float:
    """Chance that one of k samples is right, unbiased: mean of 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).

    >>> pass_at_k([[1, 0, 0, 0], [0, 0, 0, 0]], 2)
    0.25
    """
    if any(len(samples) < k for samples in outcomes):
        raise ValueError(f"pass@{k} needs {k} samples of each problem")
    return mean([1 - math.comb(samples.count(0), k) / math.comb(len(samples), k) for samples in outcomes])


# What most papers average. AIME and AMC23 are small: --samples 32 at --temperature 0.6 to 1
SUITES = ["openai/gsm8k@main#test", "HuggingFaceH4/MATH-500#test", "HuggingFaceH4/aime_2024",
          "math-ai/amc23#test", "math-ai/minervamath#test", "Hothan/OlympiadBench@OE_TO_maths_en_COMP"]


def problem_tasks(row) -> list[dict]:
    """Every schema of data_prep.py, and two that benchmarks have: `question` with a bare `answer` (AMC23,
    Minerva), `question` with a list as `final_answer` (OlympiadBench)."""
    if isinstance(row, dict) and "question" in row:
        golds, answer = row.get("final_answer"), row.get("answer")
        if isinstance(golds, list) and golds and all(isinstance(gold, str) for gold in golds):
            question = "\n\n".join(filter(None, [row.get("context"), row["question"]]))
            row = {"problem": question, "answer": ", ".join(gold.replace("$", "") for gold in golds)}
        elif answer is not None and "####" not in str(answer):
            row = {"problem": row["question"], "answer": answer}
    return data_prep.convert(row)


def split_answers(text: str) -> list[str]:
    """At the commas that stand in no bracket.

    >>> split_answers("(1,8), 2")
    ['(1,8)', '2']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        parts += [""] if character == "," and depth == 0 else []
        parts[-1] += "" if character == "," and depth == 0 else character
    return [part.strip() for part in parts]


def check_answer(verify, completion: str, answer: str, several: bool) -> float:
    """1 if the final answer is right, else 0. `several`: a list of answers, each of which must come once, in
    any order (OlympiadBench)."""
    golds, claims = split_answers(answer), split_answers(urpo.final_answer(completion))
    if not several or len(golds) == 1:
        return verify(completion, answer)
    for gold in golds:
        claim = next((claim for claim in claims if verify(f"\\boxed{{{claim}}}", gold)), None)
        if claim is None:
            return 0.0
        claims.remove(claim)
    return float(not claims)


def reasoning(options, ranks: Ranks) -> dict[str, Score]:
    n, limit, verify = options.samples, options.max_new_tokens, urpo.VERIFIERS[options.verifier]
    sources = {set_name(source): source for source in options.data or SUITES}
    if len(sources) < len(options.data):
        raise BadInput(f"--data: two sets of one name: {', '.join(map(set_name, options.data))}")
    run = Evaluation("reasoning", options, ranks, list(sources.values()))
    suites = {suite: read_tasks(source, "verifiable", options.limit, problem_tasks)
              for suite, source in sources.items()}
    (tokenizer, context), scores, samples = urpo.load_tokenizer(options.model), {}, []
    for suite, tasks in suites.items():
        prompts = [urpo.verifiable_group(task, tokenizer, None, None).prompt_ids for _, _, task in tasks]
        prompts = [fitting(ids, context, limit) for ids in prompts for _ in range(n)]
        answers = iter(run.generate(suite, prompts, limit, options.temperature))
        outcomes, cut = [], 0
        for number, row, task in tasks:
            several, outcomes = row.get("final_answer") is not None, [*outcomes, []]
            for answer in itertools.islice(answers, n):
                answer = answer or {"text": "", "tokens": 0, "truncated": True}  # the prompt does not fit
                outcomes[-1].append(check_answer(verify, answer["text"], task["answer"], several))
                cut += answer["truncated"]
                samples.append({"suite": suite, "id": row.get("id", number), "prompt": task["prompt"],
                                "answer": task["answer"], "claim": urpo.final_answer(answer["text"]),
                                "correct": outcomes[-1][-1], **answer})
        shares = avg_at_n(outcomes)
        scores[f"{suite} avg@{n}"] = Score(100 * shares["avg"], 100 * shares["standard_error"], len(tasks),
                                           f"{cut} of {n * len(tasks)} answers cut short" if cut else "")
        for k in [2**i for i in range(1, n.bit_length())]:
            scores[f"{suite} pass@{k}"] = percent([pass_at_k([of_problem], k) for of_problem in outcomes])
    whole = [scores[f"{suite} avg@{n}"] for suite in suites]
    scores["composite"] = weighted(whole, [1] * len(whole), f"unweighted mean of {len(whole)} suites")
    run.write("samples.jsonl", samples)
    how = f"{n} samples at temperature {options.temperature}" if options.temperature else "greedy"
    return run.finish(f"Reasoning of {run.name}, {how}", scores, [f"verifier: {options.verifier}"])


# ================================================================================ All
HEADLINES = {  # columns of the table: (command, its score)
    "AlpacaEval, length-controlled": ("alpaca", "length-controlled win rate"),
    "AlpacaEval, win rate": ("alpaca", "win rate"),
    "RewardBench": ("rewardbench", "mean of four sections"),
    "all judged lists": ("rewardbench", "all lists"),
    "reasoning": ("reasoning", "composite"),
}


def tiny_world(options, ranks: Ranks):
    """What `all` evaluates where there is no GPU: the newest tiny run, else its start, on held-out rows."""
    preset = urpo.PRESETS["tiny"]
    if ranks.main and not Path(preset["eval_data"]).exists():
        data_prep.make_tiny(Path(preset["eval_data"]).parent)
    ranks.gather(None)  # wait for the file
    runs = Path(Config.out_dir).glob("tiny-*/final/config.json")
    runs = sorted(runs, key=lambda path: path.stat().st_mtime)
    options.model = [str(runs[-1].parent) if runs else preset["model"]]
    options.reference = options.judge = "tiny"
    options.pairs = options.problems = [preset["eval_data"]]
    options.max_new_tokens = preset["max_new_tokens"]
    options.judge_max_new_tokens = preset["judge_max_new_tokens"]


def everything(options, ranks: Ranks):
    """The paper's table, a row for each model. Each part is what its own command does, in the same folder."""
    if not options.model:
        tiny_world(options, ranks)
    if options.name and len(options.model) > 1:
        raise BadInput(f"--name {options.name}: one name for {len(options.model)} models")
    rows = []
    for model in options.model:
        row = {"model": options.name or model_name(model)}
        for command in ("alpaca", "rewardbench", "reasoning"):
            part, given = vars(make_parser().parse_args([command])), vars(options)
            part |= {flag: given[flag] for flag in part if flag in given}
            part |= {"command": command, "model": model}
            if "data" in part:
                part["data"] = options.pairs if command == "rewardbench" else options.problems
            scores = COMMANDS[command](argparse.Namespace(**part), ranks)
            row |= {key: scores.get(name, Score()) for key, (of, name) in HEADLINES.items() if of == command}
        rows.append(row)
    if ranks.main:
        path = Path(options.out_dir) / f"all{trial_suffix(options.limit)}.json"
        named = [{key: score._asdict() if key in HEADLINES else score for key, score in row.items()}
                 for row in rows]
        path.write_text(to_json({"scale": "percent", "rows": named, "versions": versions()}, indent=2))
        print(f"\n{trial_mark(options.limit)}Percent ± standard error (n).")
        print_table(["model", *HEADLINES],
                    [[row["model"], *(f"{row[key]} ({row[key].n})" for key in HEADLINES)] for row in rows])
        print(f"written to {path}")


COMMANDS = {"alpaca": alpaca, "rewardbench": rewardbench, "reasoning": reasoning, "all": everything}


# ================================================================================ Curves
# what a reader looks at first: (title, names of metrics that are drawn into one panel)
PANELS = [
    ("held out: verifiable accuracy", ["eval/verifiable_accuracy", "eval/verifiable_accuracy_greedy"]),
    ("held out: referee's pairwise accuracy", ["eval/referee_accuracy", "eval/referee_accuracy_greedy"]),
    ("held out: true quality of open answers", ["eval/true_quality", "eval/true_quality_greedy"]),
    ("reward", ["reward/verifiable", "reward/preference"]),
    ("open answers: the referee's score, the truth", ["raw_score/open", "true_quality/open"]),
    ("open answers: does the reward order them rightly?", ["reward_tau/open"]),
    ("open answers: entropy of scores, nats", ["score_entropy/open"]),
    ("length, tokens", ["length/open", "length/verifiable", "length/preference"]),
    ("flat groups", ["flat/open", "flat/verifiable", "flat/preference"]),
    ("judgements that parse", ["parse_rate/open", "parse_rate/preference"]),
    ("entropy, nats", ["entropy"]),
    ("KL, nats", ["kl"]),
]
# what is tabled of the steps of training, beside everything held out
TABLED = ["raw_score/open", "true_quality/open", "reward_tau/open", "score_entropy/open", "tie_rate/open",
          "length/open", "flat/verifiable", "flat/preference", "flat/open"]
STYLES = ["-", "--", ":"]
WINDOW = 10  # steps of training that a value is the mean of: single ones are noise


def read_run(folder: str) -> list[dict]:
    """The lines of a run's metrics.jsonl; BadInput if it is not a run."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise BadInput(f"{folder}: not a run (it has no metrics.jsonl)")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not lines:
        raise BadInput(f"{path}: has no lines yet")
    return lines


def smooth(values: list[float]) -> list[float]:
    """Mean over the last WINDOW values."""
    return [sum(values[max(0, i + 1 - WINDOW) : i + 1]) / min(WINDOW, i + 1) for i in range(len(values))]


def series(lines: list[dict], name: str) -> dict[int, float]:
    """Step -> value of one metric of one run; those of training are smoothed."""
    points = {line["step"]: line[name] for line in lines if name in line}
    return points if name.startswith("eval/") else dict(zip(points, smooth(list(points.values()))))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error; 0 for one seed, which has no band."""
    return mean(values), standard_error(values) if len(values) > 1 else 0.0


def spread(values: list[float]) -> str:
    middle, error = mean_and_error(values)
    return f"{middle:.3f}" + f" ± {error:.3f}" * (len(set(values)) > 1)


def seeds_by_arm(runs: dict[str, list[dict]]) -> dict[str, list[list[dict]]]:
    """Runs whose names differ only in a trailing -sN are seeds of one arm."""
    arms: dict[str, list[list[dict]]] = {}
    for name, lines in runs.items():
        arms.setdefault(re.sub(r"-s\d+$", "", name), []).append(lines)
    return arms


def print_columns(title: str, columns: dict[str, dict[str, str]]) -> None:
    """One row for each name in the columns."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    print()
    print_table([title, *columns], [[name, *(c.get(name, "") for c in columns.values())] for name in names])


def tables(arms: dict[str, list[list[dict]]]) -> None:
    """Mean ± standard error over seeds: held-out scores at the first and the last evaluation (arms that start
    from one model share a column), and what training looked like in its last steps."""
    held_out, training = {}, {}
    for arm, seeds in arms.items():
        for which in (0, -1):
            held = [[line for line in lines if any("eval/" in name for name in line)] for lines in seeds]
            chosen = [lines[which] for lines in held if lines]
            column = {name.removeprefix("eval/"): spread([line[name] for line in chosen])
                      for name in (chosen[0] if chosen else []) if name != "step"}
            if column and column not in held_out.values():
                held_out[f"{arm}, step {chosen[0]['step']}"] = column
        last = {name: [list(series(lines, name).values())[-1:] for lines in seeds] for name in TABLED}
        tokens = sum(line.get("trained_tokens", 0) for lines in seeds for line in lines) / len(seeds)
        column = {name: spread(sum(values, [])) for name, values in last.items() if any(values)}
        column["tokens in the loss, thousands"] = f"{tokens / 1000:.0f}"
        training[f"{arm}, n {len(seeds)}"] = column
    print_columns("held out", held_out)
    print_columns(f"last {WINDOW} steps of training", training)


def curves(folders: list[str], out: str) -> None:
    """Tables and a picture: a colour for each arm (mean over its seeds, band: standard error), a line style
    for each metric of a panel."""
    arms = seeds_by_arm({Path(folder).name: read_run(folder) for folder in folders})
    tables(arms)
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")  # to a file, also where there is no screen
    from matplotlib import pyplot

    shown = [(title, names) for title, names in PANELS
             if any(series(lines, name) for seeds in arms.values() for lines in seeds for name in names)]
    rows = math.ceil(len(shown) / 4) or 1  # a Hub model's runs know no true quality: no empty panels for it
    figure, axes = pyplot.subplots(rows, 4, figsize=(16, 10 * rows / 3), squeeze=False)
    for axis in axes.flat[len(shown):]:
        axis.set_axis_off()
    for axis, (title, names) in zip(axes.flat, shown):
        for colour, seeds in enumerate(arms.values()):
            for style, name in zip(STYLES, names):
                points = [series(lines, name) for lines in seeds]
                steps = sorted(set.intersection(*map(set, points)))
                if steps:
                    bands = [mean_and_error([of_seed[step] for of_seed in points]) for step in steps]
                    axis.plot(steps, [middle for middle, _ in bands], style, color=f"C{colour}")
                    low, high = zip(*((middle - error, middle + error) for middle, error in bands))
                    axis.fill_between(steps, low, high, color=f"C{colour}", alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        if len(names) > 1:
            keys = [pyplot.Line2D([], [], color="black", linestyle=style) for style, _ in zip(STYLES, names)]
            axis.legend(keys, [name.removeprefix("eval/") for name in names], fontsize=7)
    handles = [pyplot.Line2D([], [], color=f"C{colour}", linewidth=3) for colour in range(len(arms))]
    labels = [f"{arm} (n {len(seeds)})" for arm, seeds in arms.items()]
    figure.legend(handles, labels, loc="lower center", ncols=len(arms))
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(out, dpi=75)
    print(out)


# ================================================================================ Main
EACH, PLAYER, JUDGE = "alpaca rewardbench reasoning all", "alpaca reasoning all", "rewardbench all"
FLAGS = [  # (commands, flag, default, help)
    (EACH, "model", "", "model folder or Hub name; several for all"),
    (EACH, "out_dir", "evals", "folder of all results"),
    (EACH, "name", "", "what the model is called; its folder or run unless said"),
    (EACH, "limit", 0, "a trial on the first N of each set; 0: all of them"),
    (EACH, "seed", 0, "of samples, and of the order in which responses are shown"),
    (EACH, "device", "", "cpu or cuda; cuda where there is one unless said"),
    (EACH, "stop_tokens", "", "further stop tokens, comma-separated (base model with chat template)"),
    (EACH, "rollout_tokens", 131072, "tokens in one batch of model.generate: bounds the KV cache"),
    (PLAYER, "max_new_tokens", 2048, "longest answer, tokens"),
    (PLAYER, "temperature", 0.0, "of answers; 0: greedy"),
    ("alpaca all", "reference", "", "outputs to compare with; the Hub's unless said; tiny: people's"),
    ("alpaca all", "judge", "", "a local model; none: only model_outputs.json; tiny: true quality"),
    ("alpaca all", "annotations", "", "score these judgements (official format), ask no model"),
    ("alpaca all", "gamed", "", "table like df_gamed.csv; the Hub's, for its 805 instructions"),
    ("alpaca all", "difficulty", "", "table like instruction_difficulty.csv, instead of the gamed one's"),
    ("rewardbench", "data", [], "files or Hub sets; RewardBench on the Hub unless said"),
    ("all", "pairs", [], "--data of rewardbench"),
    (JUDGE, "v2", False, "RewardBench 2: best of four, and Ties"),
    (JUDGE, "subset", "", "subset of rows that name none; the file's name unless said"),
    (JUDGE, "judge_max_new_tokens", 1024, "longest judgement, tokens"),
    (JUDGE, "judge_prompt_tokens", 8192, "longest judge prompt; responses lose their middle to fit"),
    ("reasoning", "data", [], "files or Hub sets; six suites on the Hub unless said"),
    ("all", "problems", [], "--data of reasoning"),
    ("reasoning all", "samples", 1, "answers to each problem: avg@n and pass@k"),
    ("reasoning all", "verifier", "plain", "plain or math_verify, as in urpo.py"),
]


def make_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, allow_abbrev=False)
        for of_commands, flag, default, text in FLAGS:
            if name in of_commands.split():
                kind = {"nargs": "+"} if type(default) is list or (name, flag) == ("all", "model") else (
                    {"action": "store_true"} if default is False else {"type": type(default)})
                command.add_argument(f"--{flag}", default=default, help=text, **kind)
    command = commands.add_parser("curves", help="draw metrics of runs", allow_abbrev=False)
    command.add_argument("runs", nargs="+", help="run folders")
    command.add_argument("--out", default="curves.png", help="picture to write (default curves.png)")
    return parser


def check_options(options):
    """BadInput for what the parser cannot know."""
    given = vars(options)
    for name, least in {"limit": 0, "temperature": 0, "samples": 1, "max_new_tokens": 1, "rollout_tokens": 1,
                        "judge_max_new_tokens": 1, "judge_prompt_tokens": 1}.items():
        if given.get(name, least) < least:
            raise BadInput(f"--{name} {given[name]}: expected at least {least}")
    if given.get("samples", 1) > 1 and not options.temperature:
        raise BadInput(f"--samples {options.samples}: at --temperature 0 they would all be the same")
    if given.get("verifier", "plain") not in urpo.VERIFIERS:
        raise BadInput(f"--verifier {options.verifier}: expected {' or '.join(urpo.VERIFIERS)}")
    if given.get("verifier") == "math_verify" and not importlib.util.find_spec("math_verify"):
        raise BadInput("--verifier math_verify: pip install math-verify")
    tiny = options.command == "all" and (options.device == "cpu" or not torch.cuda.is_available())
    if not options.model and not given.get("annotations") and not tiny:
        raise BadInput("--model is missing")


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    if options.command == "curves":
        return curves(options.runs, options.out)
    check_options(options)
    transformers_logging.disable_progress_bar()
    with Ranks(Config(device=options.device)) as ranks:
        COMMANDS[options.command](options, ranks)


if __name__ == "__main__":
    main()
