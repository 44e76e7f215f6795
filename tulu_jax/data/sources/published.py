"""Converter of rows that are conversations already, as AI2 published its mixtures."""

from tulu_jax.data.sources import messages

ROLES = ("system", "user", "assistant")


def published(row: dict) -> dict:
    """`dataset`, `id` and `messages` with `role` and `content`; empty contents are kept."""
    messages.texts(row, "dataset", "id")
    said = messages.listed(row, "messages")
    unknown = [message["role"] for message in said if message["role"] not in ROLES]
    if unknown:
        raise ValueError(f"unknown role {unknown[0]!r}; expected one of {ROLES}")
    if not said:
        raise ValueError("found no messages; expected at least one")
    return messages.conversation(said, messages.noted(row, "dataset", "id"))
