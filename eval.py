"""The paper's three scores, counted as the official evaluators do; curves and samples of runs.

    python eval.py alpaca      --model M --judge J         AlpacaEval 2: win rates
    python eval.py alpaca      --outputs FILE --judge J    of answers from elsewhere
    python eval.py alpaca      --annotations A.json B.json of judgements from elsewhere
    python eval.py rewardbench --model M                   M is the judge; --lists: other data
    python eval.py reasoning   --model M                   answers to --problems
    python eval.py all         --model A B --judge J       all three, and how B differs from A
    python eval.py all                                     no GPU, no network: the newest tiny run
    python eval.py curves      runs/A runs/B               metrics, tabled and drawn
    python eval.py samples     runs/A                      a page: what was paid for what

Models are folders or Hub names; data are FILE_OR_NAME[@CONFIG][#SPLIT], any schema of data_prep.py,
or the official sets on the Hub. `torchrun --nproc_per_node N eval.py ...` shares the work. Answers
are kept in OUT_DIR/NAME/answers: a command that was stopped goes on, and answers can be judged
later, or by another judge. OUT_DIR/NAME/COMMAND has results.json, samples.json, official files:
model_outputs.json, JUDGE/annotations.json (alpaca_eval), eval-set/ORG/MODEL.json (rewardbench).

How this differs from the official tools: the judge is a local model; length control has no penalty
(within 0.12 of theirs) and has an error; judge lists are shown in two orders, in the prompt that
the referee was trained on; what is missing is missing, not 0, and counted. A prompt that does not
fit the context of its model is not asked: it is left out of the score, and a note says how many."""
import argparse
import csv
import gc
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import textwrap
from argparse import Namespace
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import transformers
from jinja2 import TemplateError
from torch import Tensor
from tqdm.auto import tqdm

import data_prep
import urpo
from data_prep import BadInput, in_one_line, without_thoughts
from tools.runs import WIDTH, curves, cut, print_table, read_verdict, samples


# ================================================================================= Scores
# Every number that is printed has its error and its n beside it. Two models answer the same
# prompts, and a hard prompt is hard for both: an error of their difference that took them for
# independent would be far too large. So a score remembers what each prompt adds to its deviation.
class Score(NamedTuple):
    """A score in percent (NaN: missing). The squares of its `parts` add up to its squared error:
    there is one for each independent unit, a prompt or a bootstrap draw. Sums and differences are
    taken part by part, so what models share on a prompt cancels: a difference is a paired one."""
    value: float = math.nan
    parts: dict[str, float] = {}
    n: int = 0  # rows
    note: str = ""

    @property
    def error(self) -> float:
        squares = math.fsum(part**2 for part in self.parts.values())
        return math.nan if math.isnan(self.value) else math.sqrt(squares)

    def __str__(self):
        text = f"{self.value:.2f} ± {self.error:.2f}".removesuffix(" ± nan")  # of a single prompt
        return text.replace("nan", "missing")

    def record(self) -> dict:
        """For JSON, which has no NaN."""
        value = None if math.isnan(self.value) else self.value
        error = None if math.isnan(self.error) else self.error
        return {"value": value, "error": error, "n": self.n, "note": self.note}


def percent(observed: list[tuple[str, float | None]], note="") -> Score:
    """The mean of (prompt, value in [0, 1]) pairs; a value None is left out. With one row a prompt
    the error is the deviation (ddof 1) over the root of n; equal prompts count as one in it.

    >>> old = percent([("p", 0), ("q", 1), ("r", 1)])
    >>> new = percent([("p", 1), ("q", 1), ("r", 1)])
    >>> str(old), str(combined([new, old], [1, -1]))  # on q and r nothing has changed
    ('66.67 ± 33.33', '33.33 ± 33.33')
    """
    known = [(prompt, 100 * value) for prompt, value in observed if value is not None]
    if not known:
        return Score(note=note)
    mean = math.fsum(value for _, value in known) / len(known)
    parts = Counter()
    for prompt, value in known:
        parts[prompt] += (value - mean) / len(known)

    units = len(parts)
    scale = math.sqrt(units / (units - 1)) if units > 1 else math.nan  # one alone shows no spread
    return Score(mean, {prompt: part * scale for prompt, part in parts.items()}, len(known), note)


def combined(scores: list[Score], weights: list[float] | None = None, note="") -> Score:
    """The sum of weight * score; without weights the plain mean. Missing if one of them is."""
    value, parts = 0.0, Counter()
    for score, weight in zip(scores, weights or [1 / len(scores)] * len(scores), strict=True):
        value += weight * score.value
        for unit, part in score.parts.items():
            parts[unit] += weight * part
    return Score(value, parts, sum(score.n for score in scores), note)


# ================================================================================= Asking a model
# Answers are slow, scores are quick. So answers are kept in files, in chunks, and all else is
# computed anew at each start. A file's name is a digest of everything that decides its answers (the
# model's weights, the prompts' token ids, the limits, the seed): it is looked up before we ask.
CHUNK = 64  # answers that are asked for and kept together: what a kill costs at most
TOP = 5  # the likeliest tokens of the judge are looked at, as the official configuration does


class Evaluation:
    """One model: what it and its judge are asked, and the results. Alike on every rank."""

    def __init__(self, options: Namespace, ranks: urpo.Ranks, name: str, model: str, file: str):
        own = {"name": name, "model": model, "annotations": file}
        self.options, self.ranks = Namespace(**vars(options) | own), ranks
        self.rehearsal = False  # what is wrong is found, nothing is asked or written
        self.home = Path(options.out_dir) / name
        self.trial = f"-limit{options.limit}" if options.limit else ""
        self.loaded = "", None  # a model's name, its actor
        shared = "device", "rollout_tokens", "max_new_tokens", "judge_max_new_tokens"
        self.config = urpo.Config(**{setting: getattr(options, setting) for setting in shared})
        self.check_owner("model.json", model or options.outputs)

    def check_owner(self, path: str, model: str):
        """BadInput if this file says that the folder it is in belongs to another model."""
        owner = self.home / path
        if owner.exists() and owner.read_text() != json.dumps(identity(model)):
            raise BadInput(f"{owner.parent} holds answers of another {owner.parent.name}: give a "
                           "--name, or for another judge another --out_dir")

    def texts(self, what: str, model: str, prompts: list, limit: int, n=1, temperature=0.0) -> list:
        """For each prompt [P] n answers {"text", "truncated"} within `limit` tokens, or None."""
        def answer(actor: urpo.Actor, asked: list[list[int]]) -> list:
            groups = urpo.sample(actor.model, asked, n, [limit] * len(asked), temperature,
                                 actor.stop_ids, self.options.rollout_tokens)
            return [spoken(actor, *group) for group in zip(asked, groups)]

        if self.rehearsal:  # empty answers: enough to see whether what follows would fit
            return [[{"text": "", "truncated": False}] * n] * len(prompts)
        # what decides an answer, besides its prompt
        decides = ["text", identity(model), limit, n, self.options.stop_tokens, temperature]
        decides += [self.options.seed] if temperature else []
        chunks = self.chunks(prompts, decides, max(1, CHUNK // n))
        self.fill(what, model, chunks, answer)
        return self.collect(chunks, len(prompts))

    def duels(self, judge: str, prompts: list) -> list:
        """For each prompt [P] the likeliest next tokens [[text, log-prob], ...], or None."""
        chunks = self.chunks(prompts, ["duel", identity(judge)], CHUNK)
        self.fill("duels", judge, chunks, likeliest_tokens)
        return self.collect(chunks, len(prompts))

    def chunks(self, prompts: list, decides: list, size: int) -> dict[str, dict[int, list[int]]]:
        """File -> the prompts that are asked together, by their places. Those that do not fit the
        context are in no chunk, nor those that there is nothing to ask about."""
        places = [i for i, ids in enumerate(prompts) if ids]
        places.sort(key=lambda i: len(prompts[i]))  # alike: little padding
        chunks = {}
        for start in range(0, 0 if self.rehearsal else len(places), size):
            chunk = {i: prompts[i] for i in places[start : start + size]}
            question = json.dumps([decides, start, *chunk.values()])  # start: twins are two chunks
            chunks[f"answers/{digest(question)}.json"] = chunk
        return chunks

    def fill(self, what: str, model: str, chunks: dict, answer):
        """Ask for the chunks that are not kept yet; the ranks take turns."""
        # every rank sees the same files, and takes every world-th of the missing ones
        missing = [file for file in chunks if not (self.home / file).exists()]
        self.ranks.gather(None)  # all have looked
        if missing:
            self.write("model.json", identity(self.options.model or self.options.outputs))
            if self.loaded[0] != model:
                self.drop_model()  # before the next one comes
                own = model == self.options.model  # the judge has its own stop tokens
                self.config.stop_tokens = self.options.stop_tokens if own else ""
                self.loaded = model, urpo.load_actor(model, self.config, self.ranks, False)
            mine = missing[self.ranks.rank :: self.ranks.world]
            with self.ranks.unsharded(self.loaded[1].model):
                for file in tqdm(mine, what, disable=not self.ranks.main):
                    torch.manual_seed(int(digest(file), 16) % 2**63)  # --seed is in the name
                    self.write(file, answer(self.loaded[1], [*chunks[file].values()]))
        self.ranks.gather(None)  # all have written

    def collect(self, chunks: dict, count: int) -> list:
        """The answers in the order of the prompts, None where there is none."""
        answers = [None] * count
        for file, chunk in chunks.items():
            with in_one_line(f"{self.home / file}: damaged; without it we ask again", TypeError):
                found = json.loads((self.home / file).read_bytes())
                for place, answer in zip(chunk, found, strict=True):
                    answers[place] = answer
        return answers

    def drop_model(self):
        self.loaded = "", None
        gc.collect()  # a sharded model refers to itself: no longer named, it would still be there

    def write(self, name: str, value):
        """Whole or not at all; by rank 0, but for answers."""
        if (self.ranks.main or name.startswith("answers/")) and not self.rehearsal:
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another command has its own
            draft.write_text(json.dumps(value, indent=1, allow_nan=False))
            draft.replace(path)

    def finish(self, folder: str, scores: dict[str, Score], notes: dict) -> dict[str, Score]:
        """Write results.json, say where and what is to be noted -> the scores."""
        command = self.options.command
        git = subprocess.run("git describe --always --dirty || echo unknown", shell=True, text=True,
                             cwd=Path(__file__).parent, capture_output=True).stdout.strip()
        flags = {f: vars(self.options)[f] for of, f, *_ in FLAGS if command in of.split()}
        self.write(f"{folder}/results.json", {
            "scores": {name: score.record() for name, score in scores.items()}, "notes": notes,
            "settings": flags | {"command": command}, "trial": bool(self.trial), "git": git,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}})
        if self.ranks.main and not self.rehearsal:
            said = ", ".join(f"{value} {name}" for name, value in notes.items())
            print(textwrap.fill(f"{self.home / folder}: {said}", WIDTH), flush=True)
        return scores


def spoken(actor: urpo.Actor, prompt_ids: list[int], group: list[urpo.Completion]) -> list[dict]:
    """What was said, thoughts and all: each score takes what stands behind them."""
    return [{"text": actor.text(c.ids, prompt_ids), "truncated": c.truncated} for c in group]


@torch.no_grad()
def likeliest_tokens(actor: urpo.Actor, prompts: list[list[int]]) -> list[list[tuple[str, float]]]:
    """For each prompt the TOP tokens that the model would most likely go on with, and their
    log-probs. Nothing is sampled: with the probabilities of two answers a verdict has degrees."""
    found = []
    for ids in map(torch.tensor, prompts):
        logits = actor.model(ids[None].to(actor.model.device), logits_to_keep=1).logits[0, -1]
        logprobs, tokens = logits.float().log_softmax(-1).topk(TOP)
        found.append(list(zip(map(actor.tokenizer.decode, tokens.tolist()), logprobs.tolist())))
    return found


def digest(text: str) -> str:
    """24 hexadecimal digits: two texts with the same are not to be expected, ever."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def identity(name: str) -> str:
    """Of a file or a folder's weights: names, sizes, times. A Hub name stands for itself."""
    files = sorted(Path(name).glob("*.safetensors")) or [Path(name)]
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return digest(repr(stats)) if stats else name


def short_name(of: str) -> str:
    """What a model or a judge is called: runs/a/final is a, ORG/b is b. It names folders, too.

    >>> short_name("runs/tiny-1/final"), short_name("Qwen/Qwen2.5-7B"), short_name("my model/")
    ('tiny-1', 'Qwen2.5-7B', 'my_model')
    """
    path = Path(of).resolve()
    name = path.parent.name if path.name == "final" else path.name
    return cut(re.sub(r"[^\w.+-]", "_", name), 120)


def prompts_of(model: str, items: list, make, limit: int, what: str) -> list:
    """The prompt `make(tokenizer, item)` of each item ([]: nothing to ask), None where with `limit`
    more tokens it exceeds the model's context. BadInput if none is left (there would be no score),
    or if the chat template refuses one: some want no system message, some turns that alternate."""
    tokenizer, context = urpo.load_tokenizer(model)
    prompts = []
    for number, item in enumerate(items, 1):
        with in_one_line(f"{model}: its template refuses row {number} of {what}", TemplateError):
            ids = make(tokenizer, item)
        prompts.append(ids if ids is not None and len(ids) + limit <= context else None)
    if prompts.count(None) == len(items) > 0:
        raise BadInput(f"{model}: no prompt of {what} fits: its context of {context} tokens has to "
                       f"hold {limit} new ones, too")
    return prompts


# ================================================================================= Reading
# A benchmark with a row less is another benchmark: in training a bad row may be dropped, here it is
# an error that names the file, the row and what was expected.
def read_rows(source: str, *columns: str) -> list:
    """Raw rows of a file or Hub set, with strings in these columns, numbers as `preference`. What
    reads the file (data_prep.load) has put half surrogates where its bytes are no text."""
    rows = list(data_prep.load(data_prep.parse_source(source), random.Random(0)))
    for i, row in enumerate(rows, 1):
        if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False, default=str)):
            raise BadInput(f"{source}: row {i}: half a surrogate pair, which no tokenizer takes")
        if not all(isinstance(row, dict) and isinstance(row.get(c), str) for c in columns):
            raise BadInput(f"{source}: row {i}: expected strings as {', '.join(columns)}")
        if columns and not isinstance(row.get("preference", 0), (int, float, type(None))):
            raise BadInput(f"{source}: row {i}: preference: expected a number or null")
    if not rows:
        raise BadInput(f"{source}: has no rows")
    return rows


def read_tasks(source: str, kind: str, limit: int) -> list[tuple[dict, dict]]:
    """(raw row, task) of one kind. Rows of our own format and another kind are left out; any other
    row that is of no use is an error: benchmarks have none to spare."""
    found, rows = [], enumerate(read_rows(source), 1)
    rows = [(i, r) for i, r in rows if not isinstance(r, dict) or r.get("kind", kind) == kind]
    for number, row in rows[: limit or None]:
        if isinstance(row, dict) and isinstance(row.get("final_answer"), list):  # OlympiadBench
            row["final_answer"] = ", ".join(map(str, row["final_answer"])).replace("$", "")
        try:
            for task in data_prep.convert(row, strict=False):
                if task["kind"] != kind:
                    raise data_prep.Drop(f"kind {task['kind']}, expected {kind}")
                found.append(({"id": number, **row}, task))
        except data_prep.Drop as reason:
            raise BadInput(f"{source}: row {number}: {reason}"[:300])
    if not found:
        raise BadInput(f"{source}: has no rows of kind {kind}")
    return found


def set_name(source: str) -> str:
    """aime24/test.jsonl is aime24, openai/gsm8k@main#test is gsm8k."""
    path = Path(data_prep.parse_source(source).name)
    name = re.sub(r"\.(jsonl?|parquet)$", "", path.name)
    return path.parent.name if name in ("test", "train") and path.parent.name else name


# ================================================================================= AlpacaEval 2
HUB = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json"  # of gpt4_1106_preview
DRAWS = 1000  # of the bootstrap: its error is known to 2 %


def is_switched(instruction: str) -> bool:
    """Is the judge shown the model first? (processors.py, RandomSwitchTwoColumnsProcessor)"""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]


def preference_from_logprobs(logprobs: dict[str, float], switched: bool) -> float | None:
    """1 (the reference wins) to 2 (the model), from the top log-probs of the judge's one token:
    1 + p_M / (p_m + p_M), where `m` was shown first (completion_parsers.py, logprob_parser). What
    is outside of the top has probability 0; with neither there is no verdict."""
    if not logprobs.keys() & {"m", "M"}:
        return None
    never = -1e9  # a log-prob: as good as probability 0
    lead = logprobs.get("M", never) - logprobs.get("m", never)
    preference = 1.5 + math.tanh(lead / 2) / 2  # the same ratio, and it cannot overflow
    return 3 - preference if switched else preference


def outcome(preference: float | None) -> float:
    """P(the model is preferred), from a preference in [1, 2]; 0 is an old spelling of a draw. None,
    NaN, or out of range (the cache writes -1) was never judged: NaN; it is left out, not lost.

    >>> outcome(1.25), outcome(0), outcome(None)
    (0.25, 0.5, nan)
    """
    if preference == 0:
        return 0.5
    return preference - 1 if preference is not None and 1 <= preference <= 2 else math.nan


def win_rates(annotations: list[dict]) -> tuple[Score, Score, dict[str, int]]:
    """-> win rate, discrete win rate, counts (alpaca_eval metrics/helpers.py, metrics/winrate.py).
    Only an exact 1.5 is a draw; anything else is won by the nearer side."""
    judged, discrete = [], []
    for row in annotations:
        win = outcome(row["preference"])
        if not math.isnan(win):
            judged.append((row["instruction"], win))
            discrete.append((row["instruction"], (1 + (win > 0.5) - (win < 0.5)) / 2))
    count = Counter(win for _, win in discrete)
    return percent(judged), percent(discrete), {
        "n_wins": count[1.0], "n_wins_base": count[0.0], "n_draws": count[0.5],
        "n_total": len(judged), "without a verdict": len(annotations) - len(judged)}


def fit_logistic(X: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The w that minimises sum_i s_i CE(y_i, sigmoid(X_i w)), y in [0, 1], by Newton's method."""
    w = X.new_zeros(X.shape[1])
    for _ in range(50):
        p = torch.sigmoid(X @ w)
        curvature = X.T @ (X * (s * p * (1 - p))[:, None]) + 1e-9 * torch.eye(len(w))
        step = torch.linalg.solve(curvature, X.T @ (s * (y - p))).clamp(-2, 2)  # never far at once
        w = w + step
        if step.abs().max() < 1e-9:
            break
    return w


def length_controlled(rows: Tensor, gamed: Tensor) -> float:
    """Length-controlled win rate in percent, or NaN (alpaca_eval metrics/glm_winrate.py): the
    preference is fitted by sigmoid(w1 tanh(length difference) + w2 difficulty + w3), the score is
    the mean prediction without w1. The official fit has a penalty, chosen by a cross-validation
    that differs between versions of scikit-learn; ours has none, and is quick to repeat.

    rows   [n, 3]: P(model preferred) (NaN: never judged, so predicted but not fitted); characters
           of the reference minus those of the model; difficulty of the instruction
    gamed  [m, 3], df_gamed.csv: the reference's own verbose and concise variants, their lengths in
           standard deviations. At weight 0.1 and without w3 they tie w1 and w2 down."""
    judged = rows[~rows[:, 0].isnan()]
    # equal lengths say nothing about w1, and there is no fit; but draws with oneself are known
    if len(judged) and (judged[:, 0] == 0.5).all() and not rows[:, 1].any():
        return 50.0  # the reference against itself
    if len(judged) == 0 or not rows[:, 1].std() > 0:
        return math.nan
    lengths = judged[:, 1] / rows[:, 1].std()
    own = torch.stack([lengths.tanh(), judged[:, 2], torch.ones_like(lengths)], 1)
    others = torch.stack([gamed[:, 1].tanh(), gamed[:, 2], torch.zeros_like(gamed[:, 0])], 1)
    weights = torch.cat([own[:, 2], torch.full_like(gamed[:, 0], 0.1)])
    w = fit_logistic(torch.cat([own, others]), torch.cat([judged[:, 0], gamed[:, 0]]), weights)
    return 100 * torch.sigmoid(w[1] * rows[:, 2] + w[2]).mean().item()


def length_control(annotations: list[dict], levels: list[float], gamed: Tensor) -> Score:
    """`levels`: difficulties. The error is over DRAWS sets of rows, drawn with replacement, fitted
    anew. Models on the same instructions meet the same draws: their difference is paired."""
    wins = [outcome(row["preference"]) for row in annotations]
    lengths = [len(row["output_1"]) - len(row["output_2"]) for row in annotations]
    rows = torch.tensor([wins, lengths, levels], dtype=torch.float64).T
    n, rng = len(rows), torch.Generator().manual_seed(0)
    draws = []
    for _ in range(DRAWS):
        draws.append(length_controlled(rows[torch.randint(n, [n], generator=rng)], gamed))

    mean, scale = fmean(draws), math.sqrt(DRAWS - 1)
    parts = {f"draw {i}": (draw - mean) / scale for i, draw in enumerate(draws)}
    return Score(length_controlled(rows, gamed), parts, n, "error by bootstrap")


def read_gamed(path: str) -> tuple[Tensor, list[float]]:
    """-> rows of df_gamed.csv [m, 3], difficulties of the instructions in published order."""
    gamed, difficulty, columns = [], {}, ("preference", "std_delta_len", "instruction_difficulty")
    expected = f"{path}: expected a table with numbers as index, {', '.join(columns)}"
    with in_one_line(expected, LookupError, TypeError, csv.Error), open(path, newline="") as file:
        for row in csv.DictReader(file):
            gamed.append([float(row[column]) for column in columns])
            difficulty[row["index"]] = gamed[-1][2]
    return torch.tensor(gamed, dtype=torch.float64), list(difficulty.values())


def duel_prompt(instruction: str, first: str, second: str) -> list[dict]:
    """The official judge prompt (alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt, Apache 2.0)."""
    system = (
        "You are a highly efficient assistant, who evaluates and selects the best large language "
        "model (LLMs) based on the quality of their responses to a given instruction. This process "
        "will be used to create a leaderboard reflecting the most accurate and human-preferred "
        "answers.")
    parts = [
        "I require a leaderboard for various large language models. I'll provide you with prompts "
        "given to these models and their corresponding outputs. Your task is to assess these "
        "responses, and select the model that produces the best output from a human perspective."
        '\n\n## Instruction\n\n{\n    "instruction": """', instruction, '""",\n}\n\n## Model '
        "Outputs\n\nHere are the unordered outputs from the models. Each output is associated with "
        "a specific model, identified by a unique model identifier.\n\n{\n    {\n        "
        '"model_identifier": "m",\n        "output": """', first, '"""\n    },\n    {\n        '
        '"model_identifier": "M",\n        "output": """', second, '"""\n    }\n}\n\n## Task\n\n'
        "Evaluate the models based on the quality and relevance of their outputs, and select the "
        "model that generated the best output. Answer by providing the model identifier of the "
        "best model. We will use your output as the name of the best model, so make sure your "
        "output only contains one of the following model identifiers and nothing else (no quotes, "
        "no spaces, no new lines, ...): m or M.\n\n## Best Model Identifier"]
    return [{"role": "system", "content": system}, {"role": "user", "content": "".join(parts)}]


def alpaca_scores(annotations: list[dict], order: list[str], table, published=False) -> dict:
    """`order`: the instructions of the whole set as published, to which the difficulties belong;
    empty: not known. `table`: of read_gamed, or None. `published`: the judgements are not ours."""
    place = {instruction: i for i, instruction in enumerate(order)}
    places = [place.get(row["instruction"]) for row in annotations]
    if not table:
        controlled = Score(note="needs --gamed df_gamed.csv, on the Hub in tatsu-lab/alpaca_eval")
    elif len(place) != len(table[1]) or None in places:
        controlled = Score(note="needs --reference: the set that --gamed is for, in its order")
    else:
        note = "error by bootstrap"
        if published and places == sorted(set(places)) and places[-1] >= len(places):
            # alpaca_eval takes line i of its table for row i, also where rows before it are
            # missing. The published scores came about so; by instruction they would be others
            places = range(len(places))
            note += "; rows are missing: difficulties by row, as alpaca_eval has them"
        controlled = length_control(annotations, [table[1][i] for i in places], table[0])
        controlled = controlled._replace(note=note)

    win_rate, discrete, _ = win_rates(annotations)
    return {"length-controlled win rate": controlled, "win rate": win_rate,
            "discrete win rate": discrete}


def alpaca(run: Evaluation) -> dict[str, Score]:
    """AlpacaEval 2: win rates against a reference. Read, judge, count."""
    # ---- read: judgements, or answers, or the questions alone
    options, notes, reference = run.options, Counter(), []
    table = read_gamed(options.gamed) if options.gamed else None
    if options.tiny:
        reference = tiny_reference(options)
    elif options.reference or not options.annotations:
        reference = read_rows(options.reference or HUB, "instruction", "output")
    order = list(dict.fromkeys(row["instruction"] for row in reference))
    if options.annotations:
        annotations = read_annotations(options.annotations)[: options.limit or None]
    else:
        # ---- judge
        answers = given_answers if options.outputs else own_answers
        pairs = answers(run, reference[: options.limit or None], notes)
        if not options.judge and not options.tiny:
            return run.finish(f"alpaca{run.trial}", {}, {"answers, not judged": len(pairs)})
        annotations = annotate(run, pairs, notes)

    # ---- count
    annotator = annotations[0]["annotator"]
    scores = alpaca_scores(annotations, order, table, bool(options.annotations))
    note = f"judged by {annotator}"
    if options.judge and identity(options.judge) == identity(options.model):
        note += ", which is the model itself"
    scores["win rate"] = scores["win rate"]._replace(note=note)
    counts = win_rates(annotations)[2]
    counts["avg_length"] = sum(len(row["output_2"]) for row in annotations) // len(annotations)
    return run.finish(f"alpaca{run.trial}/{short_name(annotator)}", scores, counts | +notes)


def read_annotations(file: str) -> list[dict]:
    """Judgements from elsewhere; they hold their reference."""
    rows = read_rows(file, "instruction", "output_1", "output_2")
    missing = {"preference": None, "annotator": "unknown", "generator_2": "unknown"}
    return [missing | row for row in rows]


def given_answers(run: Evaluation, reference: list[dict], notes: Counter) -> list[tuple]:
    """(reference, output) pairs with the same instruction to the letter, as the official tool joins
    them. What finds no other half is counted."""
    outputs = read_rows(run.options.outputs, "instruction", "output")
    of = {row["instruction"]: row for row in reversed(outputs)}  # of two the first counts
    pairs = [(row, of.pop(row["instruction"])) for row in reference if row["instruction"] in of]
    notes["rows of the reference without an output"] = len(reference) - len(pairs)
    notes["outputs that the reference has no row for, to the letter"] = len(of)
    notes["outputs to an instruction that had one before"] = len(outputs) - len(of) - len(pairs)
    if not pairs:
        raise BadInput(f"{run.options.outputs}: no instruction in common with the reference: there "
                       f"{reference[0]['instruction'][:60]!r}, here {[*of][0][:60]!r}")
    return pairs


def own_answers(run: Evaluation, reference: list[dict], notes: Counter) -> list[tuple]:
    """Ask the model -> pairs; its outputs are for `alpaca_eval --model_outputs`, too."""
    options, pairs = run.options, []
    limit, chats = options.max_new_tokens, [data_prep.chat(r["instruction"]) for r in reference]
    prompts = prompts_of(options.model, chats, urpo.encode, limit, "AlpacaEval")
    answers = run.texts("AlpacaEval", options.model, prompts, limit, 1, options.temperature)
    for row, answer in zip(reference, answers):
        if answer:
            output = without_thoughts(answer[0]["text"]).strip()
            own = {"dataset": row.get("dataset", ""), "instruction": row["instruction"]}
            pairs.append((row, own | {"output": output, "generator": options.name}))
    run.write(f"alpaca{run.trial}/model_outputs.json", [output for _, output in pairs])
    notes["not asked: longer than the model's context"] = prompts.count(None)
    return pairs


def annotate(run: Evaluation, pairs: list[tuple[dict, dict]], notes: Counter) -> list[dict]:
    """The verdicts on all pairs, as the official annotations.json has them."""
    judge, annotations = run.options.judge, []
    annotator = f"weighted_alpaca_eval_{short_name(judge)}" if judge else "true_quality"
    folder = f"alpaca{run.trial}/{annotator}"
    run.check_owner(f"{folder}/judge.json", judge)
    verdicts = judge_pairs(run, pairs, notes) if judge else tiny_verdicts(pairs)
    for (one, two), preference in zip(pairs, verdicts, strict=True):
        annotations.append({
            "instruction": one["instruction"], "dataset": one.get("dataset", ""),
            "output_1": one["output"], "generator_1": one.get("generator", "reference"),
            "output_2": two["output"], "generator_2": run.options.name, "preference": preference,
            "annotator": annotator})
    run.write(f"{folder}/judge.json", identity(judge))
    run.write(f"{folder}/annotations.json", annotations)
    return annotations


def judge_pairs(run: Evaluation, pairs: list[tuple[dict, dict]], notes: Counter) -> list:
    """The preferences, judged in the official way: one token, m or M, in the order that is_switched
    draws. Equal outputs are a draw, and not asked about."""
    def make(tokenizer, pair: tuple[dict, dict]) -> list[int]:
        outputs, instruction = [row["output"] for row in pair], pair[0]["instruction"]
        if outputs[0] == outputs[1]:
            return []
        shown = outputs[::-1] if is_switched(instruction) else outputs
        return urpo.encode(tokenizer, duel_prompt(instruction, *shown))

    prompts, preferences = prompts_of(run.options.judge, pairs, make, 1, "the judge"), []
    notes["not judged: longer than the judge's context"] = prompts.count(None)
    for (one, _), ids, top in zip(pairs, prompts, run.duels(run.options.judge, prompts)):
        logprobs = dict(reversed(top or []))  # of two tokens spelled alike the likelier one counts
        preference = preference_from_logprobs(logprobs, is_switched(one["instruction"]))
        preferences.append(1.5 if ids == [] else preference)
    return preferences


# ================================================================================= RewardBench 1, 2
# The model is the judge: of two responses (RewardBench 2: four) it should prefer the right one. A
# judge that likes whatever comes first would have half of the points by luck. So each list is shown
# in a random order and in the reverse of it, and `flip` says how often the verdict went with it.
# rewardbench/constants.py: SUBSET_MAPPING, EXAMPLE_COUNTS. The weights are constants, whatever was
# evaluated; math-prm has 447 pairs, but weighs as much as the six code subsets together.
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
             "mt-bench-easy": 28, "mt-bench-med": 40},
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
    """Sections of RewardBench 1 and their mean, missing where a subset is (the official one,
    calculate_scores_per_section, counts an absent section as 0 and sees no absent subset)."""
    scores, missing = {}, 0
    for section, weights in SECTIONS.items():
        here = {name: weight for name, weight in weights.items() if name in subsets}
        missing += len(weights) - len(here)
        if here:
            shares = [weight / sum(here.values()) for weight in here.values()]
            note = f"{len(here)} of {len(weights)} subsets"
            scores[section] = combined([subsets[name] for name in here], shares, note)
    mean = Score(note=f"{missing} subsets missing") if missing else combined([*scores.values()])
    return scores | {"mean of four sections": mean}


def best_of(scores: list[float | None]) -> float:
    """Credit for a list whose first score is the right response's: 1/k if it is one of the k best.
    None, no valid score, is below all others; nothing but None makes a guess. Of four this is
    RewardBench 2 (utils.reroll_and_score_dataset), of two RewardBench 1 with a judge.

    >>> [best_of(scores) for scores in ([7, 7, 3, 1], [None] * 4, [5, 6, 5, 5])]
    [0.5, 0.25, 0.0]
    """
    numbers = [-math.inf if score is None else score for score in scores]
    return 1 / numbers.count(numbers[0]) if numbers[0] == max(numbers) else 0.0


def ties_score(items: list[dict]) -> Score:
    """Of the subset Ties (rewardbench/utils.py, process_single_model): 60% accuracy, 40% margins.
    items: {"id": "ref:3" or "tied:3", "scores", "num_correct"}, the right ones' scores first. "ref"
    has one, "tied" several, which should differ less from each other than from the wrong ones."""
    # margin: of the worst right response over the best wrong one; spread: among the right ones
    margins, spread = {"ref": {}, "tied": {}}, {}
    for item in items:
        kind, prompt = item["id"].split(":")
        right, wrong = item["scores"][: item["num_correct"]], item["scores"][item["num_correct"] :]
        margins[kind][prompt] = min(right) - max(wrong)
        if kind == "tied":
            spread[prompt] = max(right) - min(right)
    # a prompt of both kinds should be won by more than its right responses differ
    ref, tied = margins["ref"], margins["tied"]
    won, won_by_both, ratio = [], [], []
    for prompt in filter(ref.__contains__, tied):  # with both kinds
        gap, smaller = spread[prompt], min(ref[prompt], tied[prompt])
        won.append((prompt, tied[prompt] > gap))
        won_by_both.append((prompt, smaller > gap))
        limit = (smaller > 0) - (smaller < 0)  # for a gap of 0; 0 for 0/0
        ratio.append((prompt, math.tanh(smaller / gap - 1) if gap else limit))
    if not ratio:
        return Score(note="needs prompts with both kinds, ref and tied")
    right = percent([(prompt, margin > 0) for prompt, margin in tied.items()])
    ref_right = percent([(prompt, margin > 0) for prompt, margin in ref.items()])
    terms = [right, ref_right, percent(won), percent(won_by_both), percent(ratio)]
    score = combined(terms, [0.3, 0.3, 0.2, 0.2, 0.01], "at most 101")
    return score._replace(n=len(tied | ref))


# The judge's form belongs to urpo.py: this and read_verdict are all that is asked of it here.
def judge_prompt(tokenizer, asked: tuple) -> list[int] | None:
    """None where even cut responses do not fit."""
    item, shown, rng, config = asked
    try:
        judge = urpo.judge_prompt(item, item["responses"], shown, tokenizer, rng, config)
    except ValueError:
        return None
    return judge.prompt_ids


def read_lists(options: Namespace) -> tuple[list[dict], int]:
    """-> lists with one best response, and Ties, as {"id", "subset", "prompt", "responses" (right
    ones first), "num_correct", "ties"}; how many others there were."""
    lists, others = [], 0
    for source in options.lists or [HUB_2 if options.v2 else HUB_1]:
        for row, task in read_tasks(source, "preference", options.limit):
            scores, subset = task["scores"], row.get("subset") or set_name(source)
            right, ties = scores.count(max(scores)), options.v2 and subset == "Ties"
            if right > 1 and not ties or right == len(scores):
                others += 1
                continue
            if ties and not re.fullmatch("(ref|tied):[^:]+", str(row["id"])):
                raise BadInput(f"{source}: row {row['id']}: id: expected ref:N or tied:N")
            if len(scores) > urpo.JUDGE.most and not ties:
                raise BadInput(f"{source}: row {row['id']}: more responses than there are letters")
            best_first = sorted(range(len(scores)), key=lambda i: -scores[i])
            responses = [task["responses"][i] for i in best_first]
            lists.append({"id": row["id"], "subset": subset, "prompt": task["prompt"],
                          "responses": responses, "num_correct": right, "ties": ties})
    if not lists:
        raise BadInput("no list has one best response")
    return lists, others


def judge_lists(run: Evaluation, lists: list[dict]):
    """Add `verdicts` to each list: scores of its responses in their own order, or None; one for a
    random order of showing them, one for the reverse. Of Ties each response is shown alone. What
    does not fit adds nothing."""
    config, model, asked = run.config, run.options.model, []
    limit, (_, context) = config.judge_max_new_tokens, urpo.load_tokenizer(model)
    config.judge_prompt_tokens = min(config.judge_prompt_tokens, context - limit)
    for k, item in enumerate(lists):
        rng, everyone = random.Random(f"{run.options.seed}/{k}"), range(len(item["responses"]))
        order = rng.sample(everyone, len(everyone))
        item |= {"verdicts": [], "critiques": []}
        for shown in [[i] for i in everyone] if item["ties"] else [order, order[::-1]]:
            asked.append((item, shown, rng, config))
    prompts = prompts_of(model, asked, judge_prompt, limit, "RewardBench")
    answers = run.texts("RewardBench", model, prompts, limit)
    for (item, shown, *_), answer in zip(asked, answers, strict=True):
        if answer:
            scores = read_verdict(answer[0]["text"], len(shown))
            in_order = [score for _, score in sorted(zip(shown, scores))] if scores else None
            item["verdicts"].append(in_order)
            item["critiques"].append(answer[0]["text"])


def winners(verdict: list[float]) -> set[int]:
    """Which responses have the best score: one of them, or several that are tied.

    >>> winners([3, 9, 9])
    {1, 2}
    """
    return {i for i, score in enumerate(verdict) if score == max(verdict)}


def credit(item: dict) -> dict:
    """What two orders of a list earn. `score`: official credit. `strict`: a tie or no verdict is
    wrong. `flip`: the orders have no best response in common. `parsed`: share of verdicts.

    >>> credit({"verdicts": [[9, 2], [5, 5]], "responses": ["good", "bad"], "ties": False})
    {'score': 0.75, 'strict': 0.5, 'flip': 0.0, 'parsed': 1.0}
    """
    verdicts, size = item["verdicts"], len(item["responses"])
    best = [winners(verdict) for verdict in verdicts if verdict]
    parsed = len(best) / len(verdicts)
    if item["ties"]:  # scored as a whole, by ties_score
        return {"scores": [v[0] if v else -1.0 for v in verdicts], "parsed": parsed}
    score = fmean(best_of(verdict or [None] * size) for verdict in verdicts)
    strict = best.count({0}) / len(verdicts)
    flip = float(best[0].isdisjoint(best[1])) if len(best) == 2 else None
    return {"score": score, "strict": strict, "flip": flip, "parsed": parsed}


def rewardbench(run: Evaluation) -> dict[str, Score]:
    """RewardBench: does the model as the judge prefer the right response?"""
    options, by_subset, records = run.options, {}, []
    lists, others = read_lists(options)
    judge_lists(run, lists)
    for item in lists:
        if len(item["verdicts"]) == (len(item["responses"]) if item["ties"] else 2):
            records.append(item | credit(item))
            by_subset.setdefault(item["subset"], []).append(records[-1])

    def mean(name: str, part: list[dict]) -> Score:
        return percent([(json.dumps(record["prompt"]), record.get(name)) for record in part])

    subsets = {}
    for name, part in by_subset.items():
        subsets[name] = ties_score(part) if part[0]["ties"] else mean("score", part)
    scores = {f"subset {name}": score for name, score in subsets.items()}
    if options.v2:
        scores["mean of six subsets"] = combined([subsets.get(n, Score()) for n in SUBSETS_2])
    else:
        scores |= rewardbench_sections(subsets)
    for rate in ("score", "strict", "flip", "parsed"):
        scores[f"all lists, {rate}"] = mean(rate, records)

    folder = ("rewardbench2" if options.v2 else "rewardbench") + run.trial
    run.write(f"{folder}/samples.json", records)
    # the official tables want ORG/MODEL.json; a model of the Hub has its ORG already
    model = f"local/{options.name}" if Path(options.model).exists() else options.model
    official = {name: s.value / 100 for name, s in subsets.items() if not math.isnan(s.value)}
    official |= {"model": model, "model_type": "Generative RM", "chat_template": None}
    run.write(f"{folder}/eval-set/{model}.json", official)
    notes = Counter({"lists without one best response, left out": others})
    notes["lists not asked: longer than the context"] = len(lists) - len(records)
    return run.finish(folder, scores, +notes)


# ================================================================================= Reasoning
# A composite is the plain mean over suites, as most papers have it: the 30 problems of AIME weigh
# as much as the 500 of MATH-500, and its error is mostly theirs. Hence many samples of small ones.
# What most papers average. AIME and AMC23 are small: --samples 1 aime_2024=32@0.6 amc23=32@0.6
SUITES = ["openai/gsm8k@main#test", "HuggingFaceH4/MATH-500#test", "HuggingFaceH4/aime_2024",
          "math-ai/amc23#test", "math-ai/minervamath#test",
          "Hothan/OlympiadBench@OE_TO_maths_en_COMP"]


def split_answers(text: str) -> list[str]:
    """At the commas that stand in no bracket, and not in 1,250.

    >>> split_answers("(1,8), 2, 1,250")
    ['(1,8)', '2', '1250']
    """
    parts, depth = [""], 0
    for character in re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def check_answer(verify, completion: str, answer: str) -> float:
    """1 if the final answer is right, else 0. Of a list each must come once, in any order."""
    golds, claims = split_answers(answer), split_answers(data_prep.final_answer(completion))
    if verify(completion, answer) or len(golds) == 1 or len(golds) != len(claims):
        return float(verify(completion, answer))
    for gold in golds:
        right = [claim for claim in claims if verify(f"\\boxed{{{claim}}}", gold)]
        if not right:
            return 0.0
        claims.remove(right[0])
    return 1.0


def read_suites(options: Namespace) -> dict[str, tuple[list, int, float]]:
    """Suite -> (row, task) pairs, samples of each problem, their temperature (--samples)."""
    suites = {}
    for source in options.problems or SUITES:
        name = set_name(source)
        if name in suites:
            raise BadInput(f"{source}: another set is called {name} too")
        suites[name] = read_tasks(source, "verifiable", options.limit), 1, 0.0
    for word in sorted(options.samples, key=lambda word: "=" in word):  # one suite's counts last
        match = re.fullmatch(r"(?:(.+)=)?([1-9]\d*)(?:@(\d*\.?\d+))?", word)
        n, temperature = (int(match[2]), float(match[3] or 0)) if match else (0, 0.0)
        if not n or n > 1 and not temperature or match[1] and match[1] not in suites:
            raise BadInput(f"--samples {word}: expected 1, N@TEMPERATURE or SUITE=N@TEMPERATURE, a "
                           f"suite of {', '.join(suites)}"[:300])
        for name in [match[1]] if match[1] else suites:
            suites[name] = suites[name][0], n, temperature
    return suites


def reasoning(run: Evaluation) -> dict[str, Score]:
    """Reasoning: share of problems with the right answer."""
    def make(tokenizer, pair: tuple[dict, dict]) -> list[int]:
        return urpo.verifiable_group(pair[1], tokenizer, None, run.config).prompt_ids

    options, scores, averages, records = run.options, {}, [], []
    limit, verify = options.max_new_tokens, data_prep.VERIFIERS[options.verifier]
    for name, (rows, n, temperature) in read_suites(options).items():
        prompts = prompts_of(options.model, rows, make, limit, name)
        answers = run.texts(name, options.model, prompts, limit, n, temperature)
        shares, solved, short = [], [], 0
        for (row, task), of_problem in zip(rows, answers, strict=True):
            texts = [answer["text"] for answer in of_problem or []]
            correct = [check_answer(verify, without_thoughts(t), task["answer"]) for t in texts]
            if of_problem:
                # over problems: samples of one share its luck, to pool them flatters the error
                prompt = f"{name} {json.dumps(task['prompt'])}"
                shares.append((prompt, fmean(correct)))
                solved.append((prompt, max(correct)))
                short += sum(answer["truncated"] for answer in of_problem)
            records.append({"suite": name, "id": row["id"], "prompt": task["prompt"],
                            "answer": task["answer"], "correct": correct, "texts": texts})
        note = f"temperature {temperature}; {short} of {n * len(shares)} answers cut short"
        if None in prompts:
            note += f"; {prompts.count(None)} not asked: longer than the context"
        averages.append(percent(shares, note))
        scores[f"{name} avg@{n}"] = averages[-1]
        if n > 1:  # at least one of n is right
            scores[f"{name} pass@{n}"] = percent(solved)
    scores["composite"] = combined(averages, note=f"unweighted mean of {len(averages)} suites")
    run.write(f"reasoning{run.trial}/samples.json", records)
    return run.finish(f"reasoning{run.trial}", scores, {"is the verifier": options.verifier})


# ================================================================================= All models
def tiny_world(options: Namespace, ranks: urpo.Ranks):
    """What `all` is about if no model is named: the newest tiny run, else its start."""
    preset = urpo.PRESETS["tiny"]
    runs = sorted(Path("runs").glob("tiny-*/final/config.json"), key=os.path.getmtime)
    options.model = [str(runs[-1].parent) if runs else preset["model"]]
    options.lists = options.problems = [preset["eval_data"]]
    for flag in ("verifier", "max_new_tokens", "judge_max_new_tokens"):
        if flag not in options.given:
            setattr(options, flag, preset.get(flag, "plain"))


def tiny_reference(options: Namespace) -> list[dict]:
    """What the model is compared with: the first response of every held-out judge list."""
    rows = []
    for _, task in read_tasks(options.lists[0], "preference", 0):
        rows.append({"instruction": task["prompt"][-1]["content"], "output": task["responses"][0],
                     "generator": "stored responses"})
    return rows


def tiny_verdicts(pairs: list[tuple[dict, dict]]) -> list[float]:
    """Like judge_pairs; the judge is the true quality, which this world knows."""
    preferences = []
    quality = data_prep.TRUE_QUALITY["tiny"]
    for one, two in pairs:
        ours, theirs = [quality(one["instruction"], row["output"]) for row in (two, one)]
        preferences.append(1.5 + ((ours > theirs) - (ours < theirs)) / 2)
    return preferences


def named_runs(options: Namespace, ranks: urpo.Ranks) -> list[Evaluation]:
    """One for each model. What comes from elsewhere is called as it says, or like its folder. Two
    of one name would write into one folder."""
    models, files = options.model or [""], options.annotations or [""]
    called = models if options.model else [str(Path(options.outputs).resolve().parent)]
    if options.annotations:
        called = [str(read_annotations(file)[0]["generator_2"]) for file in files]
    names = options.name or list(map(short_name, called))
    if len(names) != len(called) or len(set(names)) < len(names):
        raise BadInput(f"{len(called)} models called {', '.join(names)}: a --name for each"[:300])
    # of models and files one list has a single "", which stands beside each of the other
    given = zip(names, models * len(files), files * len(models))
    return [Evaluation(options, ranks, *of_model) for of_model in given]


def add_differences(columns: dict[str, dict[str, Score]]):
    """Behind the models' columns those of what the others have more than the first. Their errors
    are paired: they come from the same prompts (or draws), part by part."""
    [first, old], *others = columns.items()
    for name, new in others:
        column = columns[f"{name} - {first}"] = {}
        for score in old:
            a, b = old[score], new.get(score, Score())
            note = "" if a.n == b.n else f"{b.n} rows against {a.n}"
            column[score] = combined([b, a], [1, -1], note)._replace(n=min(a.n, b.n))


def print_scores(title: str, columns: dict[str, dict[str, Score]]):
    """A table of all models and their differences; what is to be noted stands below."""
    rows = []
    for score in next(iter(columns.values())):
        found = [column[score] for column in columns.values()]
        rows.append([score, *found, "/".join({str(of_model.n): 0 for of_model in found})])
    print("\nPercent ± standard error over prompts; of a difference over the same ones, paired")
    print_table([title, *columns, "n"], rows)
    for name, column in columns.items():
        for score, of_model in column.items():
            if of_model.note:
                print(textwrap.fill(f"{name}, {score}: {of_model.note}", WIDTH))


def evaluate(options: Namespace):
    """All three. Of several models every score of the others minus that of the first is shown."""
    check_options(options)
    transformers.utils.logging.disable_progress_bar()
    ranks = urpo.Ranks(urpo.Config(device=options.device))
    if options.tiny:
        tiny_world(options, ranks)
    commands = [options.command]
    if options.command == "all":
        commands = ["alpaca", "rewardbench", "reasoning"]
    runs, columns = named_runs(options, ranks), {command: {} for command in commands}
    # First with empty answers: what is wrong (a row, a template, a context that is too short) is
    # said before a model is asked for hours
    for rehearsal in [True, False] if options.model or options.judge else [False]:
        for run in runs:
            run.rehearsal = rehearsal
            for command in commands:
                columns[command][run.options.name] = COMMANDS[command](run)
            run.drop_model()  # the next one may need its memory

    records = {}
    for command in commands:
        add_differences(columns[command])
        for name, column in columns[command].items():
            for score, value in column.items():
                records.setdefault(name, {})[f"{command}: {score}"] = value.record()
        if ranks.main and any(columns[command].values()):  # else nobody has judged the answers
            print_scores(command + runs[0].trial, columns[command])
    if records:
        names = cut("+".join(run.options.name for run in runs), 120)
        by = f"-by-{short_name(options.judge)}" if options.judge else ""
        runs[0].write(f"../{options.command}-{names}{by}{runs[0].trial}.json", records)


# ================================================================================= Main
COMMANDS = {"alpaca": alpaca, "rewardbench": rewardbench, "reasoning": reasoning, "all": evaluate,
            "curves": curves, "samples": samples}
ASKING, JUDGE = "alpaca rewardbench reasoning all", "rewardbench all"
FLAGS = [  # (commands, flag, default, help); a list takes several values
    (ASKING, "model", [], "model folders or Hub names; several are compared with the first"),
    (ASKING, "name", [], "what the models are called; their folders or runs"),
    (ASKING, "out_dir", "evals", "folder of all results"),
    (ASKING, "limit", 0, "a trial on the first N of each set; 0: all of them"),
    (ASKING, "seed", 0, "of samples, and of the order in which responses are shown"),
    (ASKING, "device", "", "cpu, cuda or cuda:N; cuda where there is one"),
    (ASKING, "stop_tokens", "", "further stop tokens, comma-separated (base model, chat template)"),
    (ASKING, "rollout_tokens", 131072, "tokens in a batch of model.generate: bounds the KV cache"),
    ("alpaca reasoning all", "max_new_tokens", 2048, "longest answer, tokens"),
    ("alpaca all", "temperature", 0.0, "of answers to AlpacaEval; 0: greedy"),
    ("alpaca all", "reference", "", "outputs to compare with; gpt4_1106_preview's on the Hub"),
    ("alpaca all", "judge", "", "a local model; none: answers are written, not judged"),
    ("alpaca", "outputs", "", "answers to judge, like model_outputs.json"),
    ("alpaca", "annotations", [], "judgements to count, like annotations.json, of each model"),
    ("alpaca all", "gamed", "", "df_gamed.csv, for length control; the Hub's"),
    (JUDGE, "lists", [], "files or Hub sets; RewardBench on the Hub"),
    (JUDGE, "v2", False, "RewardBench 2: best of four, and Ties"),
    (JUDGE, "judge_max_new_tokens", 1024, "longest judgement, tokens"),
    ("reasoning all", "problems", [], "files or Hub sets; six suites on the Hub"),
    ("reasoning all", "samples", ["1"], "of a problem: N@TEMPERATURE, SUITE=N@TEMPERATURE"),
    ("reasoning all", "verifier", "math_verify", "math_verify (the package) or plain"),
    ("curves samples", "out", "", "file to write; curves.png, samples.html in the run's folder"),
    ("curves", "all_panels", False, "draw every panel, not the first three alone"),
    ("samples", "steps", [], "only these steps"),
]


def parse(arguments: list[str] | None) -> Namespace:
    """What is given (`given`: the flags) over the defaults. A command refuses others' flags."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("eval.py", None, __doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, allow_abbrev=False)
        if name in ("curves", "samples"):
            command.add_argument("run", nargs="+" if name == "curves" else None, help="run folder")
        for of_commands, flag, default, text in FLAGS:
            if name in of_commands.split():
                how = {"type": type(default)}
                if isinstance(default, list):
                    how = {"type": int if flag == "steps" else str, "nargs": "+"}
                elif default is False:
                    how = {"action": "store_true"}
                text += f" (default {default})" if default else ""
                command.add_argument(f"--{flag}", default=None, help=text, **how)
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    return Namespace(**{flag: value for _, flag, value, _ in FLAGS} | given, given=list(given))


def refuse(options: Namespace, flags: str, why: str):
    """BadInput for the first of these flags that is given."""
    for flag in flags.split():
        if flag in options.given:
            raise BadInput(f"--{flag} has no effect: {why}")


def check_options(options: Namespace):
    """BadInput for what the parser cannot know, before a file is read or a folder is made."""
    command, player = options.command, "model max_new_tokens temperature stop_tokens seed"
    options.tiny = command == "all" and not options.model
    if options.annotations:
        refuse(options, f"{player} judge outputs rollout_tokens", "--annotations are judged")
    if options.outputs:
        refuse(options, player, "--outputs are answers")
    if options.tiny:
        refuse(options, "reference judge gamed lists problems v2", "no --model: the tiny world")
    if not options.judge and not options.annotations:
        refuse(options, "gamed", "there is no --judge")
    if command == "alpaca" and not options.temperature:
        refuse(options, "seed", "--temperature is 0")

    for _, flag, default, _ in FLAGS:
        if isinstance(default, (int, float)) and not getattr(options, flag) >= min(1, default):
            raise BadInput(f"--{flag}: expected at least {min(1, default)}")
    if not (options.model or options.tiny or options.outputs or options.annotations):
        raise BadInput("--model is missing")
    if options.outputs and not options.judge:
        raise BadInput("--outputs needs a --judge")
    if options.verifier not in data_prep.VERIFIERS:
        raise BadInput("--verifier: math_verify or plain")
    needed = options.verifier == "math_verify" and command in ("reasoning", "all")
    if needed and not options.tiny and not importlib.util.find_spec("math_verify"):
        raise BadInput("--verifier math_verify: pip install math-verify (or --verifier plain)")


def main(arguments: list[str] | None = None):
    options = parse(arguments)
    try:
        {"curves": curves, "samples": samples}.get(options.command, evaluate)(options)
    except KeyboardInterrupt:
        print("\nstopped; answers are kept: the same command goes on", file=sys.stderr)
        raise SystemExit(130)
    except OSError as error:  # a full disk, a folder that cannot be written to: it names it
        raise BadInput(str(error)[:300])
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 has no ±
    main()
