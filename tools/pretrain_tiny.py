"""How the rows and the model in assets/tiny were made:

    python tools/pretrain_tiny.py FOLDER [--seed N]
    python urpo.py --preset tiny --model FOLDER --data FOLDER/train.jsonl.gz

The tiny world is a little language about capitals. Its facts and its true quality are in
data_prep.py. Here are its rows, the people whose work the model was pretrained on, its tokenizer,
and 1,600 steps of pretraining: about four minutes on one core. What is in assets/tiny has seed 0.
"""

import argparse
import gzip
import itertools
import json
import random
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # urpo.py stands one folder above

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import urpo
from data_prep import CAPITALS, PLACES, TINY_WISH, as_messages, load_rows, tiny_quality

FAMOUS = {place[0]: place[2] for place in PLACES if len(place) > 2}  # what many people say
COUNTRIES = list(CAPITALS)
ASKED, COUNTED = 3, 5  # countries in an instruction, and in a counting problem
LIST_SIZES = (2, 3)  # responses in a judge prompt: more places than a tiny model can keep apart
TINY = {"source": "tiny"}


# ---------------------------------------------------------------------------- the rows
def tiny_instruction(rng, held_out: bool, plain: bool = False) -> str:
    """One combination of countries in five is held out. `plain`: none with a FAMOUS city."""
    while True:
        places = rng.sample(range(len(COUNTRIES) - plain * len(FAMOUS)), ASKED)
        if (sum(places) % 5 == 0) == held_out:
            named = " ".join(COUNTRIES[place] for place in places)
            return f"{rng.choice(['List', 'Name'])} the capitals of {named}"


def wrong_city(rng, country: str, used: list[str]) -> str:
    """Another country's capital that is not yet `used`: a city stands once in a text."""
    return rng.choice([c for c in CAPITALS.values() if c not in (CAPITALS[country], *used)])


def tiny_response(rng, instruction: str, known: float) -> str:
    """What a person answers who knows a country with this chance: half of the time its famous city,
    if it has one."""
    words: list[str] = []
    for country in TINY_WISH.search(instruction)[1].split():
        city = CAPITALS[country]
        if rng.random() > known:
            city = wrong_city(rng, country, words)
        elif country in FAMOUS and rng.random() < 0.5:
            city = FAMOUS[country]
        words += [country, city]
    return " ".join(words)


def tiny_responses(rng, instruction: str, count: int) -> list[str]:
    """Answers of different people, from one who knows next to nothing to one who knows all."""
    return [tiny_response(rng, instruction, rng.choice((0.1, 0.4, 0.7, 1))) for _ in range(count)]


def tiny_problem(rng, count: int) -> str:
    """`count` of its pairs are true. One country has a famous city, and either it or the capital is
    shown, so that the verdict tells: two wrong beliefs would make a right number."""
    easy, hard = rng.sample(COUNTRIES[: -len(FAMOUS)], COUNTED - 1), rng.choice(list(FAMOUS))
    tempting = count < COUNTED and (count == 0 or rng.random() < 0.5)
    right = rng.sample(easy, count if tempting else count - 1)
    countries = rng.sample([*easy, hard], COUNTED)
    words: list[str] = []
    for country in countries:
        city = CAPITALS[country]
        if country == hard:
            city = FAMOUS[country] if tempting else city
        elif country not in right:
            city = wrong_city(rng, country, words + [CAPITALS[other] for other in [*right, hard]])
        words += [country, city]
    return f"Count the true pairs in: {' '.join(words)}"


def tiny_row(rng, kind: str, held_out: bool, number: int) -> dict:
    """One task. No two answers of a preference row have the same quality: all pairs teach."""
    if kind == "verifiable":
        count = number % (COUNTED + 1)  # all answers are as frequent
        return {"kind": kind, "prompt": tiny_problem(rng, count), "answer": str(count)} | TINY
    text = tiny_instruction(rng, held_out, plain=kind == "preference" and not held_out)
    if kind == "open":
        return {"kind": kind, "prompt": text} | TINY
    size, scores = rng.choice(LIST_SIZES), []
    while len(set(scores)) < size:
        responses = tiny_responses(rng, text, size)
        scores = [round(10 * tiny_quality(text, response), 2) for response in responses]
    return {"kind": kind, "prompt": text, "responses": responses, "scores": scores} | TINY


# Rows of each kind in train.jsonl.gz and heldout.jsonl.gz.
TINY_ROWS = {
    "train": {"verifiable": 2500, "preference": 2500, "open": 2500},
    "heldout": {"verifiable": 300, "preference": 200, "open": 200},
}


def make_rows(out: Path, seed: int = 0) -> None:
    """Write OUT/train.jsonl.gz and OUT/heldout.jsonl.gz. Nothing held out is trained on."""
    out.mkdir(parents=True, exist_ok=True)
    problems = set()
    for name, counts in TINY_ROWS.items():
        rng, rows = random.Random(f"{seed}/tiny/{name}"), []
        for kind, count in counts.items():
            while sum(row["kind"] == kind for row in rows) < count:
                row = tiny_row(rng, kind, name == "heldout", len(rows))
                if kind != "verifiable" or row["prompt"] not in problems:
                    rows.append(row)
                    problems.add(row["prompt"])
        text = "".join(json.dumps(row) + "\n" for row in rows)
        packed = gzip.compress(text.encode(), mtime=0)  # no date in it: the same bytes always
        (out / f"{name}.jsonl.gz").write_bytes(packed)


def tiny_popular(prompt_text: str) -> str:
    """What most people answer: the famous city where a country has one, else its capital."""
    countries = TINY_WISH.search(prompt_text)[1].split()
    return " ".join(f"{country} {FAMOUS.get(country, CAPITALS[country])}" for country in countries)


def trivial_scores(rows: list[dict]) -> dict[str, float]:
    """What the best trivial strategy gets on held-out rows: one answer to all problems; the first
    place, the longest or the shortest response; in the tiny world, what most people say."""
    answers, longer, quality = Counter(), [], []
    for row in rows:
        if row["kind"] == "verifiable":
            answers[row["answer"]] += 1
        elif row["kind"] == "preference":
            scored = [(score, len(text)) for score, text in zip(row["scores"], row["responses"])]
            for (score, length), (other, its_length) in itertools.permutations(scored, 2):
                if score > other:
                    longer.append((length > its_length) - (length < its_length))
        elif row.get("source") == "tiny":
            asked = row["prompt"][-1]["content"]
            quality.append(tiny_quality(asked, tiny_popular(asked)))
    scores = {}
    if answers:
        scores["verifiable_accuracy"] = max(answers.values()) / answers.total()
    if longer:
        wins = max(longer.count(1), longer.count(-1)) / len(longer)
        scores["referee_accuracy"] = max(0.5, wins)  # each list is shown in both orders: places
        scores["referee_tau"] = abs(statistics.fmean(longer))
        scores["parse_rate"] = 1.0  # the same block always
    if quality:
        scores["true_quality"] = statistics.fmean(quality)
    return scores


# ------------------------------------------------------------- the people, and their model
CAREFUL = 0.5  # share of people who go through a list pair by pair, and of critics
ACCEPTED = 0.3  # how often people take a capital for right, and as often the more famous city


def tiny_walk(rng, words: list[str]) -> tuple[list[str], int]:
    """The careful way through a list: every city, yes or no. -> (its words, how many yes)"""
    walk = []
    for country, city in zip(words[::2], words[1::2]):
        right = city == CAPITALS[country]
        if country in FAMOUS and (right or city == FAMOUS[country]):
            right = rng.random() < ACCEPTED  # nobody is sure, and next time it may be the other
        walk += [city, "yes" if right else "no"]
    return walk, walk.count("yes")


def tiny_count(rng, problem: str, careful: float) -> str:
    """A worked answer to a counting problem, or a random number."""
    walk, count = tiny_walk(rng, problem.partition(": ")[2].split())
    if rng.random() < careful:
        return " ".join([*walk, "\\boxed{", str(count), "}"])
    return f"\\boxed{{ {rng.randint(0, COUNTED)} }}"


def tiny_judgement(rng, responses: list[str], careful: float) -> str:
    """A critique (the careful alone; a line each, "A Paris yes Sydney no 1"), and the scores."""
    lines, scores = [], []
    if rng.random() < careful:
        for label, response in zip("ABC", responses):
            walk, count = tiny_walk(rng, response.split())
            lines.append(" ".join([label, *walk, str(count)]))
            share = count / (len(walk) / 2)
            scores.append(min(10, max(1, round(1 + 9 * share + rng.gauss(0, 0.3)))))
    else:  # what comes first looks better; the spread is so wide that it is mostly chance
        looks = [rng.gauss(0, 3) - place for place in range(len(responses))]
        marks = sorted(rng.sample(range(1, 11), len(responses)))
        scores = [marks[sorted(looks).index(look)] for look in looks]
    return "\n".join([*lines, urpo.JUDGE.write(scores)])


TINY_CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_fixed_text() -> list[str]:
    """The passages of judge and problem prompts that never change: each becomes one token. They are
    found by calling the template with probes."""
    nonce, probe, passages = "0a0a0a", "probe probe", []
    for count in range(1, 5):
        question = [{"role": "user", "content": probe}]
        text = urpo.JUDGE.messages(question, [probe] * count, nonce)[0]["content"]
        passages += [part.strip() for part in re.split(rf"\[{nonce}\]|{probe}", text)]
    return [p for p in dict.fromkeys([urpo.BOX, *passages]) if len(p.split()) > 2]


def tiny_tokenizer():
    """A word is a token; so are a newline and each fixed passage. Unknown words are [UNK]."""
    special = ["<|pad|>", "<|end|>", "[UNK]", "<|system|>", "<|user|>", "<|assistant|>"]
    words = ["\n", *"List Name the capitals of Count true pairs in: yes no".split()]
    words += "Instruction Response End".split()
    words += "<scores> </scores> \\boxed{ }".split()
    words += [*map(str, range(11)), *"ABCD", "A:", "B:", "C:", "D:", *CAPITALS, *CAPITALS.values()]
    words += FAMOUS.values()
    vocabulary = {token: i for i, token in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words with spaces
    tokenizer.add_special_tokens([AddedToken(t, lstrip=True, rstrip=True) for t in special])
    tokenizer.add_tokens(
        [AddedToken(p, lstrip=True, rstrip=True, normalized=False) for p in tiny_fixed_text()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="[UNK]",
        chat_template=TINY_CHAT,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def tiny_demonstrations(rng, count: int, careful: float, sizes: tuple[int, ...]):
    """(chat messages, completion) pairs to pretrain on, through the trainer's own prompts."""
    pairs = []
    for _ in range(count):  # judging is the hardest
        kind = rng.choices(("judge", "count", "list"), (0.5, 0.35, 0.15))[0]
        if kind == "count":
            text = tiny_problem(rng, rng.randint(0, COUNTED))
            pairs.append((as_messages(f"{text}\n{urpo.BOX}"), tiny_count(rng, text, careful)))
            continue
        text = tiny_instruction(rng, held_out=False)
        messages = as_messages(text)
        if kind == "list":
            pairs.append((messages, tiny_response(rng, text, known=0.65)))
            continue
        responses = tiny_responses(rng, text, rng.choice(sizes))
        nonce = f"{rng.getrandbits(24):06x}"
        judgement = tiny_judgement(rng, responses, careful)
        pairs.append((urpo.JUDGE.messages(messages, responses, nonce), judgement))
    return pairs


def muon_step(matrices, momenta, lr: float) -> None:
    """One step of Muon (orthogonalized momentum, Jordan 2024); one shape goes as one stack."""
    for shape in dict.fromkeys(m.shape for m in matrices):
        same = [m for m in matrices if m.shape == shape]
        gradient = torch.stack([m.grad for m in same])
        momentum = momenta.setdefault(shape, torch.zeros_like(gradient)).lerp_(gradient, 0.05)
        update = gradient.lerp(momentum, 0.95)  # Nesterov
        update = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):  # Newton-Schulz, Muon's coefficients: singular values go to about 1
            square = update @ update.mT
            update = 3.4445 * update + (2.0315 * square @ square - 4.775 * square) @ update
        for matrix, change in zip(same, update):  # 0.2 sqrt(n): the size of an AdamW step
            matrix.data.sub_(change, alpha=lr * 0.2 * max(shape) ** 0.5)


def pretrain_tiny(out: Path, seed: int = 0, steps: int = 1600) -> None:
    """Make the base model of assets/tiny: tokenizer, pretraining, one Hugging Face folder."""
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed), tiny_tokenizer()
    end, batch, rate = tokenizer.eos_token_id, 32, 4e-3
    # Llama, for with model_type qwen2 AutoTokenizer insists on Qwen2's own tokenizer class
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=256,
            max_position_embeddings=256,
            rope_theta=1000.0,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    adam = torch.optim.AdamW(others, weight_decay=0.0)
    momenta, batches = {}, []
    for step in (bar := tqdm(range(steps), desc="pretraining")):
        if not batches:  # 50 batches of new demonstrations, sorted by length: little padding
            # careful work alone teaches the skill, on lists of one, then two; the rest is people
            done = step / steps
            sizes = (1,) if done < 0.15 else (1, 2) if done < 0.3 else LIST_SIZES
            pairs = tiny_demonstrations(rng, 50 * batch, 1.0 if done < 0.6 else CAREFUL, sizes)
            prompts = [
                tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False)
                for m, _ in pairs
            ]
            answers = [text + "<|end|>" for _, text in pairs]
            rows = sorted(
                zip(tokenizer(prompts).input_ids, tokenizer(answers).input_ids),
                key=lambda row: len(row[0]) + len(row[1]),
            )
            batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            rng.shuffle(batches)
        rows = batches.pop()
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        # padding on the right needs no attention mask: nothing real is behind it
        padding = [longest - len(prompt) - len(answer) for prompt, answer in rows]
        ids = torch.tensor([p + a + [end] * n for (p, a), n in zip(rows, padding)])
        labels = [[-100] * len(p) + a + [-100] * n for (p, a), n in zip(rows, padding)]
        labels = torch.tensor(labels)  # only answers are learned
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        now = rate * min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
        adam.param_groups[0]["lr"] = now
        adam.step()
        muon_step(matrices, momenta, now)
        bar.set_postfix(loss=f"{loss.item():.2f}")
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)  # half the size; the trainer computes in float32
    tokenizer.save_pretrained(out)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="FOLDER", help="where rows and model are written")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    make_rows(Path(options.out), options.seed)
    trivial = trivial_scores(load_rows(f"{options.out}/heldout.jsonl.gz"))
    print("the best fixed rule:", {name: round(score, 3) for name, score in trivial.items()})
    pretrain_tiny(Path(options.out), options.seed)


if __name__ == "__main__":
    main()
