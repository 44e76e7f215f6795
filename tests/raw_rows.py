"""Raw rows for tests."""

import json
import pathlib


def identity(row: dict) -> dict:
    return row


def read_rows(path, where=None) -> list[dict]:
    """The rows of a file, without where they are in it."""
    from tulu_jax.data.sources import readers

    return [row for _, row in readers.read_placed(str(path), where)]


def write_jsonl(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def messages(*texts: str) -> list[dict]:
    """User and assistant in turn."""
    return [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(texts)
    ]


def chats(count: int) -> list[dict]:
    """Distinct one-turn conversations."""
    return [{"messages": messages(f"question {i}", f"answer {i}")} for i in range(count)]


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {
        "prompt": messages(prompt),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
