"""Converters of LIMA and WizardLM: dialogues that are kept whole.

Source: open-instruct `reformat_datasets.py` of November 2023.
"""

from tulu_jax.data.registry import Dropped
from tulu_jax.data.sources import messages


def lima(row: dict) -> dict | Dropped:
    """`conversations`: texts of user and assistant in turn; an odd last one is left out."""
    found = row.get("conversations")
    if not isinstance(found, list) or not all(isinstance(turn, str) for turn in found):
        raise ValueError(f"found columns {sorted(row)}; expected 'conversations', a list of texts")
    contents = [messages.text(turn, "a turn") for turn in found[: len(found) // 2 * 2]]
    if not contents:
        return Dropped("fewer than two turns")
    return messages.conversation(messages.dialogue(contents), messages.noted(row, "source"))


def wizardlm(row: dict) -> dict | Dropped:
    """`conversations`: `from` human and gpt in turn, an even number of them, with `value`."""
    found = messages.mappings(row, "conversations")
    senders, contents = [], []
    for turn in found:
        sender, content = messages.texts(turn, "from", "value")
        senders.append(sender)
        contents.append(content)
    if senders != ["human", "gpt"] * (len(found) // 2):
        raise ValueError(
            f"found turns from {senders[:6]}, {len(found)} in all; expected 'human' and 'gpt' in "
            "turn, an even number"
        )
    if not contents:
        return Dropped("fewer than two turns")
    return messages.conversation(messages.dialogue(contents), messages.noted(row, "idx"))
