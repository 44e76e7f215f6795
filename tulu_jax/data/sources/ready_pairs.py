"""Converters of preference sources that hold ready-made pairs: a raw row to prompt and two answers.

Each follows one upstream layout, named in its docstring.
"""

from tulu_jax.data.registry import Dropped
from tulu_jax.data.sources import columns, pairs

SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def ultrafeedback_binarized(row: dict) -> dict | Dropped:
    """`prompt`, `chosen`, `rejected` texts and `metadata` scores; ties are dropped."""
    prompt, chosen, rejected = columns.text(row, "prompt", "chosen", "rejected")
    scores = pairs.mapping(row, "metadata")
    return pairs.scored(
        pairs.text_pair([pairs.message("user", prompt)], chosen, rejected),
        chosen=pairs.number(scores, "score_chosen"),
        rejected=pairs.number(scores, "score_rejected"),
        ties="drop",
    )


def conversations(row: dict, *, scores: tuple[str, str], ties: str) -> dict | Dropped:
    """`chosen` and `rejected`, each a whole conversation of messages, and their two score columns.

    HuggingFaceH4/ultrafeedback_binarized and its AI2 copy (`score_chosen`, `score_rejected`), and
    Argilla's (`chosen-rating`, `rejected-rating`).
    """
    example = pairs.shared_prompt(pairs.messages(row, "chosen"), pairs.messages(row, "rejected"))
    example["about"] = pairs.labels(row, "source", "prompt_id")
    chosen, rejected = (pairs.number(row, name) for name in scores)
    return pairs.scored(example, chosen=chosen, rejected=rejected, ties=ties)


def orca(row: dict) -> dict:
    """`system`, `question`, `chosen`, `rejected` texts (Intel); an empty system text is no turn."""
    system, question, chosen, rejected = columns.text(
        row, "system", "question", "chosen", "rejected"
    )
    prompt = [pairs.message("system", system)] if system.strip() else []
    return pairs.text_pair([*prompt, pairs.message("user", question)], chosen, rejected)


def openai(row: dict) -> dict:
    """`input.messages`, then `preferred_output` and `non_preferred_output` messages (OpenAI)."""
    return {
        "prompt": pairs.messages(pairs.mapping(row, "input"), "messages"),
        "chosen": pairs.messages(row, "preferred_output"),
        "rejected": pairs.messages(row, "non_preferred_output"),
    }


def stack_exchange(row: dict) -> dict:
    """`question`, and two answers of which `response_j` has more votes than `response_k`."""
    question, better, worse = columns.text(row, "question", "response_j", "response_k")
    return pairs.text_pair([pairs.message("user", question)], better, worse)


def sharegpt(row: dict) -> dict:
    """`conversations` of `{"from", "value"}` and the turns `chosen` and `rejected` after them."""
    prompt = [_sharegpt_turn(turn) for turn in pairs.mappings(row, "conversations")]
    chosen, rejected = (_sharegpt_turn(pairs.mapping(row, side)) for side in ("chosen", "rejected"))
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def alpaca(row: dict) -> dict:
    """`instruction` and `input`, joined by a blank line, and answers `chosen` and `rejected`."""
    instruction, context, chosen, rejected = columns.text(
        row, "instruction", "input", "chosen", "rejected"
    )
    user = "\n\n".join(part for part in (instruction.strip(), context.strip()) if part)
    return pairs.text_pair([pairs.message("user", user)], chosen, rejected)


def _sharegpt_turn(turn: dict) -> dict:
    sender, text = columns.text(turn, "from", "value")
    if sender not in SHAREGPT_ROLES:
        raise ValueError(f"unknown role {sender!r}; expected one of {sorted(SHAREGPT_ROLES)}")
    return pairs.message(SHAREGPT_ROLES[sender], text)
