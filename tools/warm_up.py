"""A warm-up before RL: teach a weak model the form of an answer and of a judgement.

    python tools/warm_up.py MODEL --out FOLDER [--data FILES] [--seed N]
    python urpo.py --model FOLDER ...

A small model never finds the form by itself: SmolLM2-135M-Instruct writes no readable score block
in 16 tries, and with a worked example 6 in 16. Then nearly all groups earn nothing, and there is
nothing to learn from. MODEL is a folder or a name on the Hub, FILES are rows as urpo.py trains on
(data/train.jsonl unless told), with verifiable and preference rows. FOLDER is an ordinary Hugging
Face folder. It takes one device and some minutes; a model of 7B does not need it.

It is supervised training of 20 steps on the form alone, so that nothing about the truth is taught:
  * the model's own answer to a problem, with the last number that it says repeated in a box, be it
    right or wrong;
  * a judgement that says what each response claims, and then gives random scores.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # urpo.py stands one folder above

import torch

import urpo
from data_prep import LABELS, BadInput, final_answer, in_one_line, load_rows

LEARNING_RATE = 2e-5  # low: after 20 steps the form is there, and the answers are still its own
PROBLEMS, LISTS = 8, 4  # answers and judgements in a step; nearly all answers can be used


def own_answers(actor, problems: list[dict], config, ranks, rng) -> list[tuple[list[int], str]]:
    """(prompt, the model's greedy answer with its last number in a box) for some problems.

    All are answered before any step: a model that learns from what it says meanwhile drifts.
    """
    prompts = []
    for row in problems:
        prompts.append(urpo.verifiable_group(row, actor.tokenizer, rng, config).prompt_ids)
    limits = [config.max_new_tokens] * len(prompts)
    with ranks.unsharded(actor.model):  # one gathering of the weights, not one for every token
        answers = urpo.sample(
            actor.model, prompts, 1, limits, 0.0, actor.stop_ids, progress="answers"
        )

    pairs = []
    for prompt, [answer] in zip(prompts, answers):
        said = actor.text(answer.ids).strip().partition("\n\n")[0].rstrip()
        claim = final_answer(said)
        if claim and not answer.truncated:
            pairs.append((prompt, f"{said}\n\\boxed{{{claim}}}"))
    return pairs


def random_judgement(actor, row: dict, config, rng) -> tuple[list[int], str]:
    """(judge prompt, what each response claims, and then scores that are drawn at random)."""
    group = urpo.preference_group(row, actor.tokenizer, rng, config)
    claims, scores = [], []
    for label, text in zip(LABELS, group.judge.responses):
        claims.append(f"{label} says {final_answer(text)!r}.")
        scores.append(rng.randint(1, 10))
    return group.prompt_ids, " ".join(claims) + "\n" + urpo.JUDGE.write(scores)


def end_of_answer(actor, name: str) -> int:
    """The stop token that the chat template itself writes behind an answer: a model has several,
    and one that learns to end with another never ends as its template expects."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "probe"}]
    behind = actor.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("probe")[2]
    for token in actor.tokenizer(behind, add_special_tokens=False).input_ids:
        if token in actor.stop_ids:
            return token
    raise BadInput(f"{name}: its chat template ends an answer with {behind!r}, no stop token")


def warm_up(name: str, out: Path, files: list[str], seed: int, steps: int = 20) -> None:
    """Train the model `name` on the form and write it to `out`."""
    config, rng = urpo.Config(model=name, seed=seed), random.Random(f"{seed}/warm-up")
    ranks = urpo.Ranks(config)
    if ranks.world > 1:
        raise BadInput("the warm-up needs one device: start it with python, not with torchrun")

    rows = []
    for file in files:
        rows += load_rows(file, urpo.KINDS)
    problems = [row for row in rows if row["kind"] == "verifiable"]
    lists = [row for row in rows if row["kind"] == "preference"]
    if not problems or not lists:
        raise BadInput(f"--data {' '.join(files)}: expected verifiable and preference rows")

    actor = urpo.load_actor(name, config, ranks, trainable=True)
    config.judge_prompt_tokens = urpo.load_tokenizer(name)[1] // 2  # half of the model's context
    end = end_of_answer(actor, name)
    drawn = rng.choices(problems, k=PROBLEMS * steps)
    pairs = own_answers(actor, drawn, config, ranks, rng)
    for row in rng.choices(lists, k=LISTS * steps):
        pairs.append(random_judgement(actor, row, config, rng))
    rng.shuffle(pairs)

    optimizer = torch.optim.AdamW(actor.model.parameters(), lr=LEARNING_RATE)
    for step in range(steps):
        for prompt, text in pairs[step::steps]:
            target = actor.tokenizer(text, add_special_tokens=False).input_ids + [end]
            ids = torch.tensor([prompt + target], device=ranks.device)
            # the label -100 leaves a token out of the loss: the prompt is not learned
            labels = torch.tensor([[-100] * len(prompt) + target], device=ranks.device)
            actor.model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(actor.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with in_one_line(f"{out}: cannot be written"):
        urpo.export(actor, out, ranks)  # whole weights, also where they are sharded


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder or a name on the Hub")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the model is written")
    parser.add_argument("--data", nargs="+", default=["data/train.jsonl"], metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    warm_up(options.model, Path(options.out), options.data, options.seed)


if __name__ == "__main__":
    main()
