"""Converters of Open Assistant message trees: the path of best replies, or every path.

A row has `prompt`, the root message: `role` (prompter or assistant), `text`, `replies` (messages),
`deleted`, and, in the labelled export, `labels`. A path is an example if it ends with an assistant
message that has no replies. Deleted messages are skipped with all that answers them; a message
whose replies are all deleted is no end of a path, as upstream.
Source: open-instruct `reformat_datasets.py` of November 2023.
"""

from tulu_jax.data.registry import Dropped
from tulu_jax.data.sources import messages

ROLES = {"prompter": "user", "assistant": "assistant"}


def best_path(row: dict) -> dict | Dropped:
    """The path that follows, at every message, the reply with the highest mean human `quality`.

    A missing label counts as 0 and the first of equals wins, so a tree without labels gives its
    first replies.
    """
    node = _root(row)
    if node.get("deleted"):
        return Dropped("deleted prompt")
    path = [_message(node)]
    while replies := _replies(node):
        node = max((r for r in replies if not r.get("deleted")), key=_quality, default=None)
        if node is None:
            return Dropped("best replies end with deleted messages")
        path.append(_message(node))
    if path[-1]["role"] != "assistant":
        return Dropped("best replies end with the prompter")
    return _example(path, row)


def leaf_paths(row: dict) -> list[dict | Dropped]:
    """Every path in the order of the tree; beside it, what ends otherwise, by reason."""
    parts, path, waiting = [], [], [(_root(row), 0)]
    while waiting:
        node, depth = waiting.pop()
        if node.get("deleted"):
            parts.append(Dropped("deleted message"))
            continue
        path[depth:] = [_message(node)]
        replies = _replies(node)
        waiting += [(reply, depth + 1) for reply in reversed(replies)]
        if not replies:
            ended = path[-1]["role"] == "assistant"
            parts.append(
                _example(list(path), row) if ended else Dropped("path ends with the prompter")
            )
    return parts


def _example(path: list[dict], row: dict) -> dict:
    return messages.conversation(path, messages.noted(row, "message_tree_id"))


def _root(row: dict) -> dict:
    if not isinstance(row.get("prompt"), dict):
        raise ValueError(f"found columns {sorted(row)}; expected 'prompt', the root message")
    return row["prompt"]


def _replies(node: dict) -> list[dict]:
    return messages.mappings(node, "replies") if "replies" in node else []


def _message(node: dict) -> dict:
    content, role = messages.texts(node, "text", "role")
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; expected one of {tuple(ROLES)}")
    return messages.message(ROLES[role], content)


def _quality(reply: dict) -> float:
    labels = reply.get("labels")
    if labels is None:
        return 0.0
    label = labels.get("quality", {"value": 0.0}) if isinstance(labels, dict) else None
    value = label.get("value") if isinstance(label, dict) else None
    if not isinstance(value, int | float) or value != value:  # NaN
        raise ValueError("found a quality label without a number; expected labels.quality.value")
    return value
