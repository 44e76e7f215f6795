"""Converters of Orca rows: a system turn (always there, possibly empty), a question, a response."""

from tulu_jax.data.sources import turns


def open_orca(row: dict) -> dict:
    """`system_prompt`, `question`, `response`: Open-Orca's own columns."""
    contents = turns.texts(row, "system_prompt", "question", "response")
    return turns.example(_three(*contents), row, "id")


def preferred(row: dict) -> dict:
    """`input.messages` and the one message of `preferred_output`: Orca pairs, the better side."""
    given = row.get("input")
    if not isinstance(given, dict):
        raise ValueError(f"found columns {sorted(row)}; expected 'input', an object")
    found = turns.objects(given.get("messages"), "'input.messages'")
    found = found + turns.objects(row.get("preferred_output"), "'preferred_output'")
    read = [turns.texts(message, "role", "content") for message in found]
    roles = [role for role, _ in read]
    if roles != ["system", "user", "assistant"]:
        raise ValueError(f"found roles {roles[:6]}; expected system, user and assistant")
    return {"messages": _three(*(content for _, content in read))}


def _three(system: str, question: str, response: str) -> list[dict]:
    return [turns.message("system", system), *turns.dialogue([question, response])]
