"""The paper's three scores, counted as the official evaluators do; curves and samples of runs.

    python eval.py alpaca      --model M --judge J         AlpacaEval 2: win rates
    python eval.py alpaca      --outputs FILE --judge J    of answers from elsewhere
    python eval.py alpaca      --annotations FILE          of judgements from elsewhere
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
(within 0.1 of theirs), goes by instruction, not by row, and has an error; judge lists are shown in
two orders, in the prompt that the referee was trained on; what is missing is missing, not 0."""
import argparse
import csv
import hashlib
import html
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

import data_prep
import urpo
from data_prep import BadInput

# ================================================================================= Scores
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
        return math.sqrt(math.fsum(part**2 for part in self.parts.values()))

    def __str__(self):
        error = "" if math.isnan(self.error) else f" ± {self.error:.2f}"
        return "missing" if math.isnan(self.value) else f"{self.value:.2f}{error}"

    def record(self) -> dict:
        value, error = [None if math.isnan(x) else x for x in (self.value, self.error)]
        return {"value": value, "error": error, "n": self.n, "note": self.note}

def percent(observed: list[tuple[str, float | None]], note="") -> Score:
    """The mean of (prompt, value in [0, 1]) pairs; a value None is left out. With one row a prompt
    the error is the deviation (ddof 1) over the root of n; equal prompts count as one in it."""
    known = [(prompt, 100 * value) for prompt, value in observed if value is not None]
    if not known:
        return Score(note=note)
    mean, parts = math.fsum(value for _, value in known) / len(known), Counter()
    for prompt, value in known:
        parts[prompt] += (value - mean) / len(known)
    units = len(parts)
    scale = math.sqrt(units / (units - 1)) if units > 1 else math.nan  # one alone shows no spread
    note += f" {units} different prompts" * (units < len(known))
    return Score(mean, {prompt: part * scale for prompt, part in parts.items()}, len(known), note)

def combined(scores: list[Score], weights: list[float] | None = None, note="") -> Score:
    """The sum of weight * score; without weights the plain mean."""
    value, parts, weights = 0.0, Counter(), weights or [1 / len(scores)] * len(scores)
    for score, weight in zip(scores, weights, strict=True):
        value += weight * score.value
        for unit, part in score.parts.items():
            parts[unit] += weight * part
    return Score(value, parts, sum(score.n for score in scores), note)

def print_table(header: list, rows: list[list]):
    table = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in [table[0], ["-" * width for width in widths], *table[1:]]:
        print("|", " | ".join(map(str.ljust, row, widths)), "|")

# ================================================================================= Asking a model
CHUNK = 64  # answers that are asked for and kept together: what a kill costs at most
NO_ANSWER = {"text": "", "truncated": True, "top": []}

class Evaluation:
    """One model: what it and its judge are asked, and the results. Alike on every rank."""

    def __init__(self, options: Namespace, model: str, name: str, ranks: urpo.Ranks):
        self.options = Namespace(**vars(options) | {"model": model, "name": name})
        self.ranks, self.name, self.loaded = ranks, name, ("", None)
        self.home = Path(options.out_dir) / name
        self.trial = f"-limit{options.limit}" if options.limit else ""
        names = "device", "stop_tokens", "rollout_tokens", "max_new_tokens", "judge_max_new_tokens"
        self.config = urpo.Config(**{name: getattr(options, name) for name in names})
        self.whose, owner = identity(model or options.outputs), self.home / "model.json"
        if self.whose and owner.exists() and json.dumps(self.whose) not in owner.read_text():
            raise BadInput(f"{self.home} holds answers of another {self.name}: give a --name")

    def ask(self, what: str, model: str, prompts: list, limit: int, n=1, temperature=0.0):
        """n answers to each prompt [P], in order, on all ranks, asked now or at an earlier start.
        NO_ANSWER where there is no prompt, or it and `limit` more tokens exceed the context."""
        ranks, (_, context) = self.ranks, urpo.load_tokenizer(model)
        stop = self.options.stop_tokens if model == self.options.model else ""
        # what decides an answer, besides its prompt
        how = [what == "duels", identity(model), limit, n, stop, temperature]
        how += [self.options.seed] * (temperature > 0)
        fitting = [i for i, ids in enumerate(prompts) if ids and len(ids) + limit <= context]
        fitting.sort(key=lambda i: len(prompts[i]))  # alike: little padding
        chunks, size, answers = {}, max(1, CHUNK // n), [[NO_ANSWER] * n for _ in prompts]
        for start in range(0, len(fitting), size):
            chunk = fitting[start : start + size]
            question = json.dumps([how, [prompts[i] for i in chunk]])
            chunks[hashlib.sha256(question.encode()).hexdigest()[:24]] = chunk
        missing = [key for key in chunks if not (self.home / f"answers/{key}.json").exists()]
        ranks.gather(None)  # all have looked
        if missing:
            self.write("model.json", self.whose)
            if self.loaded[0] != model:
                self.loaded = ("", None)  # frees the memory of the one before
                self.config.stop_tokens = stop
                self.loaded = model, urpo.load_actor(model, self.config, ranks, trainable=False)
            with ranks.unsharded(self.loaded[1].model):
                for key in tqdm(missing[ranks.rank :: ranks.world], what, disable=not ranks.main):
                    torch.manual_seed(int(key, 16) % 2**63)  # --seed is in the key
                    some = [prompts[i] for i in chunks[key]], limit, n, temperature
                    self.write(f"answers/{key}.json", self.answer(what, *some))
        ranks.gather(None)  # all have written
        for key, chunk in chunks.items():
            found = json.loads((self.home / f"answers/{key}.json").read_bytes())
            for i, of_prompt in zip(chunk, found, strict=True):
                answers[i] = of_prompt
        return answers

    @torch.no_grad()
    def answer(self, what: str, prompts: list[list[int]], limit: int, n: int, temperature: float):
        """n times {"text", "truncated"} for each prompt; of a duel {"top": [[token, log-prob]]}."""
        actor, answers = self.loaded[1], []
        for ids in prompts if what == "duels" else []:
            ids = torch.tensor([ids], device=actor.model.get_input_embeddings().weight.device)
            logits = actor.model(ids, logits_to_keep=1).logits[0, -1].float()
            logprobs, tokens = logits.log_softmax(-1).topk(TOP)
            texts = [actor.tokenizer.decode([token]) for token in tokens.tolist()]
            answers.append([{"top": list(zip(texts, logprobs.tolist()))}])
        if what != "duels":
            for group in urpo.sample(actor.model, prompts, n, [limit] * len(prompts), temperature,
                                     actor.stop_ids, self.options.rollout_tokens):
                texts = [(actor.text(c.ids), c.truncated) for c in group]
                answers.append([{"text": text, "truncated": cut} for text, cut in texts])
        return answers

    def write(self, name: str, value):
        """Whole or not at all; by rank 0, but for answers."""
        if self.ranks.main or name.startswith("answers/"):
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(json.dumps(value, indent=1, allow_nan=False))
            path.with_suffix(".tmp").replace(path)

    def finish(self, folder: str, scores: dict[str, Score], notes: dict) -> dict[str, Score]:
        """Write results.json, say where and what is to be noted -> the scores."""
        git = subprocess.run("git describe --always --dirty || echo unknown", shell=True, text=True,
                             cwd=Path(__file__).parent, capture_output=True).stdout.strip()
        versions = {name: version(name) for name in ("torch", "transformers", "datasets")}
        records = {name: score.record() for name, score in scores.items()}
        self.write(f"{folder}/results.json", {
            "scores": records, "notes": notes, "trial": bool(self.trial),
            "settings": vars(self.options), "versions": versions | {"git": git}})
        if self.ranks.main:
            said = [f"{value} {name}" for name, value in notes.items()]
            print(f"{self.home / folder}: {', '.join(said)}", flush=True)
        return scores

def identity(name: str) -> str:
    """Of a file or a folder's weights: names, sizes, times. A Hub name stands for itself."""
    files = sorted(Path(name).glob("*.safetensors")) or [Path(name)]
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16] if stats else name

# ================================================================================= Reading
def read_lines(path: Path) -> list[dict]:
    """Of a JSONL file of ours, without a last line that is cut (by a kill, or written just now)."""
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise BadInput(f"{path}: a line that is not JSON: {error}")

def read_rows(source: str, *columns: str) -> list:
    """Raw rows of a file or Hub set, with strings in these columns, numbers as `preference`."""
    rows = list(data_prep.load(data_prep.parse_source(source), random.Random(0)))
    for i, row in enumerate(rows, 1):
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
    rows, found = enumerate(read_rows(source), 1), []
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
TOP = 5  # the likeliest tokens of the judge are looked at, as the official configuration does
DRAWS = 1000  # of the bootstrap: its error is known to 2 %

def is_switched(instruction: str) -> bool:
    """Is the judge shown the model first? (processors.py, RandomSwitchTwoColumnsProcessor)"""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]

def preference_from_logprobs(logprobs: dict[str, float], switched: bool) -> float | None:
    """1 (the reference wins) to 2 (the model), from the top log-probs of the judge's one token:
    1 + p_M / (p_m + p_M), where `m` was shown first (completion_parsers.py, logprob_parser). What
    is outside of the top has probability 0; with neither there is no verdict."""
    lead = logprobs.get("M", -math.inf) - logprobs.get("m", -math.inf)
    preference = None if math.isnan(lead) else 1.5 + math.tanh(lead / 2) / 2
    return 3 - preference if preference and switched else preference

def outcome(preference: float | None) -> float:
    """P(the model is preferred), from a preference in [1, 2]; 0 is an old spelling of a draw. None,
    NaN, or out of range (the cache writes -1) was never judged: NaN; it is left out, not lost."""
    if preference == 0:
        return 0.5
    return preference - 1 if preference is not None and 1 <= preference <= 2 else math.nan

def win_rates(annotations: list[dict]) -> tuple[Score, Score, dict[str, int]]:
    """-> win rate, discrete win rate, counts (alpaca_eval metrics/helpers.py, metrics/winrate.py).
    Only an exact 1.5 is a draw; anything else is won by the nearer side."""
    wins = [(row["instruction"], outcome(row["preference"])) for row in annotations]
    judged = [(instruction, win) for instruction, win in wins if not math.isnan(win)]
    discrete = [(instruction, (1 + (win > 0.5) - (win < 0.5)) / 2) for instruction, win in judged]
    count, n = Counter(win for _, win in discrete), len(judged)
    return percent(judged), percent(discrete), {
        "n_wins": count[1.0], "n_wins_base": count[0.0], "n_draws": count[0.5], "n_total": n,
        "without a verdict": len(wins) - n}

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
    n, rng, draws = len(rows), torch.Generator().manual_seed(0), []
    for _ in range(DRAWS):
        draws.append(length_controlled(rows[torch.randint(n, [n], generator=rng)], gamed))
    mean, scale = fmean(draws), math.sqrt(DRAWS - 1)
    parts = {f"draw {i}": (draw - mean) / scale for i, draw in enumerate(draws)}
    return Score(length_controlled(rows, gamed), parts, n, "error by bootstrap")

def read_gamed(path: str) -> tuple[Tensor, list[float]]:
    """-> rows of df_gamed.csv [m, 3], difficulties of the instructions in published order."""
    gamed, difficulty, columns = [], {}, ("preference", "std_delta_len", "instruction_difficulty")
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                gamed.append([float(row[column]) for column in columns])
                difficulty[row["index"]] = gamed[-1][2]
    except (LookupError, TypeError, ValueError):
        raise BadInput(f"{path}: expected a table with numbers as index, {', '.join(columns)}")
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

def annotate(run: Evaluation, pairs: list[tuple[dict, dict]]) -> list[dict]:
    """Pairs judged in the official way: one token, m or M, in the order that is_switched draws.
    Equal outputs are a draw, not asked about. The tiny world's judge is the true quality."""
    judge, annotations, prompts = run.options.judge, [], []
    for one, two in pairs if judge else []:
        shown, instruction = [one["output"], two["output"]], one["instruction"]
        if is_switched(instruction):
            shown.reverse()
        ids = urpo.encode(urpo.load_tokenizer(judge)[0], duel_prompt(instruction, *shown))
        prompts.append(ids if shown[0] != shown[1] else None)
    answers = run.ask("duels", judge, prompts, 1) if judge else [[NO_ANSWER]] * len(pairs)
    for (one, two), [answer] in zip(pairs, answers, strict=True):
        instruction, top = one["instruction"], answer["top"]
        # of two tokens that are spelled alike the likelier one overwrites the other
        preference = preference_from_logprobs(dict(reversed(top)), is_switched(instruction))
        if not judge:
            ours, theirs = [data_prep.tiny_quality(instruction, x["output"]) for x in (two, one)]
            preference = 1.5 + ((ours > theirs) - (ours < theirs)) / 2
        if one["output"] == two["output"]:
            preference = 1.5
        tokens = [{"token": token, "logprob": logprob} for token, logprob in top]
        raw = {"logprobs": {"content": [{"top_logprobs": tokens}]}} if top else None
        annotations.append({
            "instruction": instruction, "dataset": one.get("dataset", ""),
            "output_1": one["output"], "generator_1": one.get("generator", "reference"),
            "output_2": two["output"], "generator_2": run.name, "preference": preference,
            "annotator": f"weighted_alpaca_eval_{Path(judge).name}" if judge else "true_quality",
            "raw_completion": raw})
    return annotations

def alpaca_scores(annotations: list[dict], order: list[str], table) -> dict[str, Score]:
    """`order`: the instructions of the whole set as published, to which the difficulties belong;
    empty: not known. `table`: of read_gamed, or None."""
    place = {instruction: i for i, instruction in enumerate(order)}
    places = [place.get(row["instruction"]) for row in annotations]
    controlled = Score(note="needs --gamed df_gamed.csv, on the Hub in tatsu-lab/alpaca_eval")
    if table and (len(place) != len(table[1]) or None in places):
        controlled = Score(note="needs --reference: the set that --gamed is for, in its order")
    elif table:
        controlled = length_control(annotations, [table[1][i] for i in places], table[0])
    win_rate, discrete, _ = win_rates(annotations)
    return {"length-controlled win rate": controlled, "win rate": win_rate,
            "discrete win rate": discrete}

def alpaca(run: Evaluation) -> dict[str, Score]:
    """AlpacaEval 2: win rates against a reference."""
    options, folder, judge = run.options, "alpaca" + run.trial, run.options.judge
    # all that is read comes before anything is generated
    reference, outputs, limit = [], [], options.limit or None
    if options.tiny:  # compared with the first response of every held-out judge list
        for _, task in read_tasks(options.lists[0], "preference", 0):
            reference.append({"instruction": task["prompt"][-1]["content"],
                              "output": task["responses"][0], "generator": "stored responses"})
    elif options.reference or not options.annotations:
        reference = read_rows(options.reference or HUB, "instruction", "output")
    table = read_gamed(options.gamed) if options.gamed else None
    order = list(dict.fromkeys(row["instruction"] for row in reference))
    reference = reference[:limit]
    if options.annotations:
        rows = read_rows(options.annotations, "instruction", "output_1", "output_2")[:limit]
        annotations = [{"preference": None, "annotator": "unknown"} | row for row in rows]
    else:
        if options.outputs:
            outputs = read_rows(options.outputs, "instruction", "output")
        else:  # the model's own, for our judge and for `alpaca_eval --model_outputs`
            tokenizer, _ = urpo.load_tokenizer(options.model)
            chats = [data_prep.chat(row["instruction"]) for row in reference]
            prompts = [urpo.encode(tokenizer, chat) for chat in chats]
            how = options.max_new_tokens, 1, options.temperature
            for row, [answer] in zip(reference, run.ask("answers", options.model, prompts, *how)):
                outputs.append({
                    "dataset": row.get("dataset", ""), "instruction": row["instruction"],
                    "output": answer["text"].strip(), "generator": run.name})
            run.write(f"{folder}/model_outputs.json", outputs)
        of = {row["instruction"]: row for row in outputs}
        pairs = [(r, of[r["instruction"]]) for r in reference if r["instruction"] in of]
        if not pairs or not judge and not options.tiny:
            return run.finish(folder, {}, {"answers to the reference, not judged": len(pairs)})
        annotations = annotate(run, pairs)
    folder += "/" + annotations[0]["annotator"].replace("/", "_")
    if not options.annotations:
        run.write(f"{folder}/annotations.json", annotations)
    counts = win_rates(annotations)[2]
    counts["avg_length"] = sum(len(row["output_2"]) for row in annotations) // len(annotations)
    return run.finish(folder, alpaca_scores(annotations, order, table), counts)

# ================================================================================= RewardBench 1, 2
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
    margin, spread = {"ref": {}, "tied": {}}, {}
    for item in items:
        kind, prompt = item["id"].split(":")
        right, wrong = item["scores"][: item["num_correct"]], item["scores"][item["num_correct"] :]
        margin[kind][prompt] = min(right) - max(wrong)
        if kind == "tied":
            spread[prompt] = max(right) - min(right)
    terms = [[(prompt, m > 0) for prompt, m in margin[kind].items()] for kind in ("tied", "ref")]
    terms += [], [], []  # over the prompts with both kinds
    for prompt in margin["tied"].keys() & margin["ref"].keys():
        gap, smaller = spread[prompt], min(margin["ref"][prompt], margin["tied"][prompt])
        ratio = smaller / gap if gap else math.copysign(math.inf, smaller)
        terms[2].append((prompt, margin["tied"][prompt] > gap))
        terms[3].append((prompt, smaller > gap))
        terms[4].append((prompt, math.tanh(ratio - 1) if gap or smaller else 0.0))
    score = combined([percent(term) for term in terms], [0.3, 0.3, 0.2, 0.2, 0.01], "at most 101")
    return score._replace(n=len(margin["tied"] | margin["ref"]))

def read_lists(options: Namespace) -> tuple[list[dict], int]:
    """-> lists with one best response, and Ties, as {"id", "subset", "prompt", "responses" (right
    ones first), "num_correct", "ties"}; how many others there were."""
    lists, others = [], 0
    for source in options.lists or [HUB_2 if options.v2 else HUB_1]:
        for row, task in read_tasks(source, "preference", options.limit):
            best_first = sorted(zip(task["scores"], task["responses"]), key=lambda pair: -pair[0])
            right, texts = task["scores"].count(best_first[0][0]), [text for _, text in best_first]
            subset = row.get("subset") or set_name(source)
            ties = options.v2 and subset == "Ties"
            if ties and not re.fullmatch("(ref|tied):[^:]+", str(row["id"])):
                raise BadInput(f"{source}: row {row['id']}: id: expected ref:N or tied:N")
            if right < len(texts) and (right == 1 or ties):
                lists.append({"id": row["id"], "subset": subset, "prompt": task["prompt"],
                              "responses": texts, "num_correct": right, "ties": ties})
            others += right == len(texts) or right > 1 and not ties
    if not lists:
        raise BadInput("no list has one best response")
    return lists, others

def judge_lists(run: Evaluation, lists: list[dict]):
    """Add `verdicts` to each list: scores of its responses in their own order, or None; one for a
    random order of showing them, one for the reverse. Of Ties each response is shown alone."""
    config, model, prompts, asked = run.config, run.options.model, [], []
    tokenizer, context = urpo.load_tokenizer(model)
    limit = config.judge_max_new_tokens
    config.judge_prompt_tokens = min(config.judge_prompt_tokens, context - limit)
    for k, item in enumerate(lists):
        rng, everyone = random.Random(f"{run.options.seed}/{k}"), range(len(item["responses"]))
        order = rng.sample(everyone, len(everyone))
        for shown in [[i] for i in everyone] if item["ties"] else [order, order[::-1]]:
            asked.append((item, shown))
            how = item["responses"], shown, tokenizer, rng, config
            try:
                prompts.append(urpo.judge_group(item, *how).prompt_ids)
            except ValueError:  # does not fit, even cut: not asked
                prompts.append(None)
        item |= {"verdicts": [], "critiques": []}
    for (item, shown), [answer] in zip(asked, run.ask("judgements", model, prompts, limit)):
        scores = urpo.parse_scores(answer["text"], len(shown))
        in_order = [score for _, score in sorted(zip(shown, scores))] if scores else None
        item["verdicts"].append(in_order)
        item["critiques"].append(answer["text"])

def credit(item: dict) -> dict:
    """What two orders of a list earn. `score`: official credit. `strict`: a tie or no verdict is
    wrong. `flip`: the orders have no best response in common. `parsed`: share of verdicts."""
    verdicts, best = item["verdicts"], []
    for verdict in filter(None, verdicts):
        best.append({i for i, score in enumerate(verdict) if score == max(verdict)})
    parsed = len(best) / len(verdicts)
    if item["ties"]:  # scored as a whole, by ties_score
        scores = [verdict[0] if verdict else -1.0 for verdict in verdicts]
        return {"scores": scores, "parsed": parsed}
    score = sum(best_of(verdict or [None] * len(item["responses"])) for verdict in verdicts) / 2
    flip = float(not best[0] & best[1]) if len(best) == 2 else None
    return {"score": score, "strict": best.count({0}) / 2, "flip": flip, "parsed": parsed}

def rewardbench(run: Evaluation) -> dict[str, Score]:
    """RewardBench: does the model as the judge prefer the right response?"""
    options, subsets, (lists, others) = run.options, {}, read_lists(run.options)
    judge_lists(run, lists)
    records = [item | credit(item) for item in lists]

    def mean(name: str, part: list[dict]) -> Score:
        return percent([(json.dumps(record["prompt"]), record.get(name)) for record in part])

    for name in dict.fromkeys(record["subset"] for record in records):
        part = [record for record in records if record["subset"] == name]
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
    model = f"local/{run.name}" if Path(options.model).exists() else options.model
    official = {"model": model, "model_type": "Generative RM", "chat_template": None}
    official |= {name: score.value / 100 for name, score in sorted(subsets.items())}
    run.write(f"{folder}/eval-set/{model}.json", official)
    return run.finish(folder, scores, {"lists without one best response, left out": others})

# ================================================================================= Reasoning
# What most papers average. AIME and AMC23 are small: --samples 1 aime_2024=32@0.6 amc23=32@0.6
SUITES = ["openai/gsm8k@main#test", "HuggingFaceH4/MATH-500#test", "HuggingFaceH4/aime_2024",
          "math-ai/amc23#test", "math-ai/minervamath#test",
          "Hothan/OlympiadBench@OE_TO_maths_en_COMP"]

def split_answers(text: str) -> list[str]:
    """At the commas that stand in no bracket, and not in 1,250."""
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
        if set_name(source) in suites:
            raise BadInput(f"{source}: another set is called {set_name(source)} too")
        suites[set_name(source)] = read_tasks(source, "verifiable", options.limit), 1, 0.0
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
    options, suites, scores, averages, records = run.options, read_suites(run.options), {}, [], []
    tokenizer, _ = urpo.load_tokenizer(options.model)
    verify = data_prep.VERIFIERS[options.verifier]
    for suite, (rows, n, temperature) in suites.items():
        groups = [urpo.verifiable_group(task, tokenizer, None, run.config) for _, task in rows]
        prompts = [group.prompt_ids for group in groups]
        answers = run.ask(suite, options.model, prompts, options.max_new_tokens, n, temperature)
        shares, chances, cut = [], {2**i: [] for i in range(1, n.bit_length())}, 0
        for (row, task), of_problem in zip(rows, answers, strict=True):
            prompt, texts = f"{suite} {json.dumps(task['prompt'])}", [a["text"] for a in of_problem]
            correct = [check_answer(verify, text, task["answer"]) for text in texts]
            # over problems: samples of one share its luck, to pool them would flatter the error
            shares.append((prompt, sum(correct) / n))
            for k, of_k in chances.items():  # pass@k, unbiased (Chen et al. 2021)
                of_k.append((prompt, 1 - math.comb(correct.count(0), k) / math.comb(n, k)))
            cut += sum(answer["truncated"] for answer in of_problem)
            records.append({"suite": suite, "id": row["id"], "prompt": task["prompt"],
                            "answer": task["answer"], "correct": correct, "texts": texts})
        note = f"temperature {temperature}; {cut} of {n * len(rows)} answers cut short"
        averages.append(percent(shares, note))
        scores[f"{suite} avg@{n}"] = averages[-1]
        scores |= {f"{suite} pass@{k}": percent(of_k) for k, of_k in chances.items()}
    scores["composite"] = combined(averages, note=f"unweighted mean of {len(averages)} suites")
    run.write(f"reasoning{run.trial}/samples.json", records)
    return run.finish(f"reasoning{run.trial}", scores, {"is the verifier": options.verifier})

# ================================================================================= All models
def tiny_world(options: Namespace, ranks: urpo.Ranks):
    """What `all` is about if no model is named: the newest tiny run, else its start."""
    preset = urpo.PRESETS["tiny"]
    if ranks.main and not Path(preset["eval_data"]).exists():
        data_prep.make_tiny(Path(preset["eval_data"]).parent)
    ranks.gather(None)  # wait for the file
    runs = sorted(Path("runs").glob("tiny-*/final/config.json"), key=os.path.getmtime)
    options.model = [str(runs[-1].parent) if runs else preset["model"]]
    options.lists = options.problems = [preset["eval_data"]]
    for flag in {"verifier", "max_new_tokens", "judge_max_new_tokens"}.difference(options.given):
        setattr(options, flag, preset.get(flag, "plain"))

def evaluate(options: Namespace):
    """All three. Of several models every score of the others minus that of the first is shown."""
    check_options(options)
    transformers_logging.disable_progress_bar()
    ranks, commands = urpo.Ranks(urpo.Config(device=options.device)), [options.command]
    if options.tiny:
        tiny_world(options, ranks)
    # runs/NAME/final is NAME; what comes from elsewhere is called like its folder
    elsewhere = [Path(options.annotations or options.outputs).resolve().parent]
    paths = [Path(model).resolve() for model in options.model] or elsewhere
    names = [path.parent.name if path.name == "final" else path.name for path in paths]
    names, models = options.name or names, options.model or [""]
    if len(names) != len(models) or len(set(names)) < len(names):
        raise BadInput(f"{len(models)} models called {', '.join(names)}: a --name for each"[:300])
    # what is wrong is said before the first answer is made
    runs = [Evaluation(options, model, name, ranks) for model, name in zip(models, names)]
    columns = {name: {} for name in names}
    for model in filter(None, [*models, options.judge]):
        urpo.load_tokenizer(model)
    if options.command == "all":
        commands = ["alpaca", "rewardbench", "reasoning"]
        read_lists(options)
        read_suites(options)
    for run in runs:
        for command in commands:
            scores = COMMANDS[command](run)
            columns[run.name] |= {f"{command}: {name}": score for name, score in scores.items()}
    first = columns[names[0]]
    for name in names[1:]:
        column = columns[f"{name} - {names[0]}"] = {}
        for score, old in first.items():
            column[score] = combined([columns[name][score], old], [1, -1])._replace(n=old.n)
    records = {name: {s: c[s].record() for s in c} for name, c in columns.items()}
    runs[0].write(f"../{options.command}-{'+'.join(names)[:150]}{runs[0].trial}.json", records)
    if ranks.main:
        rows = [[s, *[c[s] for c in columns.values()], first[s].n, first[s].note] for s in first]
        print("\nPercent ± standard error over prompts; of a difference over the same ones, paired")
        print_table([options.command + runs[0].trial, *columns, "n", ""], rows)

# ================================================================================= Curves
PANELS = {  # what a reader looks at first; these are tabled, too
    "open: the referee's score, the truth": ["raw_score/open", "true_quality/open"],
    "held out: problems": ["eval/verifiable_accuracy", "eval/verifiable_accuracy_greedy"],
    "held out: referee's pairs": ["eval/referee_accuracy", "eval/referee_accuracy_greedy"],
    "held out: true quality, open": ["eval/true_quality", "eval/true_quality_greedy"],
    "open: does the reward order rightly?": ["reward_tau/open"],
    "reward": ["reward/verifiable", "reward/preference"],
    "length, tokens": ["length/open", "length/verifiable", "length/preference"],
    "flat groups": ["flat/open", "flat/verifiable", "flat/preference"],
    "judgements that parse": ["parse_rate/open", "parse_rate/preference"],
    "nats": ["entropy", "kl"],
}
STYLES = ["-", "--", ":"]
WINDOW = 10  # steps of training that a value is the mean of: single ones are noise

def points(seeds: list[list[dict]], name: str) -> dict[int, tuple[float, float]]:
    """Step -> mean of a metric over seeds and its standard error: over seeds, or of one seed over
    prompts (`NAME_se`, where the run wrote it). Of training, means of the last WINDOW steps."""
    values, of_one, found = {}, {}, {}
    for lines in seeds:
        lines = [line for line in lines if name in line]
        for i, line in enumerate(lines):
            first = i if name.startswith("eval/") else max(0, i + 1 - WINDOW)
            recent = [earlier[name] for earlier in lines[first : i + 1]]
            values.setdefault(line["step"], []).append(sum(recent) / len(recent))
            of_one[line["step"]] = line.get(f"{name}_se", math.nan)
    for step, of_seeds in values.items():
        if len(of_seeds) == len(seeds):  # else a seed has not come so far
            error = stdev(of_seeds) / len(seeds) ** 0.5 if len(seeds) > 1 else of_one[step]
            found[step] = fmean(of_seeds), error
    return found

def curve_table(arms: dict[str, list[list[dict]]]):
    """The first and the last value of everything held out and of what is drawn of training."""
    drawn, columns = sum(PANELS.values(), []), {"n": {}}
    for arm, seeds in arms.items():
        over = f"± over {len(seeds)} seeds" if len(seeds) > 1 else "1 seed, ± over prompts"
        for name in dict.fromkeys(name for line in seeds[0] for name in line):
            if name in drawn or name.startswith("eval/") and not name.endswith(("_n", "_se")):
                rows = [line.get(f"{name}_n", "") for line in seeds[0] if name in line]
                columns["n"][name], of_arm = rows[-1], list(points(seeds, name).values())
                for which, (mean, error) in zip(("first", "last"), (of_arm[0], of_arm[-1])):
                    text = f"{mean:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")
                    columns.setdefault(f"{arm}, {which} ({over})", {})[name] = text
    rows = [[name, *[c.get(name, "") for c in columns.values()]] for name in columns["n"]]
    print_table([f"eval/: held out; else means of {WINDOW} steps", *columns], rows)

def curves(options: Namespace):
    """A table and a picture of the metrics of runs: a colour for each arm (runs whose names differ
    only in a last -sN are its seeds), its standard error as a band, a style for each metric."""
    arms, out = {}, options.out or "curves.png"
    for run in options.run:
        arm = re.sub(r"-s\d+$", "", Path(run).resolve().name)
        arms.setdefault(arm, []).append(read_lines(Path(run) / "metrics.jsonl"))
    curve_table(arms)
    if not importlib.util.find_spec("matplotlib"):
        return print("no picture: pip install matplotlib")
    import matplotlib
    matplotlib.use("Agg")  # to a file, also where there is no screen
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 5, figsize=(20, 8), layout="constrained")
    for axis, (title, metrics) in zip(axes.flat, PANELS.items()):
        axis.set(title=title, xlabel="step")
        for colour, seeds in enumerate(arms.values()):
            for style, metric in zip(STYLES, metrics):
                steps, values = [*points(seeds, metric)], [*points(seeds, metric).values()]
                means, errors = torch.tensor(values).reshape(-1, 2).T
                look, marker = {"color": f"C{colour}"}, "o" if len(steps) <= 20 else ""
                axis.plot(steps, means, style, marker=marker, markersize=4, **look)
                axis.fill_between(steps, means - errors, means + errors, alpha=0.15, **look)
        keys = [pyplot.Line2D([], [], color="black", linestyle=s) for s in STYLES[: len(metrics)]]
        axis.legend(keys, [metric.removeprefix("eval/") for metric in metrics], fontsize=7)
    keys = [pyplot.Line2D([], [], color=f"C{colour}") for colour in range(len(arms))]
    figure.legend(keys, [f"{arm} (n {len(seeds)})" for arm, seeds in arms.items()],
                  loc="outside upper center", ncols=9)
    if Path(out).suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise BadInput(f"--out {out}: not a kind of picture that matplotlib writes")
    figure.savefig(out, dpi=75)
    print(out)

# ================================================================================= Samples
STYLE = """<style> body { font: 14px/1.5 sans-serif } tr:first-child { background: #eee }
table { border-collapse: collapse; margin: 1em 0 } pre { white-space: pre-wrap; margin: 0 }
td { border: 1px solid #ccc; padding: .3em .6em; vertical-align: top } </style>"""

def html_table(rows: list[dict]) -> str:
    """All that models and data say passes here, and is escaped: nothing in it is markup."""
    parts = ["<table>"]
    for values in [rows[0], *[row.values() for row in rows]]:
        texts = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in values]
        parts += ["<tr>", *[f"<td><pre>{html.escape(text)}</pre></td>" for text in texts]]
    return "".join([*parts, "</table>"])

def group_tables(lines: list[dict]) -> list[str]:
    """One prompt's group, a line for each completion: what was asked, what was paid for what."""
    first, rows, shown = lines[0], [], lines[0].get("responses") or []  # shown: of a judge list
    labels = urpo.LABELS[: len(shown)]
    tables = [[{message["role"]: message["content"]}] for message in first["prompt"]]
    truth = zip(labels, first["truth"] or [], shown)
    true_rows = [{"response": label, "true score": t, "": text} for label, t, text in truth]
    if first["truth"] is not None:
        tables.append(true_rows or [{"true answer": first["truth"]}])
    for i, line in enumerate(lines):
        rows.append({"completion": i, "reward": line["reward"]})
        if shown:
            scores = urpo.parse_scores(line["completion"], len(shown)) or ["does not parse"]
            rows[-1][f"scores of {labels}"] = " ".join(map(str, scores))
        if "true_quality" in line:
            rows[-1]["true quality"] = line["true_quality"]
        rows[-1][""] = line["completion"]
    tables.append(sorted(rows, key=lambda row: 9 if row["reward"] is None else -row["reward"]))
    for judged in first.get("judged") or []:  # of an open group: who was shown, what was said
        scores = judged["scores"] or ["does not parse"] * len(judged["shown"])
        given = [f"completion {i}: {score}" for i, score in zip(judged["shown"], scores)]
        tables.append([{"the referee": "\n".join(given), "its critique": judged["critique"]}])
    return [html_table(table) for table in tables]

def samples(options: Namespace):
    """A page (HTML, self-contained) of what a run sampled and what it paid."""
    name, groups = html.escape(Path(options.run).resolve().name), {}
    out = options.out or f"{options.run}/samples.html"
    for line in read_lines(Path(options.run) / "samples.jsonl"):
        groups.setdefault(line["step"], {}).setdefault(line["kind"], []).append(line)
    steps = [step for step in groups if not options.steps or step in options.steps]
    if not steps:
        raise BadInput(f"--steps: there are samples of {', '.join(map(str, groups))}"[:300])
    parts = [f'<!doctype html><meta charset="utf-8"><title>{name}</title>{STYLE}<h1>{name}</h1>']
    for step in steps:
        parts.append(f"<details{' open' * (step == steps[-1])}><summary>step {step}</summary>")
        for kind, lines in groups[step].items():
            parts += [f"<h3>{html.escape(kind)}</h3>", *group_tables(lines)]
        parts.append("</details>")
    Path(out).write_text("\n".join(parts), encoding="utf-8")
    print(out)

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
    (ASKING, "device", "", "cpu or cuda; cuda where there is one"),
    (ASKING, "stop_tokens", "", "further stop tokens, comma-separated (base model, chat template)"),
    (ASKING, "rollout_tokens", 131072, "tokens in a batch of model.generate: bounds the KV cache"),
    ("alpaca reasoning all", "max_new_tokens", 2048, "longest answer, tokens"),
    ("alpaca all", "temperature", 0.0, "of answers to AlpacaEval; 0: greedy"),
    ("alpaca all", "reference", "", "outputs to compare with; gpt4_1106_preview's on the Hub"),
    ("alpaca all", "judge", "", "a local model; none: answers are written, not judged"),
    ("alpaca", "outputs", "", "answers to judge, like model_outputs.json"),
    ("alpaca", "annotations", "", "judgements to count, like annotations.json"),
    ("alpaca all", "gamed", "", "df_gamed.csv, for length control; the Hub's"),
    (JUDGE, "lists", [], "files or Hub sets; RewardBench on the Hub"),
    (JUDGE, "v2", False, "RewardBench 2: best of four, and Ties"),
    (JUDGE, "judge_max_new_tokens", 1024, "longest judgement, tokens"),
    ("reasoning all", "problems", [], "files or Hub sets; six suites on the Hub"),
    ("reasoning all", "samples", ["1"], "of a problem: N@TEMPERATURE, SUITE=N@TEMPERATURE"),
    ("reasoning all", "verifier", "math_verify", "math_verify (the package) or plain"),
    ("curves samples", "out", "", "file to write; curves.png, samples.html in the run's folder"),
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
            how = {"type": type(default)}
            if isinstance(default, list):
                how = {"type": int if flag == "steps" else str, "nargs": "+"}
            elif default is False:
                how = {"action": "store_true"}
            if name in of_commands.split():
                how["help"] = f"{text} (default {default})" if default else text
                command.add_argument(f"--{flag}", default=None, **how)
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    return Namespace(**{flag: value for _, flag, value, _ in FLAGS} | given, given=list(given))

def check_options(options: Namespace):
    """BadInput for what the parser cannot know, before a file is read or a folder is made."""
    command, player = options.command, "model max_new_tokens temperature stop_tokens seed "
    options.tiny = command == "all" and not options.model
    for applies, flags, why in [  # flags that would have no effect
        (options.annotations, player + "judge outputs rollout_tokens", "--annotations are judged"),
        (options.outputs, player, "--outputs are answers"),
        (options.tiny, "reference judge gamed lists problems v2", "no --model: the tiny world"),
        (not options.judge and not options.annotations, "gamed", "there is no --judge"),
        (command == "alpaca" and not options.temperature, "seed", "--temperature is 0"),
    ]:
        for flag in {*flags.split()}.intersection(options.given) if applies else []:
            raise BadInput(f"--{flag} has no effect: {why}")
    for _, flag, default, _ in FLAGS:
        if isinstance(default, (int, float)) and not getattr(options, flag) >= min(1, default):
            raise BadInput(f"--{flag}: expected at least {min(1, default)}")
    needed = options.verifier == "math_verify" and command in ("reasoning", "all")
    for wrong, message in [
        (not (options.model or options.tiny or options.outputs or options.annotations),
         "--model is missing"),
        (options.outputs and not options.judge, "--outputs needs a --judge"),
        (options.verifier not in data_prep.VERIFIERS, "--verifier: math_verify or plain"),
        (needed and not options.tiny and not importlib.util.find_spec("math_verify"),
         "--verifier math_verify: pip install math-verify (or --verifier plain)"),
        (options.device not in ("", "cpu", "cuda"), "--device: cpu or cuda"),
    ]:
        if wrong:
            raise BadInput(message)

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
    main()
