"""A continuation as it grows: its text, what of that may be shown, and where a stop string ends it.

Tokens are not pieces of text: a stop string may begin and end inside them, and a character may take
several. So the text of all ids is made again each time, and what may still change is held back.
"""

from collections.abc import Callable, Sequence

Detokenize = Callable[[list[int]], str]
BROKEN = "\ufffd"  # a character whose bytes are not all there


def stopped(
    ids: list[int], fresh: int, stop: Sequence[str], least: int, detokenize: Detokenize
) -> tuple[int, str] | None:
    """How many `ids` there are when the first of the strings `stop` is complete, not below `least`,
    and the text before it; None if there is none. The last `fresh` ids have not been looked at."""
    if not any(text in detokenize(ids) for text in stop):
        return None
    for count in range(max(len(ids) - fresh + 1, least, 1), len(ids) + 1):
        text = detokenize(ids[:count])
        places = [text.find(end) for end in stop if end in text]
        if places:
            return count, text[: min(places)]
    return None


def settled(text: str, stop: Sequence[str]) -> str:
    """What of the `text` of a continuation stays, whatever comes: without an incomplete character
    at its end, or what may be the beginning of a string of `stop`."""
    text = text.rstrip(BROKEN)
    held = max((n for end in stop for n in range(1, len(end)) if text.endswith(end[:n])), default=0)
    return text[: len(text) - held]
