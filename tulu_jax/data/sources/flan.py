"""Converters of FLAN v2, its chain-of-thought part and P3: a prompt and its target.

A prompt gets a newline at its end unless it has one or ends with a colon. (Outer whitespace is
stripped when a chat is encoded, so the rule shows only in the rows themselves.)
Source: open-instruct `reformat_datasets.py` of November 2023.
"""

from tulu_jax.data.sources import messages

P3_END = "<|endoftext|>"


def flan(row: dict) -> dict:
    """`inputs`, `targets`: the sampled FLAN v2 files and the submixtures they are drawn from."""
    prompt, target = messages.texts(row, "inputs", "targets")
    return _example(prompt, target, messages.noted(row, "task"))


def p3(row: dict) -> dict:
    """`prompt`, `completion`: T0's prompts; the end-of-text mark of the completion is taken off."""
    prompt, completion = messages.texts(row, "prompt", "completion")
    completion = completion.removesuffix(P3_END)
    return _example(prompt, completion, messages.noted(row, "template"))


def cot_fields(row: dict) -> dict:
    """`fields`: question, answer, rationale of a line of FLAN's own `cot_data`, where `\\n` is
    written out. The rationale comes first, then the answer; that wording is this project's."""
    fields = row.get("fields")
    if not isinstance(fields, list) or len(fields) != 3:
        raise ValueError(f"found columns {sorted(row)}; expected 'fields', three texts")
    question, answer, rationale = (
        messages.text(field, "a field").replace("\\n", "\n") for field in fields
    )
    return _example(question, f"{rationale}\nThe answer is {answer}.", {})


def _example(prompt: str, target: str, about: dict) -> dict:
    ended = prompt.endswith("\n") or prompt.rstrip().endswith(":")
    return messages.conversation(
        messages.dialogue([prompt if ended else prompt + "\n", target]), about
    )
