"""Real data sets -> the one row format that urpo.py trains on.

    python data_prep.py --out data/                            the default 7B mix, from the Hugging Face Hub
    python data_prep.py --out data/small sums:2000 my.jsonl openai/gsm8k@main:500 --exclude test.jsonl
    python data_prep.py --out data/prompts pairs.parquet --as open            keep the prompts only
    python data_prep.py --check data/train.jsonl                              list every bad row of a file
    python data_prep.py --pretrain_tiny assets/tiny        the base model of the tiny world, again from nothing

A source is FILE_OR_NAME[@CONFIG][#SPLIT][:LIMIT], as in openai/gsm8k@main#test:200. It is a json, jsonl or
parquet file (.json may hold one array, a line may be a bare JSON string), a Hub name, a json file on the Hub
(hf://datasets/OWNER/NAME/FILE), or sums:N, which needs no data. SPLIT is "train" unless said. LIMIT: how many
rows to keep, drawn at random, because many sets are sorted. The columns of a row tell its schema; a new one
is one function and one line in SCHEMAS.

It writes OUT/train.jsonl and OUT/heldout.jsonl, one task a line:

    {"kind": "verifiable", "prompt": [...], "answer": "18"}
    {"kind": "preference", "prompt": [...], "responses": ["..", ".."], "scores": [4.0, 1.0]}
    {"kind": "open",       "prompt": [...]}

and promises, for every source:
  * Each row passes urpo.row_problem. What does not is dropped, and counted by reason in the printed table.
  * Training and held-out rows share no opening user message: all of a conversation is on one side.
  * No user message is a prompt of an --exclude set (case and white space do not count).
  * A prompt stands once in each kind; in a preference row it may come back with other responses.
  * Responses stand in random order, which tells nothing about scores (urpo.py shuffles again at use time).
  * Same seed, same input: same bytes. An interrupted run leaves the old files as they were.
"""
import argparse
import itertools
import json
import math
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

import urpo

# Our choice (the paper's mix is not known to us): 30,000 of each kind, under MIT or CC BY 4.0. Left out for
# their terms: Skywork-Reward-Preference (its card names no licence), Alpaca (non-commercial).
DEFAULT_MIX = (
    "openbmb/UltraFeedback:20000",                    # preference: four rated responses a prompt
    "nvidia/HelpSteer3@preference:10000",             # preference: human verdicts; multi-turn, code
    "agentica-org/DeepScaleR-Preview-Dataset:25000",  # verifiable: competition mathematics
    "openai/gsm8k@main:5000",                         # verifiable: easier, so that early groups differ
    "HuggingFaceH4/ultrachat_200k#train_sft:30000",   # open
)
# What eval.py and the usual reports score: training on these prompts would spoil the benchmark.
DEFAULT_EXCLUDE = (
    "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json", "allenai/reward-bench#filtered", "google/IFEval",
    "openai/gsm8k@main#test", "HuggingFaceH4/MATH-500#test", "HuggingFaceH4/aime_2024",
)
FIELDS = {"verifiable": ("answer",), "preference": ("responses", "scores"), "open": ()}  # beside the prompt


class Drop(Exception):
    """This row is of no use; the message says why. What follows ", got" is detail: not for the table."""


# ------------------------------------------------------------------------------ building blocks of converters
def task(kind, prompt, **fields):
    return {"kind": kind, "prompt": prompt, **fields}


def user(*parts):
    """One user message: the parts that are there, a blank line between."""
    return [{"role": "user", "content": "\n\n".join(part.strip() for part in parts if part)}]


def chat(value, speaker="user"):
    """Messages from a message list, a Human/Assistant transcript or one plain text of `speaker`.

    >>> chat("\\n\\nHuman: Hi\\n\\nAssistant: Yes?")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes?'}]
    """
    if not isinstance(value, str):
        return [{"role": message["role"], "content": message["content"]} for message in value]
    if not value.startswith("\n\nHuman:"):
        return [{"role": speaker, "content": value.strip()}]
    _, *pieces = re.split(r"\n\n(Human|Assistant):", value)
    turns = [{"role": "user" if name == "Human" else "assistant", "content": text.strip()}
             for name, text in zip(pieces[::2], pieces[1::2])]
    return turns if turns[-1]["content"] else turns[:-1]  # a prompt may end in "Assistant:"


# --------------------------------------------- converters: row -> list of tasks, or raise Drop; as in SCHEMAS
# Ties leave a converter with equal scores: row_problem refuses them, `--as open` can still use the prompt.
def own(row):
    """Rows already in this format."""
    if reason := urpo.row_problem(row):
        raise Drop(reason)
    return [row | {"prompt": chat(row["prompt"])}]


def ultrafeedback(row):
    """openbmb/UltraFeedback: completions rated on up to four aspects, "1" to "5" or "N/A". The score is their
    mean; the set's own overall_score is another number, and its first release had wrong ones (10 for 1)."""
    responses, scores = [], []
    for completion in row["completions"]:
        ratings = [aspect["Rating"] for aspect in completion["annotations"].values()]
        ratings = [float(rating) for rating in ratings if rating != "N/A"]
        if ratings:
            responses.append(completion["response"])
            scores.append(sum(ratings) / len(ratings))
    return [task("preference", user(row["instruction"]), responses=responses, scores=scores)]


def helpsteer3(row):
    """nvidia/HelpSteer3@preference: from -3 (response1 is much better) to 3 (response2 is)."""
    lead = row["overall_preference"]
    return [task("preference", chat(row["context"]), responses=[row["response1"], row["response2"]],
                 scores=[max(-lead, 0), max(lead, 0)])]


def pandalm(row):
    """PandaLM test set (github.com/WeOpenML/PandaLM): three human votes, 1 or 2 or 0 (tie); two decide."""
    vote, count = Counter(row[f"annotator{i}"] for i in (1, 2, 3)).most_common(1)[0]
    scores = [float(count > 1 and vote == 1), float(count > 1 and vote == 2)]  # three different votes: a tie
    return [task("preference", user(row["instruction"], row["input"]),
                 responses=[row["response1"], row["response2"]], scores=scores)]


def llmbar(row):
    """LLMBar (github.com/princeton-nlp/LLMBar), an evaluation set: `label` says which output is better."""
    return [task("preference", user(row["input"]), responses=[row["output_1"], row["output_2"]],
                 scores=[float(row["label"] == 1), float(row["label"] == 2)])]


def oasst(row):
    """Open Assistant trees (github.com/LAION-AI/Open-Assistant): every user message with two or more ranked
    replies (0 is best; unranked ones are left out), and the conversation that led to it as the prompt."""
    tasks, paths = [], [[row["prompt"]]]
    for path in paths:  # grows while we walk it
        replies = path[-1]["replies"]
        paths += [path + [reply] for reply in replies]
        ranked = [node for node in replies if node["role"] == "assistant" and node.get("rank") is not None]
        if len(ranked) > 1:
            worst = max(node["rank"] for node in ranked)
            prompt = [{"role": {"prompter": "user"}.get(node["role"], node["role"]), "content": node["text"]}
                      for node in path]
            tasks.append(task("preference", prompt, responses=[node["text"] for node in ranked],
                              scores=[worst - node["rank"] for node in ranked]))
    if not tasks:
        raise Drop("no user message with two ranked replies")
    return tasks


def model_solutions(row):
    """GSM8K's example_model_solutions (github.com/openai/grade-school-math; TEST questions): what several
    models answered, right or wrong. With `--as verifiable`, question and true answer."""
    solutions = [value for value in row.values() if isinstance(value, dict)]
    return [task("preference", user(row["question"]), responses=[each["solution"] for each in solutions],
                 scores=[float(each["is_correct"]) for each in solutions],
                 answer=row["ground_truth"].rpartition("A:")[2].strip())]


def chosen_rejected(row):
    """HuggingFaceH4/ultrafeedback_binarized, Skywork/Skywork-Reward-Preference-80K-v0.2, Anthropic/hh-rlhf,
    TRL's preference formats: message lists, transcripts or strings; the prompt is a column or their start."""
    sides = [chat(row[column], "assistant") for column in ("chosen", "rejected")]
    prompt = row.get("prompt")
    if prompt is None and max(map(len, sides)) == 1:  # two strings; a shared start ends with a word
        whole = [side[0]["content"] for side in sides]
        prompt = re.sub(r"\S*$", "", os.path.commonprefix(whole))
        sides = [chat(text.removeprefix(prompt), "assistant") for text in whole]
    # a side that begins with the user's turn holds the prompt already
    good, bad = [chat(prompt) + side if side[0]["role"] == "assistant" else side for side in sides]
    if good[:-1] != bad[:-1] or good[-1]["role"] != "assistant" or bad[-1]["role"] != "assistant":
        raise Drop("chosen and rejected differ in more than the last reply")
    return [task("preference", good[:-1], responses=[good[-1]["content"], bad[-1]["content"]],
                 scores=[row.get("score_chosen", 1.0), row.get("score_rejected", 0.0)])]


def mathematics(row):
    """MATH, HuggingFaceH4/MATH-500, agentica-org/DeepScaleR-Preview-Dataset, AIME: `answer`, or else the last
    \\boxed{} of the solution, braces balanced."""
    answer = row.get("answer")
    if answer is None:
        _, boxed, rest = row["solution"].rpartition("\\boxed{")
        depth = list(itertools.accumulate(({"{": 1, "}": -1}.get(letter, 0) for letter in rest), initial=1))
        if not boxed or 0 not in depth:
            raise Drop("no answer and no \\boxed{} in the solution")
        answer = rest[: depth.index(0) - 1]
    return [task("verifiable", user(row["problem"]), answer=str(answer))]


def svamp(row):
    """SVAMP (github.com/arkilpatel/SVAMP): a Body is often an "If ..." before its Question; 51.0 is "51"."""
    body, answer = row["Body"].strip(), float(row["Answer"])
    link = " " if body.endswith((".", "?", "!")) else ", "
    return [task("verifiable", user(body + link + row["Question"].strip()),
                 answer=f"{answer:.0f}" if answer.is_integer() else str(answer))]


def gsm8k(row):
    """openai/gsm8k@main: the answer ends in "#### 1,234"."""
    _, marker, answer = row["answer"].rpartition("####")
    if not marker:
        raise Drop("answer: expected '#### NUMBER' at its end")
    return [task("verifiable", user(row["question"]), answer=answer.strip().replace(",", ""))]


def self_instruct(row):
    """Self-instruct seed tasks (github.com/yizhongw/self-instruct): the instruction with its first input."""
    return [task("open", user(row["instruction"], row["instances"][0]["input"]))]


def alpaca(row):
    """tatsu-lab/alpaca, alpaca_eval, databricks-dolly: an instruction and perhaps an `input` or `context`."""
    return [task("open", user(row["instruction"], row.get("input") or row.get("context")))]


def messages(row):
    """HuggingFaceH4/ultrachat_200k and other chats: what stands before the first answer."""
    turns = chat(row["messages"])
    roles = [turn["role"] for turn in turns] + ["assistant"]
    return [task("open", turns[: roles.index("assistant")])]


def prompt_only(row):
    """google/IFEval and TRL's prompt-only format."""
    return [task("open", chat(row["prompt"]))]


def plain(row):
    """A lone `text` or `question`. With other columns it may be a document or need its choices: no prompt."""
    column = "text" if "text" in row else "question"
    if others := row.keys() - {column, "id", "source", "subset"}:
        raise Drop(f"{column} beside other columns is no plain prompt, got {sorted(others)}")
    return [task("open", chat(row[column]))]


# The first line whose columns are all there decides. Extra columns do not matter: telling lines come first.
SCHEMAS = tuple((frozenset(columns.split()), converter) for columns, converter in (
    ("kind prompt", own),
    ("instruction completions", ultrafeedback),
    ("context response1 response2 overall_preference", helpsteer3),
    ("instruction input response1 response2 annotator1 annotator2 annotator3", pandalm),
    ("input output_1 output_2 label", llmbar),
    ("message_tree_id prompt", oasst),
    ("question ground_truth", model_solutions),
    ("chosen rejected", chosen_rejected),
    ("problem answer", mathematics),
    ("problem solution", mathematics),
    ("Body Question Answer", svamp),
    ("question answer", gsm8k),
    ("instruction instances", self_instruct),
    ("instruction", alpaca),
    ("messages", messages),
    ("prompt", prompt_only),
    ("text", plain),
    ("question", plain),
))


# ------------------------------------------------------------------------------ sums:N, a source without data
SUMS = {  # the last form of each is a story
    "+": ("What is {a} + {b}?", "{a} + {b} = ?", "Compute {a} plus {b}.",
          "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"),
    "-": ("What is {a} - {b}?", "{a} - {b} = ?", "Compute {a} minus {b}.",
          "{name} has {a} {things} and gives {b} away. How many {things} are left?"),
    "*": ("What is {a} * {b}?", "{a} * {b} = ?", "Compute {a} times {b}.",
          "{name} has {a} bags with {b} {things} in each. How many {things} does {name} have?"),
}
NAMES, THINGS = ("Tom", "Ana", "Sam", "Mia", "Ben"), ("apples", "books", "coins", "cards", "stamps")
# Each of a row's four solutions uses another of these, so that the wording tells nothing about the score.
WORKINGS = ("{a} {op} {b} = {work}. The answer is \\boxed{{{box}}}.",
            "We need {a} {op} {b}, which is {work}. So the final answer is \\boxed{{{box}}}.",
            "Step 1: write down {a} {op} {b}.\nStep 2: it makes {work}.\n\\boxed{{{box}}}",
            "Let me work it out: {a} {op} {b} gives {work}.\nAnswer: \\boxed{{{box}}}")
MOST_SUMS = 3000  # few enough that drawing different problems by trial stays quick


def sums(n, rng):
    """n verifiable sums, and n // 2 preference rows of four worked solutions to other ones.

    Easy on purpose: a 135M model gets about a third of single-digit sums right, and a group that is all right
    or all wrong teaches nothing. Scores: 1 right; 0.6 right working, wrong box; 0.3 wrong; 0 another problem."""
    if not 0 < n <= MOST_SUMS:
        raise urpo.BadInput(f"sums:{n}: ask for 1 to {MOST_SUMS}, there are not many more easy sums")
    problems = {}
    while len(problems) < n + n // 2:
        op = rng.choices("+-*", (7, 2, 1))[0]
        a, b = rng.randint(1, 99 if op == "+" and rng.random() < 0.25 else 9), rng.randint(1, 9)
        a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
        text = rng.choice(SUMS[op]).format(a=a, b=b, name=rng.choice(NAMES), things=rng.choice(THINGS))
        problems[text] = a, op, b, {"+": a + b, "-": a - b, "*": a * b}[op]
    problems = list(problems.items())
    tasks = [task("verifiable", user(text), answer=str(right)) for text, (_, _, _, right) in problems[:n]]
    for text, (a, op, b, right) in problems[n:]:
        wrong = rng.choice([near for near in range(right - 3, right + 4) if near >= 0 and near != right])
        other = a, op, b, right
        while other == (a, op, b, right):  # its solution is right, but to another problem
            _, other = rng.choice(problems)
        graded = [(a, op, b, right, right), (a, op, b, right, wrong), (a, op, b, wrong, wrong), (*other, other[-1])]
        responses = [working.format(a=a, op=op, b=b, work=work, box=box)
                     for working, (a, op, b, work, box) in zip(rng.sample(WORKINGS, 4), graded)]
        tasks.append(task("preference", user(text), responses=responses, scores=[1.0, 0.6, 0.3, 0.0]))
    return tasks


# -------------------------------------------------------------------------------------------- reading sources
class Source(NamedTuple):
    name: str
    config: str | None
    split: str | None
    limit: int | None


def parse_source(text):
    """FILE_OR_NAME[@CONFIG][#SPLIT][:LIMIT]

    >>> parse_source("openai/gsm8k@main#test:50")
    Source(name='openai/gsm8k', config='main', split='test', limit=50)
    """
    pattern = r"(.*?)(?:@([^@#:/]+))?(?:#([^@#:/]+))?(?::(\d+))?"
    name, config, split, limit = re.fullmatch(pattern, text, re.S).groups()
    return Source(name, config, split, int(limit) if limit else None)


def load(source, rng):
    """The raw rows of a source: a list or a datasets.Dataset."""
    path = Path(source.name)
    if source.name == "sums":
        return sums(source.limit or 0, rng)
    if path.exists() or path.suffix in (".json", ".jsonl", ".parquet") and "://" not in source.name:
        return read_file(path)
    try:
        if "://" in source.name:
            return datasets.load_dataset("json", data_files=source.name, split="train")
        return datasets.load_dataset(source.name, source.config, split=source.split or "train")
    except Exception as error:  # the Hub's clients raise their HTTP library's errors too, whichever that is
        raise urpo.BadInput(f"{source.name}: no such file, and the Hub says: {one_line(error)}") from error


def read_file(path):
    """The rows of a local file; a bare string becomes {"text": ..}, a line that is not JSON a Drop."""
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        if path.suffix == ".json" and path.read_bytes().lstrip().startswith(b"["):
            rows = json.loads(path.read_bytes())
        else:
            rows = [value for _, value in json_lines(path)]
    except (OSError, ValueError, RecursionError, pyarrow.ArrowException) as error:
        raise urpo.BadInput(f"{path}: cannot be read: {one_line(error)}") from error
    return [{"text": row} if isinstance(row, str) else row for row in rows]


def json_lines(path):
    """(line number, value) of every line that is not blank; the value is a Drop if the line is not JSON."""
    with open(path, "rb") as file:  # bytes, so that json.loads meets bad UTF-8 too
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError):
                    yield number, Drop(f"not JSON, got {line[:60]!r}")


def one_line(error):
    return " ".join(str(error).split())[:300]  # some of the Hub's messages fill a screen


def converter_for(row):
    """The converter of the first schema whose columns the row has, or None."""
    columns = row.keys() if isinstance(row, dict) else set()
    return next((converter for needed, converter in SCHEMAS if needed <= columns), None)


def convert(row):
    """The tasks of one raw row. A field of the wrong type is the row's fault, not ours: a Drop as well."""
    if isinstance(row, Drop):
        raise row
    converter = converter_for(row)
    if converter is None:
        raise Drop("columns of no known schema")
    try:
        return converter(row)
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise Drop(f"a field is missing or of the wrong type, got {type(error).__name__}: {error}") from error


# --------------------------------------------------------------------------------------- keeping and dropping
def normal(text):
    """How texts are compared: case and white space do not count."""
    return " ".join(text.casefold().split())


def user_turns(row):
    return [normal(message["content"]) for message in row["prompt"] if message["role"] == "user"]


def identity(row):
    """Rows with the same identity are duplicates."""
    prompt = tuple((message["role"], normal(message["content"])) for message in row["prompt"])
    return row["kind"], prompt, tuple(sorted(map(normal, row.get("responses", ()))))


def problem(row):
    """Why a row cannot be trained on, or None: what urpo.py refuses, then what would hurt it later."""
    reason = urpo.row_problem(row)
    if reason:
        return reason
    responses, scores = (row["responses"], row["scores"]) if row["kind"] == "preference" else ([], [])
    if len(responses) > len(urpo.LABELS):
        return f"responses: expected at most {len(urpo.LABELS)}, the labels of a judge prompt"
    if len(set(zip(responses, scores))) > len(set(responses)):
        return "responses: one text with two different scores"
    return None


def finish(raw, source, as_kind):
    """Just the fields of its kind, which is `as_kind` if given; row_problem will name what that one lacks."""
    kind = as_kind or raw["kind"]
    fields = ("prompt", *FIELDS[kind], "id", "source", "subset")
    return {"kind": kind, "source": source} | {key: raw[key] for key in fields if raw.get(key) is not None}


def shuffle_responses(row, rng):
    """Many sets store the best response first; scores move along."""
    if row["kind"] == "preference":
        pairs = rng.sample(list(zip(row["responses"], row["scores"])), len(row["scores"]))
        row["responses"], row["scores"] = [text for text, _ in pairs], [float(score) for _, score in pairs]


def gather(source, as_kind, options, excluded, seen, table):
    """The rows of one source that are kept. Adds to `seen` and to the counts in `table`."""
    name = Path(source.name).name if Path(source.name).exists() else source.name  # no folders of this machine
    rng = random.Random(f"{options.seed} {name}")  # its own: other sources change nothing here
    rows, kept = load(source, rng), []
    if not any(map(converter_for, rows)):
        columns = sorted({column for row in rows if isinstance(row, dict) for column in row})
        known = ", ".join("+".join(sorted(needed)) for needed, _ in SCHEMAS)
        raise urpo.BadInput(f"{source.name}: no known schema in columns {columns}; known are {known}")
    limit = math.inf if source.limit is None or source.name == "sums" else source.limit
    for index in rng.sample(range(len(rows)), len(rows)):
        if len(kept) >= limit:
            break
        try:
            tasks = convert(rows[index])
        except Drop as drop:
            table[name, "-", "dropped: " + str(drop).partition(", got")[0]] += 1
            continue
        for row in (finish(raw, name, as_kind) for raw in tasks):
            reason = (problem(row)
                      or excluded.intersection(user_turns(row)) and "prompt of an --exclude set"
                      or identity(row) in seen and "duplicate"
                      or len(str(row)) > options.max_chars and "longer than --max_chars")
            if not reason:
                seen.add(identity(row))
                shuffle_responses(row, rng)
                kept.append(row)
            table[name, row["kind"], "dropped: " + reason.partition(", got")[0] if reason else "kept"] += 1
    return kept


def split(rows, heldout, rng):
    """(training, held-out) rows, by opening user message; `heldout` counts for each kind, as --help says."""
    openings = {}  # opening message -> kind -> number of rows
    for row in rows:
        openings.setdefault(user_turns(row)[0], Counter())[row["kind"]] += 1
    held = set()
    for kind in FIELDS:
        total = sum(kinds[kind] for kinds in openings.values())
        wanted = heldout * total if heldout < 1 else min(heldout, total / 5)
        have = sum(openings[opening][kind] for opening in held)  # came along with an earlier kind
        for opening in rng.sample(list(openings), len(openings)):
            if have < wanted and openings[opening][kind] and opening not in held:
                held.add(opening)
                have += openings[opening][kind]
    sides = [], []
    for row in rng.sample(rows, len(rows)):
        sides[user_turns(row)[0] in held].append(row)
    return sides


# ------------------------------------------------------------------------------ the tiny world
# A little language with ground truth for all three kinds of task, and a small model that speaks it badly.
#
# Instructions ask for lists of words (open), or how many different words of a category stand in a list (verifiable). Two
# sorts of people wrote what the base model was pretrained on. The hasty ones, most of them, answer at once: they count
# repeats, drift off the topic when they list, and score a response by its length. The careful ones write down what they
# see first. So the base model's habit, its greedy answer, is the hasty one, and it holds something better that RL can
# find. Careful critics know what belongs to a category, but most count a repeated word twice: that is what preference rows
# can teach the referee, and what a frozen referee can be fooled with.
CATEGORIES = {name: words.split() for name, words in {
    "fruits": "apple pear plum grape lemon cherry mango melon fig peach",
    "animals": "dog cat horse cow sheep goat lion bear wolf fox",
    "colors": "red blue green black white brown pink grey gold purple",
    "tools": "hammer saw drill file axe rake spade knife chisel wrench",
}.items()}
CATEGORY_OF = {word: name for name, words in CATEGORIES.items() for word in words}
LENGTHS = (2, 3, 4)  # how many words an instruction asks for
HELD_OUT = {("fruits", 3), ("animals", 4), ("colors", 2)}  # open instructions that are never trained on
CAREFUL = 0.35  # share of careful people: a minority, so that greedy decoding is hasty
MINDFUL = 0.3  # share of careful critics who do not count repeats
LIST_SIZES = (2, 3)  # responses in a judge prompt: few, for binding labels to words is what a tiny model is bad at


def tiny_wish(prompt_text: str) -> tuple[int, str]:
    """(how many words, category) of an open instruction."""
    number, category = re.search(r"(\d+) different (\w+)", prompt_text).groups()
    return int(number), category


def tiny_quality(prompt_text: str, response_text: str) -> float:
    """The true quality of an open response, in [0, 1]: different words of the category, over the words asked for or
    written, whichever is more."""
    number, category = tiny_wish(prompt_text)
    words = response_text.split()
    return len({word for word in words if CATEGORY_OF.get(word) == category}) / max(number, len(words))


def tiny_instruction(rng: random.Random, held_out: bool) -> str:
    combinations = [(c, n) for c in CATEGORIES for n in LENGTHS if ((c, n) in HELD_OUT) == held_out]
    category, number = rng.choice(combinations)
    return f"{rng.choice(['List', 'Name'])} {number} different {category}"


def tiny_response(rng: random.Random, instruction: str, foreign: float, repeat: float, length: float) -> str:
    """A list with faults: a word is of another category, or a repeat, with these chances; `length` is the chance of
    every word too many or too few."""
    number, category = tiny_wish(instruction)
    shift = rng.choice((-1, 1))
    while rng.random() < length and 1 <= number + shift <= 6:  # 6 keeps judge prompts short
        number += shift
    words: list[str] = []
    for _ in range(number):
        draw = rng.random()
        if draw < foreign:
            words.append(rng.choice([w for w in CATEGORY_OF if CATEGORY_OF[w] != category]))
        elif words and draw < foreign + repeat:
            words.append(rng.choice(words))
        else:
            words.append(rng.choice([w for w in CATEGORIES[category] if w not in words]))
    return " ".join(words)


def tiny_player(rng: random.Random, instruction: str, careful: float = CAREFUL) -> str:
    """What people answer to an open instruction: mediocre, most of them."""
    if rng.random() < careful:
        return tiny_response(rng, instruction, foreign=0.05, repeat=0.05, length=0.1)
    return tiny_response(rng, instruction, foreign=0.5, repeat=0.1, length=0.4)


def tiny_responses(rng: random.Random, instruction: str, count: int) -> list[str]:
    """`count` responses of different quality for a judge, flawless and hopeless ones among them: a policy in training
    writes better and stranger responses than people do."""
    while True:
        responses = [tiny_response(rng, instruction, rng.choice((0, 0.3, 0.6, 1)), rng.choice((0, 0, 0, 0.5)), 0.3)
                     for _ in range(count)]
        if len({tiny_quality(instruction, response) for response in responses}) == count:
            return responses


def tiny_problem(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """(text, words that count with repeats, the same without): how many different words of a category are in a list?"""
    category, other = rng.sample(list(CATEGORIES), 2)
    few = rng.sample(CATEGORIES[category], rng.randint(2, 5))
    words = [rng.choice(few) if rng.random() < 0.7 else rng.choice(CATEGORIES[other]) for _ in range(rng.randint(4, 7))]
    found = [word for word in words if CATEGORY_OF[word] == category]
    return f"Count the different {category} in: {' '.join(words)}", found, list(dict.fromkeys(found))


def tiny_count(rng: random.Random, found: list[str], different: list[str], careful: float = CAREFUL) -> str:
    """A worked or a hasty answer to a counting problem."""
    if rng.random() < careful:
        seen = [word for word in different if rng.random() > 0.03]
        return " ".join([*seen, "\\boxed{", str(len(seen)), "}"])
    number = max(0, len(found) + (rng.choice((-1, 1)) if rng.random() < 0.4 else 0))
    return f"\\boxed{{ {number} }}"


def tiny_judgement(rng: random.Random, instruction: str, responses: list[str], careful: float = CAREFUL) -> str:
    """A critique (careful critics only: "A 3" is response A, 3 words that count) and the score block."""
    number, category = tiny_wish(instruction)
    lines, scores = [], []
    if rng.random() < careful:
        mindful = rng.random() < MINDFUL
        for label, response in zip("ABC", responses):
            good = [word for word in response.split() if CATEGORY_OF[word] == category]
            count = len(set(good)) if mindful else len(good)
            lines.append(f"{label} {count}")
            scores.append(min(10, max(1, round(1 + 9 * min(1, count / number) + rng.gauss(0, 0.5)))))
    else:  # longer looks better, about; the spread is wide enough that it is mostly chance
        looks = [len(response.split()) + rng.gauss(0, 3) for response in responses]
        marks = sorted(rng.sample(range(1, 11), len(responses)))
        scores = [marks[sorted(looks).index(look)] for look in looks]
    block = [f"{label}: {score}" for label, score in zip("ABC", scores)]
    return "\n".join([*lines, "<scores>", *block, "</scores>"])


def tiny_row(rng: random.Random, kind: str, held_out: bool) -> dict:
    if kind == "verifiable":
        text, _, different = tiny_problem(rng)
        return {"kind": kind, "prompt": text, "answer": str(len(different)), "source": "tiny"}
    text = tiny_instruction(rng, held_out)
    if kind == "open":
        return {"kind": kind, "prompt": text, "source": "tiny"}
    responses = tiny_responses(rng, text, rng.choice(LIST_SIZES))
    scores = [round(10 * tiny_quality(text, response), 2) for response in responses]
    return {"kind": kind, "prompt": text, "responses": responses, "scores": scores, "source": "tiny"}


TINY_ROWS = {"train": (2500, 2500, 2500), "heldout": (300, 200, 100)}  # verifiable, preference, open


def make_tiny(out: Path, seed: int = 0) -> None:
    """Write OUT/train.jsonl and OUT/heldout.jsonl. No held-out problem and no held-out instruction is trained on."""
    out.mkdir(parents=True, exist_ok=True)
    problems = set()
    for name, counts in TINY_ROWS.items():
        rng, rows = random.Random(f"{seed}/tiny/{name}"), []
        for kind, count in zip(("verifiable", "preference", "open"), counts):
            while sum(row["kind"] == kind for row in rows) < count:
                row = tiny_row(rng, kind, name == "heldout")
                if kind != "verifiable" or row["prompt"] not in problems:
                    rows.append(row)
                    problems.add(row["prompt"])
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


TINY_CHAT = ("{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
             "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def tiny_fixed_text() -> list[str]:
    """The passages of judge and problem prompts that never change: each becomes one token. They are found by calling the
    template with probes."""
    nonce, probe, passages = "0a0a0a", "probe probe", []
    for count in range(1, 5):
        text = urpo.judge_messages([{"role": "user", "content": probe}], [probe] * count, nonce)[0]["content"]
        passages += [part.strip() for part in re.split(rf"\[{nonce}\]|{probe}", text)]
    return [p for p in dict.fromkeys([urpo.BOX, *passages]) if len(p.split()) > 2]


def tiny_tokenizer():
    """A word is a token; so are a newline and each fixed passage. Unknown words (the nonce) are [UNK]."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "[UNK]", "<|system|>", "<|user|>", "<|assistant|>"]
    words = "\n List Name different Count the in: Instruction Response End <scores> </scores> \\boxed{ }".split(" ")
    words += [*map(str, range(11)), *"ABCD", "A:", "B:", "C:", "D:", *CATEGORIES, *CATEGORY_OF]
    vocabulary = {token: i for i, token in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")])
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins the words with spaces
    tokenizer.add_special_tokens([AddedToken(t, lstrip=True, rstrip=True) for t in special])
    tokenizer.add_tokens([AddedToken(p, lstrip=True, rstrip=True, normalized=False) for p in tiny_fixed_text()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", unk_token="[UNK]",
        chat_template=TINY_CHAT, padding_side="left", model_max_length=256, clean_up_tokenization_spaces=False)


def tiny_demonstrations(rng: random.Random, count: int, careful: float, sizes: tuple[int, ...]):
    """(chat messages, completion) pairs to pretrain on, through the trainer's own prompts."""
    pairs = []
    for _ in range(count):
        kind = rng.choices(("judge", "count", "list"), (0.6, 0.25, 0.15))[0]  # judging is the hardest to learn
        if kind == "count":
            text, found, different = tiny_problem(rng)
            messages = [{"role": "user", "content": f"{text}\n{urpo.BOX}"}]
            pairs.append((messages, tiny_count(rng, found, different, careful)))
            continue
        text = tiny_instruction(rng, held_out=False)
        messages = [{"role": "user", "content": text}]
        if kind == "list":
            pairs.append((messages, tiny_player(rng, text, careful)))
            continue
        responses = tiny_responses(rng, text, rng.choice(sizes))
        nonce = f"{rng.getrandbits(24):06x}"
        pairs.append((urpo.judge_messages(messages, responses, nonce), tiny_judgement(rng, text, responses, careful)))
    return pairs


def muon_step(matrices, momenta, lr: float) -> None:
    """One step of Muon (orthogonalized momentum, Jordan 2024) on weight matrices; those of one shape go as one stack."""
    import torch

    for shape in dict.fromkeys(m.shape for m in matrices):
        same = [m for m in matrices if m.shape == shape]
        gradient = torch.stack([m.grad for m in same])
        momentum = momenta.setdefault(shape, torch.zeros_like(gradient)).lerp_(gradient, 0.05)
        update = gradient.lerp(momentum, 0.95)  # Nesterov
        update = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):  # Newton-Schulz with Muon's usual coefficients: singular values go to about 1
            square = update @ update.mT
            update = 3.4445 * update + (2.0315 * square @ square - 4.775 * square) @ update
        for matrix, change in zip(same, update):
            matrix.data.sub_(change, alpha=lr * 0.2 * max(shape) ** 0.5)  # 0.2 sqrt(n): the size of an AdamW step


def pretrain_tiny(out: Path, seed: int = 0, steps: int = 2400) -> None:
    """Make the base model of assets/tiny: tokenizer, pretraining on demonstrations, one Hugging Face folder."""
    import torch
    from tqdm.auto import tqdm
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed), tiny_tokenizer()
    end, batch, rate = tokenizer.eos_token_id, 32, 4e-3
    # Llama, for with model_type qwen2 AutoTokenizer insists on Qwen2's own tokenizer class
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=256, max_position_embeddings=256, tie_word_embeddings=True, rope_theta=1000.0,
        bos_token_id=None, eos_token_id=end, pad_token_id=tokenizer.pad_token_id))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    adam = torch.optim.AdamW(others, weight_decay=0.0)
    momenta, batches = {}, []
    for step in (bar := tqdm(range(steps), desc="pretraining")):
        if not batches:  # 50 batches of new demonstrations, sorted by length so that there is little padding
            # careful work alone teaches the skill, on lists of one, then of two; the rest is people as they are
            done = step / steps
            sizes = (1,) if done < 0.15 else (1, 2) if done < 0.3 else LIST_SIZES
            pairs = tiny_demonstrations(rng, 50 * batch, 1.0 if done < 0.6 else CAREFUL, sizes)
            prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m, _ in pairs]
            answers = [text + "<|end|>" for _, text in pairs]
            rows = sorted(zip(tokenizer(prompts).input_ids, tokenizer(answers).input_ids),
                          key=lambda row: len(row[0]) + len(row[1]))
            batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            rng.shuffle(batches)
        rows = batches.pop()
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        # padding on the right needs no attention mask: nothing real comes after it; only answers are learned
        ids = torch.tensor([p + a + [end] * (longest - len(p) - len(a)) for p, a in rows])
        labels = torch.tensor([[-100] * len(p) + a + [-100] * (longest - len(p) - len(a)) for p, a in rows])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        now = rate * min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))  # warm up, hold, fall to 0
        adam.param_groups[0]["lr"] = now
        adam.step()
        muon_step(matrices, momenta, now)
        bar.set_postfix(loss=f"{loss.item():.2f}")
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(out)  # half the size; the trainer computes in float32
    tokenizer.save_pretrained(out)


# ------------------------------------------------------------------------------------------- the commands
def check(path):
    """Print every row of a JSONL file that cannot be trained on; True if there is none."""
    good = bad = 0
    try:
        for number, row in json_lines(path):
            reason = str(row) if isinstance(row, Drop) else problem(row)
            if reason:
                print(f"{path}:{number}: {reason}")
            good, bad = good + (not reason), bad + bool(reason)
    except OSError as error:
        raise urpo.BadInput(f"{path}: cannot be read: {one_line(error)}") from error
    print(f"{path}: {good} good rows, {bad} bad")
    return good > 0 and bad == 0


def prepare(options):
    """Read the sources, write OUT/train.jsonl and OUT/heldout.jsonl, print what was kept and dropped."""
    excluded, seen, table, rows = set(), set(), Counter(), []
    for text in options.exclude if options.exclude or options.sources else DEFAULT_EXCLUDE:
        found = gather(parse_source(text), "open", options, set(), set(), Counter())
        if not found:
            raise urpo.BadInput(f"--exclude {text}: no prompt found there")
        excluded.update(user_turns(row)[0] for row in found)
    for text in options.sources or DEFAULT_MIX:
        rows += gather(parse_source(text), options.as_kind, options, excluded, seen, table)
    names = list(dict.fromkeys(name for name, _, _ in table))  # in the order of the command line
    for key in sorted(table, key=lambda key: (names.index(key[0]), key)):
        print("{:45} {:10} {:7} {}".format(*key[:2], table[key], key[2]))
    if not rows:
        raise urpo.BadInput("no row was kept, so nothing is written")
    out, files = Path(options.out), []
    out.mkdir(parents=True, exist_ok=True)
    for name, side in zip(("train", "heldout"), split(rows, options.heldout, random.Random(options.seed))):
        files.append(out / f"{name}.jsonl")
        # ASCII escapes, so that no reader takes a U+2028 inside a text for the end of a line
        Path(f"{files[-1]}.tmp").write_text("".join(json.dumps(row) + "\n" for row in side))
        kinds = Counter(row["kind"] for row in side)
        print(f"{files[-1]}: {len(side)} rows: " + ", ".join(f"{kinds[kind]} {kind}" for kind in FIELDS))
    for file in files:  # by now both are complete
        os.replace(f"{file}.tmp", file)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="see above; none: the default mix, from the Hub")
    add("--out", metavar="DIR", help="folder for train.jsonl and heldout.jsonl")
    add("--check", metavar="FILE", help="list every bad row of a JSONL file; exit status 1 if there is one")
    add("--as", dest="as_kind", choices=FIELDS,
        help="make every row of this kind; rows without the fields that it needs are dropped")
    add("--exclude", nargs="+", default=[], metavar="SOURCE",
        help="evaluation sets whose prompts are not trained on (default mix: the usual benchmarks)")
    add("--heldout", type=float, default=100, metavar="N",
        help="held-out rows of each kind, at most a fifth of the kind; below 1: a share (default 100)")
    add("--max_chars", type=int, default=16000, metavar="N",
        help="drop longer rows, all fields counted (default 16000: some 4,000 tokens, which a judge prompt "
             "holds without cutting responses)")
    add("--tiny", metavar="DIR", help="write the rows of the tiny world (urpo.py does it by itself)")
    add("--pretrain_tiny", metavar="DIR", help="make its base model again, as it is in assets/tiny")
    add("--seed", type=int, default=0, help="of every random choice (default 0)")
    options = parser.parse_args(argv)
    chosen = [name for name in ("check", "out", "tiny", "pretrain_tiny") if getattr(options, name)]
    if len(chosen) != 1 or options.heldout < 0:
        parser.error("expected one of --out, --check, --tiny, --pretrain_tiny, and --heldout of 0 or more")
    if options.check:
        raise SystemExit(0 if check(options.check) else 1)
    {"out": lambda: prepare(options), "tiny": lambda: make_tiny(Path(options.tiny), options.seed),
     "pretrain_tiny": lambda: pretrain_tiny(Path(options.pretrain_tiny), options.seed)}[chosen[0]]()


if __name__ == "__main__":
    main()
