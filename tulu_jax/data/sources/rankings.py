"""Ranked answers to one prompt, as in berkeley-nest/Nectar, made into pairs by a named rule."""

import itertools
import random
from collections.abc import Callable

from tulu_jax.data.registry import Dropped
from tulu_jax.data.sources import hh, messages

SEED = 42

Ranked = list[tuple[float, str, str, int]]  # (rank, answer, model, place in the row), best first


def _adjacent(ranked: Ranked, prompt: str):
    return itertools.pairwise(ranked)


def _best_vs_each(ranked: Ranked, prompt: str):
    return ((ranked[0], other) for other in ranked[1:])


def _best_vs_worst(ranked: Ranked, prompt: str):
    return [(ranked[0], ranked[-1])]


def _best_vs_random(ranked: Ranked, prompt: str):
    generator = random.Random(f"{SEED}/{prompt}".encode())
    return [(ranked[0], generator.choice(ranked[1:]))]


RULES: dict[str, Callable] = {
    "adjacent": _adjacent,
    "best_vs_each": _best_vs_each,
    "best_vs_worst": _best_vs_worst,
    "best_vs_random": _best_vs_random,
}


def nectar(row: dict, *, rule: str) -> Dropped | list[dict | Dropped]:
    """`prompt` and `answers` of `{"answer", "rank", "model"}`, rank 1 the best, to pairs.

    The rules: "adjacent" pairs each answer with the next, "best_vs_each" the best with every other
    one, "best_vs_worst" and "best_vs_random" the best with one. The last is TÜLU 2.5's for Nectar
    (arXiv 2406.09279); here it is drawn with a seed made of the prompt. Of equal ranks the earlier
    comes first, and a pair of them is dropped. A prompt is a dialogue "\\n\\nHuman: ...
    \\n\\nAssistant:", or else one user message. `about` has minus the ranks as scores.
    """
    if rule not in RULES:
        raise ValueError(f"rule = {rule!r}; expected one of {tuple(RULES)}")
    (prompt,) = messages.texts(row, "prompt")
    said = _prompt(prompt)
    if not said:
        return Dropped("no prompt")
    if said[-1]["role"] != "user":
        return Dropped("the prompt ends with an answer")
    answers = messages.mappings(row, "answers")
    if len(answers) < 2:
        return Dropped("fewer than two answers")
    ranked = [
        (messages.number(answer, "rank"), *messages.texts(answer, "answer", "model"), slot)
        for slot, answer in enumerate(answers)
    ]
    ranked.sort(key=lambda answer: answer[0])
    return [_pair(said, *two) for two in RULES[rule](ranked, prompt)]


def _prompt(text: str) -> list[dict]:
    """Nectar's prompts end where the answer begins, at an empty turn of the assistant."""
    if not hh.TURN.match(text):
        return [messages.message("user", text)]
    turns = hh.turns(text)
    return turns[:-1] if turns[-1] == messages.message("assistant", "") else turns


def _pair(prompt: list[dict], better, worse) -> dict | Dropped:
    if better[0] == worse[0]:
        return Dropped("equal ranks")
    return messages.pair(
        prompt,
        better[1],
        worse[1],
        score_chosen=-better[0],
        score_rejected=-worse[0],
        model_chosen=better[2],
        model_rejected=worse[2],
        slot_chosen=better[3],
        slot_rejected=worse[3],
    )
