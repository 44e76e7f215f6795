"""Converter of ShareGPT conversations, split so that a chunk fits a number of Llama tokens.

Turns go in pairs (human, gpt); a turn costs its tokens, BOS among them, and 6 more. A chunk is
closed when the next pair would pass the limit; a pair that passes it alone is left out; so are an
odd last turn and chunks whose turns are not from "human" and "gpt" in turn (those with system or
bing turns, function calls, two answers in a row). Nothing else is touched: what looks like markup
in a text is text, for the `HTML_cleaned` files have had the page's own markup taken out and the
rest may be what the answer is about. A conversation that still has that markup, hence from the
other folder of the source, is left out.

The split that TÜLU was made with, `faithful`, has two slips, of which it loses pairs: a pair that
begins a new chunk and is the conversation's last is never written, and a pair that is left out for
its length counts as the start of the next chunk, so that its successor closes an empty one, and is
lost if it is the last.
Source: open-instruct `split_sharegpt_conversations.py` of November 2023.
"""

import functools
import hashlib
import os
from collections.abc import Callable

from tulu_jax.data import chat
from tulu_jax.data.registry import Dropped
from tulu_jax.data.sources import messages, readers

TURN_COST = 6
SENDERS = ("human", "gpt")
PAGE_MARKUP = '<div class="markdown'
TOKENIZER_VARIABLE = "TULU_JAX_LLAMA_TOKENIZER"
LLAMA_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"

LOST = "last pair of a conversation that begins a chunk"


def split_v2(row: dict) -> list[dict | Dropped]:
    """As TÜLU V2: chunks of at most 4,096 tokens."""
    return split(row, limit=4096, count=llama_tokens, faithful=True)


def split_v2_whole(row: dict) -> list[dict | Dropped]:
    """Chunks of at most 4,096 tokens, no pair lost but those over the limit."""
    return split(row, limit=4096, count=llama_tokens, faithful=False)


def split_v1(row: dict) -> list[dict | Dropped]:
    """As TÜLU V1: chunks of at most 2,048 tokens."""
    return split(row, limit=2048, count=llama_tokens, faithful=True)


def split(
    row: dict, *, limit: int, count: Callable[[str], int], faithful: bool
) -> list[dict | Dropped]:
    """`id` and `conversations` (`from`, `value`), as chunks; beside them what is left out, by
    reason. `count(text)` is the number of tokens, BOS among them.

    A chunk's id is that of the conversation, an underscore, and the number of its first turn.
    """
    found = messages.mappings(row, "conversations")
    read = [messages.texts(turn, "from", "value") for turn in found]
    if any(value.lstrip().startswith(PAGE_MARKUP) for _, value in read):
        return [Dropped("markup of the shared page")]
    if len(read) < 2:
        return [Dropped("fewer than two turns")]
    costs = [count(value) + TURN_COST for _, value in read[: len(read) // 2 * 2]]
    pair_costs = [sum(pair) for pair in zip(costs[::2], costs[1::2], strict=True)]
    parts = []
    for pairs, reason in cut(pair_costs, limit=limit, faithful=faithful):
        start, chunk = 2 * pairs.start, read[2 * pairs.start : 2 * pairs.stop]
        reason = reason or _wrong_senders([sender for sender, _ in chunk])
        parts.append(Dropped(reason) if reason else _example(row, start, chunk))
    if len(read) % 2:
        parts.append(Dropped("odd last turn"))
    return parts


def cut(costs: list[int], *, limit: int, faithful: bool) -> list[tuple[range, str | None]]:
    """Ranges of pairs in order, all pairs in one, each a chunk (None) or left out for a reason.

    >>> cut([5, 5, 5], limit=10, faithful=False)
    [(range(0, 2), None), (range(2, 3), None)]
    >>> cut([5, 5, 5], limit=10, faithful=True)
    [(range(0, 2), None), (range(2, 3), 'last pair of a conversation that begins a chunk')]
    """
    ranges, start, used, closed = [], 0, 0, False
    for pair, cost in enumerate(costs):
        closed = used + cost > limit
        if closed:
            ranges += [(range(start, pair), None)] if start < pair else []
            start, used = pair, 0
        if cost > limit:
            ranges.append((range(pair, pair + 1), f"pair of over {limit} tokens"))
            start = pair + 1
        used += cost if faithful or cost <= limit else 0
    if start < len(costs):
        ranges.append((range(start, len(costs)), LOST if faithful and closed else None))
    return ranges


def llama_tokens(text: str) -> int:
    """The number of Llama tokens of `text`, BOS among them.

    The tokenizer is Llama's own `tokenizer.model` (that of Llama 2 is the same file), at the path,
    or in the folder, that the environment variable TULU_JAX_LLAMA_TOKENIZER names.
    """
    return len(_llama(os.environ.get(TOKENIZER_VARIABLE)).encode(text)) + 1


@functools.cache
def _llama(path: str | None) -> chat.ChatTokenizer:
    wanted = f"set {TOKENIZER_VARIABLE} to Llama's tokenizer.model, or to its folder"
    if not path:
        raise FileNotFoundError(
            f"ShareGPT is split by Llama tokens and no tokenizer is named; {wanted}"
        )
    file = readers.as_path(path)
    file = file / "tokenizer.model" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {wanted}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != LLAMA_SHA256:
        raise FileNotFoundError(
            f"{file}: found another tokenizer (sha256 {found}), expected Llama's "
            f"({LLAMA_SHA256}), whose counts decide where conversations are split; {wanted}"
        )
    return chat.load_tokenizer(str(file))


def _wrong_senders(senders: list[str]) -> str | None:
    for sender in ("system", "bing"):
        if sender in senders:
            return f"chunk with a {sender} turn"
    expected = [SENDERS[index % 2] for index in range(len(senders))]
    return None if senders == expected else "chunk not from human and gpt in turn"


def _example(row: dict, start: int, chunk: list[list[str]]) -> dict:
    about = {name: f"{value}_{start}" for name, value in messages.noted(row, "id").items()}
    return messages.conversation(messages.dialogue([value for _, value in chunk]), about)
