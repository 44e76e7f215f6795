"""Converter of rows that are conversations already, as AI2 published its mixtures."""

from tulu_jax.data.sources import turns

ROLES = ("system", "user", "assistant")


def published(row: dict) -> dict:
    """`dataset`, `id` and `messages` with `role` and `content`; empty contents are kept."""
    turns.texts(row, "dataset", "id")
    messages = []
    for found in turns.objects(row.get("messages"), "'messages'"):
        role, content = turns.texts(found, "role", "content")
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}; expected one of {ROLES}")
        messages.append(turns.message(role, content))
    if not messages:
        raise ValueError("found no messages; expected at least one")
    return turns.example(messages, row, "dataset", "id")
