"""Converters of Orca rows: a system turn (always there, possibly empty), a question, a response."""

from tulu_jax.data.sources import messages


def open_orca(row: dict) -> dict:
    """`system_prompt`, `question`, `response`: Open-Orca's own columns."""
    system, question, response = messages.texts(row, "system_prompt", "question", "response")
    said = [messages.message("system", system), *messages.dialogue([question, response])]
    return messages.conversation(said, messages.noted(row, "id"))


def preferred(row: dict) -> dict:
    """`input.messages` and the one message of `preferred_output`: Orca pairs, the better side."""
    said = messages.listed(messages.mapping(row, "input"), "messages")
    said += messages.listed(row, "preferred_output")
    roles = [message["role"] for message in said]
    if roles != ["system", "user", "assistant"]:
        raise ValueError(f"found roles {roles[:6]}; expected system, user and assistant")
    return messages.conversation(said, {})
