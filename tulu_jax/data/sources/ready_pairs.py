"""Converters of preference sources that hold ready-made pairs: a raw row to prompt and two answers.

Each follows one upstream layout, named in its docstring.
"""

from tulu_jax.data.registry import Dropped
from tulu_jax.data.sources import messages

SIDES = ("chosen", "rejected")
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def ultrafeedback_binarized(row: dict) -> dict | Dropped:
    """`prompt`, `chosen`, `rejected` texts and `metadata` scores; ties are dropped."""
    prompt, chosen, rejected = messages.texts(row, "prompt", "chosen", "rejected")
    scores = messages.mapping(row, "metadata")
    return messages.scored(
        messages.pair([messages.message("user", prompt)], chosen, rejected),
        chosen=messages.number(scores, "score_chosen"),
        rejected=messages.number(scores, "score_rejected"),
        ties="drop",
    )


def conversations(row: dict, *, scores: tuple[str, str], ties: str) -> dict | Dropped:
    """`chosen` and `rejected`, each a whole conversation of messages, and their two score columns.

    HuggingFaceH4/ultrafeedback_binarized and its AI2 copy (`score_chosen`, `score_rejected`), and
    Argilla's (`chosen-rating`, `rejected-rating`).
    """
    example = messages.shared_prompt(*(messages.listed(row, side) for side in SIDES))
    example["about"] = messages.noted(row, "source", "prompt_id")
    chosen, rejected = (messages.number(row, name) for name in scores)
    return messages.scored(example, chosen=chosen, rejected=rejected, ties=ties)


def orca(row: dict) -> dict:
    """`system`, `question`, `chosen`, `rejected` texts (Intel); an empty system text is no turn."""
    system, question, chosen, rejected = messages.texts(
        row, "system", "question", "chosen", "rejected"
    )
    prompt = [messages.message("system", system)] if system.strip() else []
    return messages.pair([*prompt, messages.message("user", question)], chosen, rejected)


def openai(row: dict) -> dict:
    """`input.messages`, then `preferred_output` and `non_preferred_output` messages (OpenAI)."""
    return {
        "prompt": messages.listed(messages.mapping(row, "input"), "messages"),
        "chosen": messages.listed(row, "preferred_output"),
        "rejected": messages.listed(row, "non_preferred_output"),
    }


def stack_exchange(row: dict) -> dict:
    """`question`, and two answers of which `response_j` has more votes than `response_k`."""
    question, better, worse = messages.texts(row, "question", "response_j", "response_k")
    return messages.pair([messages.message("user", question)], better, worse)


def sharegpt(row: dict) -> dict:
    """`conversations` of `{"from", "value"}` and the turns `chosen` and `rejected` after them."""
    prompt = [_sharegpt_turn(turn) for turn in messages.mappings(row, "conversations")]
    chosen, rejected = (_sharegpt_turn(messages.mapping(row, side)) for side in SIDES)
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def alpaca(row: dict) -> dict:
    """`instruction` and `input`, joined by a blank line, and answers `chosen` and `rejected`."""
    instruction, context, chosen, rejected = messages.texts(
        row, "instruction", "input", "chosen", "rejected"
    )
    user = "\n\n".join(part for part in (instruction.strip(), context.strip()) if part)
    return messages.pair([messages.message("user", user)], chosen, rejected)


def _sharegpt_turn(turn: dict) -> dict:
    sender, text = messages.texts(turn, "from", "value")
    if sender not in SHAREGPT_ROLES:
        raise ValueError(f"unknown role {sender!r}; expected one of {sorted(SHAREGPT_ROLES)}")
    return messages.message(SHAREGPT_ROLES[sender], text)
