"""Anthropic's HH-RLHF: two dialogues as texts, which differ in the assistant's last turn."""

import re

from tulu_jax.data.registry import Dropped
from tulu_jax.data.sources import messages

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_rlhf(row: dict) -> dict | Dropped:
    """`chosen` and `rejected` dialogues; what they share is found by turns, not by characters.

    Two answers that begin alike keep their beginnings. Pairs that part before their last turn, or
    whose last turn is the human's, are dropped: they compare no two answers to one prompt.
    """
    chosen, rejected = (turns(text) for text in messages.texts(row, "chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        return Dropped("sides part before their last turn")
    if "user" in (chosen[-1]["role"], rejected[-1]["role"]):
        return Dropped("ends with the human")
    if len(chosen) == 1:
        return Dropped("no prompt")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def turns(text: str) -> list[dict]:
    """The messages of "\\n\\nHuman: ... \\n\\nAssistant: ...", without outer whitespace.

    Raises `ValueError` unless the text begins with a turn.
    """
    before, *rest = TURN.split(text)
    if before.strip() or not rest:
        raise ValueError(
            f"a dialogue begins with {text[:40]!r}; expected '\\n\\nHuman:' or '\\n\\nAssistant:'"
        )
    return [
        messages.message(ROLES[speaker], content.strip())
        for speaker, content in zip(rest[::2], rest[1::2], strict=True)
    ]
