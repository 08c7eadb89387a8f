"""The paper's three scores, counted as the official evaluators do; curves and samples of runs.

    python eval.py alpaca      --model M --judge J         AlpacaEval 2: win rates
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
import gc
import hashlib
import html
import json
import math
import os
import random
import re
import sys
import textwrap
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm.auto import tqdm

import data_prep
import urpo
from data_prep import LABELS, BadInput, in_one_line, without_thoughts

WIDTH = 100  # columns of what is printed: a terminal beside an editor


# ================================================================================= Scores
# Every number that is printed has its error and its n beside it. Two models answer the same
# prompts, and a hard prompt is hard for both: an error of their difference that took them for
# independent would be far too large. So a score remembers what each prompt adds to its deviation.
@dataclass(frozen=True)
class Score:
    """A score in percent (NaN: missing). The squares of its `parts` add up to its squared error:
    there is one for each independent unit, a prompt or a bootstrap draw. Sums and differences are
    taken part by part, so what models share on a prompt cancels: a difference is a paired one."""
    value: float = math.nan
    parts: dict[str, float] = field(default_factory=dict)
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

    def __init__(self, options: Namespace, ranks: urpo.Ranks, name: str, model: str):
        self.options, self.ranks = options, ranks
        self.name, self.model = name, model  # of --outputs, --annotations it is the file
        self.home = Path(options.out_dir) / name
        self.trial = f"-limit{options.limit}" if options.limit else ""
        self.rehearsal = False  # what is wrong is found, nothing is asked or written
        self.loaded, self.actor = "", None  # the model or the judge, whichever is in memory
        shared = "device", "rollout_tokens", "max_new_tokens", "judge_max_new_tokens"
        self.config = urpo.Config(**{k: v for k, v in vars(options).items() if k in shared})
        self.check_owner("model.json", model)

    def check_owner(self, path: str, model: str):
        """BadInput if this file says that the folder it is in belongs to another model."""
        owner = self.home / path
        if owner.exists() and owner.read_text() != json.dumps(identity(model)):
            raise BadInput(f"{owner.parent} is of another model: give a --name or --out_dir")

    def texts(self, what: str, items: list, make, limit: int, temperature=0.0, n=1) -> list:
        """For each item n answers of the model to its prompt, `make(tokenizer, item)`: {"text",
        "truncated"}. None for an item whose prompt does not fit the context."""
        def answer(actor: urpo.Actor, asked: list[list[int]]) -> list:
            groups = urpo.sample(actor.model, asked, n, [limit] * len(asked), temperature,
                                 actor.stop_ids, self.options.rollout_tokens)
            return [spoken(actor, *group) for group in zip(asked, groups)]

        prompts = prompts_of(self.model, items, make, limit, what)
        if self.rehearsal:  # empty answers: enough to see whether what follows would fit
            return [[{"text": "", "truncated": False}] * n] * len(items)
        decides = ["text", identity(self.model), limit, n, self.options.stop_tokens, temperature]
        decides += [self.options.seed] if temperature else []
        return self.ask(what, self.model, prompts, decides, max(1, CHUNK // n), answer)

    def ask(self, what: str, model: str, prompts: list, decides: list, size: int, answer) -> list:
        """For each prompt what `answer(actor, prompts)` says of it: it stands in a file already, or
        it is asked for now, in chunks of `size` prompts. `decides` is all that an answer depends
        on besides the prompts of its chunk. None for None, a prompt that does not fit."""
        if self.rehearsal:
            return [None] * len(prompts)

        places = [i for i, ids in enumerate(prompts) if ids is not None]
        places.sort(key=lambda i: len(prompts[i]))  # alike: little padding
        chunks = {}  # file -> the prompts that are asked together, by their places
        for start in range(0, len(places), size):
            chunk = {i: prompts[i] for i in places[start : start + size]}
            question = json.dumps([decides, start, *chunk.values()])  # start: twins are two chunks
            chunks[f"answers/{digest(question)}.json"] = chunk

        # every rank sees the same files, and takes every world-th of the missing ones
        missing = [file for file in chunks if not (self.home / file).exists()]
        self.ranks.gather(None)  # all have looked
        if missing:
            self.write("model.json", identity(self.model))
            self.hold(model)
            mine = missing[self.ranks.rank :: self.ranks.world]
            with self.ranks.unsharded(self.actor.model):
                for file in tqdm(mine, what, disable=not self.ranks.main):
                    torch.manual_seed(int(digest(file), 16) % 2**63)  # --seed is in the name
                    self.write(file, answer(self.actor, [*chunks[file].values()]))
        self.ranks.gather(None)  # all have written

        answers = [None] * len(prompts)
        for file, chunk in chunks.items():
            with in_one_line(f"{self.home / file}: damaged; without it we ask again", TypeError):
                kept = json.loads((self.home / file).read_bytes())
                for place, found in zip(chunk, kept, strict=True):
                    answers[place] = found
        return answers

    def hold(self, model: str):
        """Have this model in memory, be it the own one or its judge, and no other. "" frees it."""
        if self.loaded != model:
            self.loaded, self.actor = model, None
            gc.collect()  # a sharded model refers to itself: not named any more, it would stay
        if model and not self.actor:
            # --stop_tokens are the model's: its judge may have another tokenizer
            self.config.stop_tokens = self.options.stop_tokens if model == self.model else ""
            self.actor = urpo.load_actor(model, self.config, self.ranks, False)

    def write(self, name: str, value):
        """Whole or not at all; by rank 0, but for answers, of which every rank has its own."""
        if (self.ranks.main or name.startswith("answers/")) and not self.rehearsal:
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # The same command may run twice at once: each process has a draft of its own.
            draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            draft.write_text(json.dumps(value, indent=1, allow_nan=False, default=Score.record))
            draft.replace(path)

    def finish(self, folder: str, scores: dict[str, Score], notes: dict) -> dict[str, Score]:
        """Write results.json, say where and what is to be noted -> the scores."""
        settings = vars(self.options) | {"name": self.name, "model": self.model}
        results = {"scores": scores, "notes": notes, "settings": settings}
        self.write(f"{folder}/results.json", results)
        if self.ranks.main and not self.rehearsal:
            said = [f"{value} {name}" for name, value in notes.items()]
            said += [f"{name}: {score.note}" for name, score in scores.items() if score.note]
            text = f"{self.home / folder}: {'; '.join(said)}"
            print(textwrap.fill(text, WIDTH, break_on_hyphens=False), flush=True)
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
    """The prompt `make(tokenizer, item)` of each item, None where there is none or with `limit`
    more tokens it exceeds the model's context. BadInput if none is left (there would be no score),
    or if the chat template refuses one: some want no system message, some turns that alternate."""
    tokenizer, context = urpo.load_tokenizer(model)
    prompts = []
    for number, item in enumerate(items, 1):
        # Where the bytes of a file are no text stands half a surrogate pair: no tokenizer takes it
        with in_one_line(f"{model} refuses row {number} of {what}", TemplateError, TypeError):
            ids = make(tokenizer, item)
        prompts.append(ids if ids is not None and len(ids) + limit <= context else None)
    if prompts.count(None) == len(items) > 0:
        raise BadInput(f"{model}: no prompt of {what} fits {context} tokens with {limit} new ones")
    return prompts


# ================================================================================= Reading
# A benchmark with a row less is another benchmark: in training a bad row may be dropped, here it is
# an error that names the file, the row and what was expected.
def read_rows(source: str, *columns: str) -> list:
    """The raw rows of a file or of a set on the Hub. BadInput where one of these columns holds no
    string, or where `preference` holds no number."""
    rows = list(data_prep.load(data_prep.parse_source(source), random.Random(0)))
    for i, row in enumerate(rows, 1):
        good = all(isinstance(row, dict) and isinstance(row.get(c), str) for c in columns)
        if columns and not (good and isinstance(row.get("preference"), (int, float, type(None)))):
            expected = f"strings as {', '.join(columns)}, a number or null as preference"
            raise BadInput(f"{source}: row {i}: expected {expected}")
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
DUEL = Path(__file__).parent / "assets/alpaca_eval_clf.txt"
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


def length_control(annotations: list[dict], levels: list[float], gamed: Tensor, note="") -> Score:
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
    return Score(length_controlled(rows, gamed), parts, n, note)


def read_gamed(path: str) -> tuple[Tensor, list[float]]:
    """-> rows of df_gamed.csv [m, 3], difficulties of the instructions in published order."""
    gamed, difficulty, columns = [], {}, ("preference", "std_delta_len", "instruction_difficulty")
    expected = f"{path}: expected a table with numbers as index, {', '.join(columns)}"
    with in_one_line(expected, LookupError, TypeError):
        for row in read_rows(path):
            gamed.append([float(row[column]) for column in columns])
            difficulty[row["index"]] = gamed[-1][2]
    return torch.tensor(gamed, dtype=torch.float64), list(difficulty.values())


def duel_prompt(instruction: str, first: str, second: str) -> list[dict]:
    """The official judge prompt as chat messages. Its text is alpaca_eval's (Apache 2.0), from
    alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt: turns between tags, with places to fill."""
    texts = {"instruction": instruction, "output_1": first, "output_2": second}
    messages = []
    for role, turn in re.findall(r"<.im_start.>(\w+)\n(.*?)\n<.im_end.>", DUEL.read_text(), re.S):
        # all places at once: what looks like one in the texts themselves stays as it is
        content = re.sub("{(instruction|output_1|output_2)}", lambda match: texts[match[1]], turn)
        messages.append({"role": role, "content": content})
    return messages


def length_controlled_score(annotations: list[dict], order: list[str], table, published) -> Score:
    """`order`: the instructions of the whole set as published, to which the difficulties belong;
    empty: not known. `table`: of read_gamed, or None. `published`: the judgements are not ours."""
    place = {instruction: i for i, instruction in enumerate(order)}
    places = [place.get(row["instruction"]) for row in annotations]
    if not table:
        return Score(note="needs --gamed df_gamed.csv, on the Hub in tatsu-lab/alpaca_eval")
    if len(place) != len(table[1]) or None in places:
        return Score(note="needs --reference: the set that --gamed is for, in its order")
    note = "error by bootstrap"
    if published and places == sorted(set(places)) and places[-1] >= len(places):
        # alpaca_eval takes line i of its table for row i, also where rows before it are missing.
        # The published scores came about so; by instruction they would be others.
        places = range(len(places))
        note += "; rows are missing: difficulties by row, as alpaca_eval has them"
    return length_control(annotations, [table[1][i] for i in places], table[0], note)


def alpaca(run: Evaluation) -> dict[str, Score]:
    """AlpacaEval 2: win rates against a reference. Read, judge, count."""
    # ---- read: judgements, or the questions and what answers are compared with
    options, notes, reference = run.options, Counter(), []
    table = read_gamed(options.gamed) if options.gamed else None
    if options.reference or not options.annotations:
        reference = read_rows(options.reference or HUB, "instruction", "output")
    order = list(dict.fromkeys(row["instruction"] for row in reference))

    # ---- judge
    if options.annotations:
        annotations = read_annotations(run.model)[: options.limit or None]
    else:
        annotations = answer_all(run, reference[: options.limit or None], notes)
        if not options.judge:
            return run.finish(f"alpaca{run.trial}", {}, {"answers, not judged": len(annotations)})
        judge_all(run, annotations, notes)

    # ---- count
    annotator = annotations[0]["annotator"]
    judged_by = f"judged by {annotator}"
    if options.judge and identity(options.judge) == identity(run.model):
        judged_by += ", which is the model itself"
    win_rate, discrete, counts = win_rates(annotations)
    controlled = length_controlled_score(annotations, order, table, bool(options.annotations))
    scores = {
        "length-controlled win rate": controlled,
        "win rate": replace(win_rate, note=judged_by),
        "discrete win rate": discrete}
    counts["avg_length"] = sum(len(row["output_2"]) for row in annotations) // len(annotations)
    return run.finish(f"alpaca{run.trial}/{short_name(annotator)}", scores, counts | +notes)


def read_annotations(file: str) -> list[dict]:
    """Judgements from elsewhere; they hold their reference."""
    missing = {"preference": None, "annotator": "unknown", "generator_2": "unknown"}
    return [missing | row for row in read_rows(file, "instruction", "output_1", "output_2")]


def answer_all(run: Evaluation, reference: list[dict], notes: Counter) -> list[dict]:
    """Answers to the instructions -> rows of the official annotations.json, but for the verdict.
    They are written for `alpaca_eval --model_outputs`, too."""
    outputs = given_outputs if run.options.outputs else own_outputs
    rows, official = [], []
    for row, output in zip(reference, outputs(run, reference, notes), strict=True):
        if output is not None:
            asked = {"dataset": row.get("dataset", ""), "instruction": row["instruction"]}
            official.append(asked | {"output": output, "generator": run.name})
            rows.append(asked | {
                "output_1": row["output"], "generator_1": row.get("generator", "reference"),
                "output_2": output, "generator_2": run.name})
    run.write(f"alpaca{run.trial}/model_outputs.json", official)
    return rows


def own_outputs(run: Evaluation, reference: list[dict], notes: Counter) -> list[str | None]:
    """What the model answers; None where the prompt does not fit."""
    chats = [data_prep.chat(row["instruction"]) for row in reference]
    limit, temperature = run.options.max_new_tokens, run.options.temperature
    answers = run.texts("AlpacaEval", chats, urpo.encode, limit, temperature)
    notes["not asked: longer than the model's context"] = answers.count(None)
    return [without_thoughts(found[0]["text"]).strip() if found else None for found in answers]


def given_outputs(run: Evaluation, reference: list[dict], notes: Counter) -> list[str | None]:
    """--outputs, answers from elsewhere: they belong to the instruction that is the same to the
    letter, as alpaca_eval joins them. What finds no other half is counted."""
    rows = read_rows(run.model, "instruction", "output")
    output = {row["instruction"]: row["output"] for row in reversed(rows)}  # the first one counts
    outputs = [output.get(row["instruction"]) for row in reference]
    joined = len(outputs) - outputs.count(None)
    if not joined:
        raise BadInput(f"{run.model}: no instruction in common with the reference")
    notes["rows of the reference without an output"] = outputs.count(None)
    notes["outputs that the reference has no row for, to the letter"] = len(output) - joined
    notes["outputs to an instruction that had one before"] = len(rows) - len(output)
    return outputs


def judge_all(run: Evaluation, rows: list[dict], notes: Counter):
    """Add `annotator` and `preference` to the rows, judged in the official way: one token, m or M,
    in the order that is_switched draws. Equal outputs are a draw, and not asked about."""
    def make(tokenizer, row: dict) -> list[int]:
        shown = [row["output_1"], row["output_2"]]
        if is_switched(row["instruction"]):
            shown.reverse()
        return urpo.encode(tokenizer, duel_prompt(row["instruction"], *shown))

    judge = run.options.judge
    annotator = f"weighted_alpaca_eval_{short_name(judge)}"
    folder = f"alpaca{run.trial}/{annotator}"
    run.check_owner(f"{folder}/judge.json", judge)
    for row in rows:
        row.update(preference=1.5, annotator=annotator)  # a draw, if the outputs are equal
    asked = [row for row in rows if row["output_1"] != row["output_2"]]
    prompts = prompts_of(judge, asked, make, 1, "the judge")
    tops = run.ask("duels", judge, prompts, ["duel", identity(judge)], CHUNK, likeliest_tokens)
    for row, top in zip(asked, tops):
        notes["not judged: longer than the judge's context"] += top is None
        logprobs = dict(reversed(top or []))  # of two tokens spelled alike the likelier one counts
        row["preference"] = preference_from_logprobs(logprobs, is_switched(row["instruction"]))
    run.write(f"{folder}/judge.json", identity(judge))
    run.write(f"{folder}/annotations.json", rows)


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
    return replace(score, n=len(tied | ref))


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
    return lists, others


def judge_lists(run: Evaluation, lists: list[dict]) -> list[dict]:
    """-> those lists of which all orders fit the context, each with its `verdicts`: scores of its
    responses in their own order, or None; one for a random order of showing them, one for the
    reverse. Of Ties each response is shown alone. And with what `credit` says."""
    def make(tokenizer, question: tuple) -> list[int] | None:
        item, shown, rng = question
        try:
            judge = urpo.judge_prompt(item, item["responses"], shown, tokenizer, rng, config)
            return judge.prompt_ids
        except ValueError:  # even cut responses do not fit
            return None

    config, asked = run.config, []
    limit, (_, context) = config.judge_max_new_tokens, urpo.load_tokenizer(run.model)
    config.judge_prompt_tokens = min(config.judge_prompt_tokens, context - limit)
    for k, item in enumerate(lists):
        rng, everyone = random.Random(f"{run.options.seed}/{k}"), range(len(item["responses"]))
        order = rng.sample(everyone, len(everyone))
        orders = [[i] for i in everyone] if item["ties"] else [order, order[::-1]]
        item |= {"orders": orders, "verdicts": [], "critiques": []}
        asked += [(item, shown, rng) for shown in orders]
    answers = run.texts("RewardBench", asked, make, limit)
    for (item, shown, _), answer in zip(asked, answers, strict=True):
        if answer:
            scores = urpo.JUDGE.parse(answer[0]["text"], len(shown))
            in_order = [score for _, score in sorted(zip(shown, scores))] if scores else None
            item["verdicts"].append(in_order)
            item["critiques"].append(answer[0]["text"])
    complete = [item for item in lists if len(item["verdicts"]) == len(item["orders"])]
    return [item | credit(item) for item in complete]


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
    options, by_subset = run.options, {}
    lists, others = read_lists(options)
    records = judge_lists(run, lists)
    for record in records:
        by_subset.setdefault(record["subset"], []).append(record)

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
    model = f"local/{run.name}" if Path(run.model).exists() else run.model
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
            raise BadInput(f"--samples {word}: expected 1, N@TEMPERATURE or SUITE=N@TEMPERATURE")
        for name in [match[1]] if match[1] else suites:
            suites[name] = suites[name][0], n, temperature
    return suites


def reasoning(run: Evaluation) -> dict[str, Score]:
    """Reasoning: share of problems with the right answer."""
    def make(tokenizer, pair: tuple[dict, dict]) -> list[int]:
        return urpo.verifiable_group(pair[1], tokenizer, None, run.config).prompt_ids

    options, scores, averages, records = run.options, {}, [], []
    verify = data_prep.VERIFIERS[options.verifier]
    for name, (rows, n, temperature) in read_suites(options).items():
        answers = run.texts(name, rows, make, options.max_new_tokens, temperature, n)
        shares, solved, short = [], [], 0
        for (row, task), of_problem in zip(rows, answers, strict=True):
            texts = [answer["text"] for answer in of_problem or []]
            correct = [verify(text, task["answer"]) for text in texts]
            if of_problem:
                # over problems: samples of one share its luck, to pool them flatters the error
                prompt = f"{name} {json.dumps(task['prompt'])}"
                shares.append((prompt, fmean(correct)))
                solved.append((prompt, max(correct)))
                short += sum(answer["truncated"] for answer in of_problem)
            records.append({"suite": name, "id": row["id"], "prompt": task["prompt"],
                            "answer": task["answer"], "correct": correct, "texts": texts})
        note = f"temperature {temperature}; {short} of {n * len(shares)} answers cut short"
        note += f"; {answers.count(None)} not asked: longer than the context"
        averages.append(percent(shares, note))
        scores[f"{name} avg@{n}"] = averages[-1]
        if n > 1:  # at least one of n is right
            scores[f"{name} pass@{n}"] = percent(solved)
    scores["composite"] = combined(averages, note=f"unweighted mean of {len(averages)} suites")
    run.write(f"reasoning{run.trial}/samples.json", records)
    return run.finish(f"reasoning{run.trial}", scores, {"is the verifier": options.verifier})


# ================================================================================= All models
def tiny_world() -> dict:
    """The flags of `all` where no model is named: the newest tiny run, else the model that such
    runs start from. Nobody judges its answers there, so AlpacaEval is left out."""
    preset = urpo.PRESETS["tiny"]
    runs = sorted(Path("runs").glob("tiny-*/final/config.json"), key=os.path.getmtime)
    return {
        "commands": ["rewardbench", "reasoning"],
        "model": [str(runs[-1].parent) if runs else preset["model"]],
        "lists": [preset["eval_data"]], "problems": [preset["eval_data"]], "verifier": "plain",
        **{limit: preset[limit] for limit in ("max_new_tokens", "judge_max_new_tokens")}}


def named_runs(options: Namespace, ranks: urpo.Ranks) -> list[Evaluation]:
    """One for each model, or file of outputs or judgements, which says whose they are. Two of one
    name would write into one folder."""
    files = options.annotations or options.outputs
    called = list(options.model)
    for file in files:
        row = read_rows(file)[0]
        called.append(str(row.get("generator_2", row.get("generator", "unknown"))))
    names = options.name or list(map(short_name, called))
    if len(names) != len(called) or len(set(names)) < len(names):
        raise BadInput(f"{len(called)} models called {', '.join(names)}: a --name for each"[:300])
    return [Evaluation(options, ranks, *of_one) for of_one in zip(names, files or options.model)]


def add_differences(columns: dict[str, dict[str, Score]]):
    """Behind the models' columns those of what the others have more than the first. Their errors
    are paired: they come from the same prompts (or draws), part by part."""
    [first, old], *others = columns.items()
    for name, new in others:
        column = columns[f"{name} - {first}"] = {}
        for score, a in old.items():
            b = new.get(score, Score())
            note = "" if a.n == b.n else f"{b.n} rows against {a.n}"
            column[score] = replace(combined([b, a], [1, -1], note), n=min(a.n, b.n))


def print_scores(command: str, trial: str, columns: dict[str, dict[str, Score]]):
    """A table of all models and their differences. n: rows, of each model where they differ."""
    rows = []
    for score in next(iter(columns.values())):
        found = [column.get(score, Score()) for column in columns.values()]
        n = "/".join({str(of_model.n): 0 for of_model in found})
        rows.append([score.removeprefix(f"{command}: "), *found, n])
    print("\nPercent ± standard error over prompts; of a difference over the same ones, paired")
    print_table([command + trial, *columns, "n"], rows)


def evaluate(options: Namespace):
    """All three. Of several models every score of the others minus that of the first is shown."""
    check_options(options)
    ranks = urpo.Ranks(urpo.Config(device=options.device))
    runs, columns = named_runs(options, ranks), {}
    # First with empty answers: what is wrong (a row, a template, a context that is too short) is
    # said before a model is asked for hours
    for rehearsal in [True, False] if options.model else [False]:
        for run in runs:
            run.rehearsal = rehearsal
            column = columns[run.name] = {}
            for command in options.commands:
                for score, value in SCORES[command](run).items():
                    column[f"{command}: {score}"] = value
            run.hold("")  # the next one may need its memory

    if any(columns.values()):  # else there are answers that nobody has judged
        add_differences(columns)
        if ranks.main:
            print_scores(options.command, runs[0].trial, columns)
        names = cut("+".join(run.name for run in runs), 120)
        by = f"-by-{short_name(options.judge)}" if options.judge else ""
        runs[0].write(f"../{options.command}-{names}{by}{runs[0].trial}.json", columns)


def cut(name: str, most=30) -> str:
    """A long name without its middle, so that a table or a legend has room for it."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}..{name[-most // 2 + 1 :]}"


def print_table(header: list[str], rows: list[list]):
    """At most WIDTH wide: columns that find no room stand below, beside the first one again."""
    table = [list(map(str, row)) for row in [map(cut, header), *rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    left = list(range(1, len(widths)))  # columns that are not printed yet
    while left:
        columns, wide = [0], len("|  |") + widths[0]
        while left and (len(columns) == 1 or wide + len(" | ") + widths[left[0]] <= WIDTH):
            wide += len(" | ") + widths[left[0]]
            columns.append(left.pop(0))
        for row in table:
            print("|", " | ".join(row[i].ljust(widths[i]) for i in columns), "|")
        print()


# ================================================================================= Curves
# What a run has written (README, Run it), as a table and a picture and as a page of samples.
# Metrics that the table shows, by what stands in front of their slash.
TABLED = "eval raw_score true_quality reward_tau reward length flat parse_rate entropy kl".split()
PANELS = [["raw_score/open", "true_quality/open"]]  # of a pair the first is solid, the other dashed
for held_out in ("referee_accuracy", "true_quality", "verifiable_accuracy"):
    PANELS.append([f"eval/{held_out}", f"eval/{held_out}_greedy"])
WINDOW = 10  # steps of training that a value is the mean of: single ones are noise
Series = dict[str, dict[int, float]]  # metric -> step -> its value in one run


def read_lines(path: Path, *fields: str) -> list[dict]:
    """Of a JSONL file of ours, without a last line that is cut (by a kill, or written just now)."""
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        with in_one_line(f"{path}:{number}: not JSON with {', '.join(fields)}", AttributeError):
            lines.append(json.loads(line))
            if not lines[-1].keys() >= set(fields):
                raise ValueError(f"only {', '.join(lines[-1])}")
    return lines


def read_series(run: Path) -> Series:
    """What is held out as it is, of training means of the last WINDOW steps."""
    series, recent = {}, {}
    for line in read_lines(run / "metrics.jsonl", "step"):
        step = line.pop("step")
        for name, value in line.items():
            if step in series.get(name, {}):
                raise BadInput(f"{run}: {name} of step {step} is logged twice")
            window = 1 if name.startswith("eval/") else WINDOW
            recent[name] = [*recent.get(name, []), value][-window:]
            series.setdefault(name, {})[step] = fmean(recent[name])
    if not series:
        raise BadInput(f"{run}: no metrics yet")
    return series


def read_arms(runs: list[str]) -> dict[str, list[Series]]:
    """Arm -> its seeds: runs in one folder whose names differ only in a last -sN. Arms of several
    folders are called by as much of their paths as differs."""
    paths = [Path(run).resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise BadInput("a run is given twice: as two seeds of one arm it would show no error")
    arms = {}
    for path in paths:
        arm = path.with_name(re.sub(r"-s\d+$", "", path.name))
        arms.setdefault(arm, []).append(read_series(path))
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
    """The first and the last value of everything held out, and of what tells most of training."""
    names, rows = {}, []
    for seeds in arms.values():
        names |= seeds[0]
    for name in names:
        if name.split("/")[0] in TABLED and not name.endswith(("_n", "_se")):
            for arm, seeds in arms.items():
                counts = Counter(seeds[0].get(f"{name}_n", {}).values())  # rows held out
                metric = name + "".join(f" ({count:g})" for count in counts)
                found = list(points(seeds, name).values())
                cells = []
                for mean, error in found[:1] + found[-1:]:
                    cells.append(f"{mean:.3f} ± {error:.3f}".removesuffix(" ± nan"))
                if found:
                    rows.append([metric, cut(arm, 40), *cells])
    print_table(["metric (rows held out)", "arm", "first", "last"], rows)
    print(f"± over seeds, of one over prompts; eval/ is held out, all else means of {WINDOW} steps")
    for arm, seeds in arms.items():
        lasts = ", ".join(str(max(map(max, series.values()))) for series in seeds)
        print(f"{cut(arm, 40)}: n {len(seeds)}, to step {lasts}")


def curves(options: Namespace):
    """A table and a picture of the metrics of runs: a colour for each arm, its standard error as a
    band; the first metric of a panel is solid, the second dashed."""
    arms, out = read_arms(options.run), options.out or "curves.png"
    curve_table(arms)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: pip install matplotlib")

    figure = Figure((4 * len(PANELS), 4), layout="constrained")
    for place, (solid, dashed) in enumerate(PANELS, 1):
        axis = figure.add_subplot(1, len(PANELS), place, xlabel="step")
        axis.set_title(f"{solid} (solid)\n{dashed} (dashed)", fontsize=10)
        for colour, (arm, seeds) in enumerate(arms.items()):
            label = f"{cut(arm, 40)} (n {len(seeds)})"
            draw(axis, points(seeds, solid), "-", f"C{colour}", label)
            draw(axis, points(seeds, dashed), "--", f"C{colour}", "")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    with in_one_line(f"--out {out}"):  # not a kind of picture that matplotlib writes
        figure.savefig(out, dpi=75)
    print(out)


def draw(axis, found: dict[int, tuple[float, float]], style: str, color: str, label: str):
    """A line and its band. A few points are marked: a run may have a single one yet."""
    means, errors = torch.tensor([*found.values()]).reshape(-1, 2).T
    marker = "." if len(found) <= 30 else ""
    axis.plot([*found], means, style, marker=marker, color=color, label=label)
    axis.fill_between([*found], means - errors, means + errors, alpha=0.15, color=color)


# ================================================================================= Samples
# Only the right column holds texts: it may break anywhere, what stands left of it never
STYLE = """<style> body { font: 14px/1.5 sans-serif } table { border-collapse: collapse }
td { border: 1px solid #ccc; padding: .3em .6em; vertical-align: top; white-space: pre }
td:last-child { white-space: pre-wrap; overflow-wrap: anywhere } </style>"""


def group_rows(lines: list[dict]) -> list[tuple[str, str]]:
    """One prompt's group as (what it is, its text): what was asked, what was paid for what, and of
    an open group what the referee was shown and said."""
    first = lines[0]
    rows = [(message["role"], message["content"]) for message in first["prompt"]]
    if first.get("responses") and first["truth"]:  # of a judge list
        for label, score, text in zip(LABELS, first["truth"], first["responses"]):
            rows.append((f"response {label}: true score {score:.2f}", text))
    elif first["truth"] is not None:
        rows.append(("true answer", str(first["truth"])))

    for i, line in enumerate(lines):
        name = f"completion {i}"
        for value in ("reward", "true_quality"):
            if line.get(value) is not None:  # there may be no signal for a reward
                name += f"\n{value} {line[value]:.2f}"
        rows.append((name, line["completion"]))
    for judged in first.get("judged") or []:
        scores = judged["scores"] or ["does not parse"] * len(judged["shown"])
        given = [f"completion {i}: {score}" for i, score in zip(judged["shown"], scores)]
        rows.append(("\n".join(["the referee on", *given]), judged["critique"]))
    return rows


def samples(options: Namespace):
    """A page (HTML, self-contained) of what a run sampled and what it paid, newest step first."""
    name, groups = html.escape(Path(options.run).resolve().name), {}
    out = options.out or f"{options.run}/samples.html"
    fields = "step", "kind", "prompt", "truth", "completion", "reward"
    for line in read_lines(Path(options.run) / "samples.jsonl", *fields):
        groups.setdefault(line["step"], {}).setdefault(line["kind"], []).append(line)
    if not groups:
        raise BadInput(f"{options.run}: no samples yet")

    parts = [f'<!doctype html><meta charset="utf-8"><title>{name}</title>{STYLE}<h1>{name}</h1>']
    for step in sorted(groups, reverse=True):
        parts.append(f"<h2>step {step}</h2>")
        for kind, lines in groups[step].items():
            parts.append(f"<h3>{html.escape(kind)}</h3><table>")
            for texts in group_rows(lines):  # all that models and data say is escaped here
                what, text = map(html.escape, texts)
                parts.append(f"<tr><td>{what}</td><td>{text}</td></tr>")
            parts.append("</table>")
    # half a surrogate, which a model of bytes may write, has no UTF-8
    Path(out).write_text("\n".join(parts), encoding="utf-8", errors="replace")
    print(out)


# ================================================================================= Main
SCORES = {"alpaca": alpaca, "rewardbench": rewardbench, "reasoning": reasoning}
COMMANDS = SCORES | {"all": evaluate, "curves": curves, "samples": samples}
ASKING = "alpaca rewardbench reasoning all"
FLAGS = [  # (commands, flag, default, help); a list takes several values
    (ASKING, "--model", [], "model folders or Hub names; several are compared with the first"),
    (ASKING, "--name", [], "what the models are called; their folders or runs"),
    (ASKING, "--out_dir", "evals", "folder of all results"),
    (ASKING, "--limit", 0, "a trial on the first N of each set; 0: all of them"),
    (ASKING, "--seed", 0, "of samples, and of the order in which responses are shown"),
    (ASKING, "--device", "", "cpu, cuda or cuda:N; cuda where there is one"),
    (ASKING, "--stop_tokens", "", "more stop tokens, comma-separated (base model, chat template)"),
    (ASKING, "--rollout_tokens", 131072, "tokens in a batch of generate: bounds the KV cache"),
    ("alpaca reasoning all", "--max_new_tokens", 2048, "longest answer, tokens"),
    ("alpaca all", "--temperature", 0.0, "of answers to AlpacaEval; 0: greedy"),
    ("alpaca all", "--reference", "", "outputs to compare with; gpt4_1106_preview's on the Hub"),
    ("alpaca all", "--judge", "", "a local model; none: answers are written, not judged"),
    ("alpaca all", "--gamed", "", "df_gamed.csv, for length control; the Hub's"),
    ("alpaca", "--outputs", [], "answers to judge, like model_outputs.json, of each model"),
    ("alpaca", "--annotations", [], "judgements to count, like annotations.json, of each model"),
    ("rewardbench all", "--lists", [], "files or Hub sets; RewardBench on the Hub"),
    ("rewardbench all", "--v2", False, "RewardBench 2: best of four, and Ties"),
    ("rewardbench all", "--judge_max_new_tokens", 1024, "longest judgement, tokens"),
    ("reasoning all", "--problems", [], "files or Hub sets; six suites on the Hub"),
    ("reasoning all", "--samples", ["1"], "of a problem: N@TEMPERATURE, SUITE=N@TEMPERATURE"),
    ("reasoning all", "--verifier", "math_verify", "math_verify (the package) or plain"),
    ("curves", "run", [], "folders of runs"),
    ("samples", "run", "", "folder of a run"),
    ("curves samples", "--out", "", "file to write; curves.png, samples.html in the run's folder"),
]


def parse(arguments: list[str] | None) -> Namespace:
    """What is given, over the defaults. Every command has a parser of its own, so that argparse
    itself refuses the flags of another command."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("eval.py", None, __doc__, formatter_class=layout)
    parser.set_defaults(outputs=[], annotations=[], judge="")  # for commands without these flags
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, allow_abbrev=False)
        command.set_defaults(commands=list(SCORES) if name == "all" else [name])
        for of_commands, flag, default, text in FLAGS:
            if name in of_commands.split():
                how = {"nargs": "+"} if isinstance(default, list) else {"type": type(default)}
                if default is False:
                    how = {"action": "store_true"}
                text += f" (default {default})" if default else ""
                command.add_argument(flag, default=default, help=text, **how)

    options = parser.parse_args(arguments)
    if options.command == "all" and not options.model:
        commands.choices["all"].set_defaults(**tiny_world())  # what is given goes over it
        options = parser.parse_args(arguments)
    return options


def check_options(options: Namespace):
    """BadInput for what the parser cannot know, before a file is read or a folder is made."""
    for flag, value in vars(options).items():
        least = 1 if flag.endswith("_tokens") else 0
        if isinstance(value, (int, float)) and not value >= least:  # nor NaN
            raise BadInput(f"--{flag}: expected at least {least}")
    answers = [options.model, options.outputs, options.annotations]
    judged = options.judge or not options.outputs
    if sum(map(bool, answers)) != 1 or not judged or options.judge and options.annotations:
        raise BadInput("expected a --model, or --outputs with a --judge, or --annotations alone")
    if vars(options).get("verifier", "plain") not in data_prep.VERIFIERS:
        raise BadInput("--verifier: math_verify or plain")


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
