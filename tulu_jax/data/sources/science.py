"""Converter of AI2's science instructions: six tasks in one file, told apart by `dataset`."""

from tulu_jax.data.sources import messages

TASKS = (
    "evidence_inference",
    "qasper_truncated_4000",
    "scierc_ner",
    "scierc_relation",
    "scifact_json",
    "scitldr_aic",
)


def science(row: dict) -> dict:
    """`dataset`, one of `TASKS`, with `input` and `output`."""
    task, question, answer = messages.texts(row, "dataset", "input", "output")
    if task not in TASKS:
        raise ValueError(f"unknown science task {task!r}; expected one of {TASKS}")
    return messages.conversation(
        messages.dialogue([question, answer]), messages.noted(row, "dataset")
    )
