"""Converters of instruction sources: one raw row to `{"messages": [...]}` or `Dropped`."""

from tulu_jax.data.registry import Dropped
from tulu_jax.data.sources import columns


def alpaca(row: dict) -> dict:
    """`instruction`, `input`, `output` (Stanford, GPT-4 and Code Alpaca, re-keyed Dolly).

    The user turn is the instruction, then a blank line and the input if there is one.
    """
    instruction, context, output = columns.text(row, "instruction", "input", "output")
    user = "\n\n".join(part for part in (instruction.strip(), context.strip()) if part)
    return {"messages": [_message("user", user), _message("assistant", output)]}


def lima(row: dict) -> dict | Dropped:
    """`conversations`: texts of user and assistant in turn; an odd last one is left out."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"found columns {sorted(row)}; expected 'conversations', a list of texts")
    turns = turns[: len(turns) // 2 * 2]
    if not turns:
        return Dropped("fewer than two turns")
    roles = ("user", "assistant")
    return {"messages": [_message(roles[i % 2], turn) for i, turn in enumerate(turns)]}


def oasst_tree(row: dict) -> dict | Dropped:
    """An Open Assistant message tree: the chain of best replies, if it ends with the assistant.

    At every message the reply with the highest mean human `quality` is followed; a missing label
    counts as 0 and the first of equals wins, so a tree without labels gives its first replies.
    Deleted messages are skipped. Source: open-instruct `reformat_datasets.py` of November 2023.
    """
    node = row.get("prompt")
    if not isinstance(node, dict):
        raise ValueError(f"found columns {sorted(row)}; expected 'prompt', the root message")
    if node.get("deleted"):
        return Dropped("deleted prompt")
    messages = []
    while node is not None:
        text, role = columns.text(node, "text", "role")
        if role not in ("prompter", "assistant"):
            raise ValueError(f"unknown role {role!r}; expected 'prompter' or 'assistant'")
        messages.append(_message("user" if role == "prompter" else "assistant", text))
        replies = [reply for reply in node.get("replies", []) if not reply.get("deleted")]
        node = max(replies, key=_quality, default=None)
    if messages[-1]["role"] != "assistant":
        return Dropped("best replies end with the prompter")
    return {"messages": messages}


def _quality(reply: dict) -> float:
    return reply.get("labels", {}).get("quality", {}).get("value", 0.0)


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}
