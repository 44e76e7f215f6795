"""The answers of OpenAI's completions and chat completions, from what a decoder gives."""

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from tulu_jax.decode.results import Piece, Score
from tulu_jax.serving.api_requests import Asked, Served

WINDOW = 5  # ids before one that its text may depend on
BROKEN = "\ufffd"  # of a character whose bytes are not all there
REASONS = {"stop_id": "stop", "stop": "stop", "length": "length"}


@dataclasses.dataclass(kw_only=True)
class Choice:
    """One continuation as it grows: all that came, and how it ended; where its prompt is echoed,
    that too."""

    prompt: list[int]
    echo: bool
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    text: str = ""
    ended: str | None = None
    score: Score | None = None  # of the prompt behind its first id

    def add(self, piece: Piece) -> None:
        self.ids += piece.ids
        self.logps += piece.logps
        self.text += piece.text
        self.ended = piece.ended


class Answer:
    """The texts of an answer to `asked`."""

    def __init__(self, asked: Asked, served: Served):
        self.asked, self.tokenizer = asked, served.tokenizer
        kind = "chat.completion" if asked.is_chat else "text_completion"
        chunk = ".chunk" if asked.stream and asked.is_chat else ""
        self.head = {
            "id": ("chatcmpl-" if asked.is_chat else "cmpl-") + uuid.uuid4().hex,
            "object": kind + chunk,
            "created": int(time.time()),
            "model": served.name,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole answer."""
        found = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return {**self.head, "choices": found, "usage": self.usage(choices)}

    def first(self, index: int) -> dict[str, Any]:
        """What a stream of a chat begins a choice with."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": index, "delta": delta, "finish_reason": None})

    def part(self, index: int, choice: Choice, piece: Piece) -> dict[str, Any]:
        """What a stream says of a `piece`, which is already added to its choice."""
        begin = len(choice.ids) - len(piece.ids)
        about = {"index": index, "finish_reason": REASONS.get(piece.ended)}
        if self.asked.is_chat:
            about["delta"] = {"content": piece.text}
        else:
            about["text"] = piece.text
        offset = len(choice.text) - len(piece.text)
        about["logprobs"] = self._logprobs(
            choice.ids,
            choice.logps,
            begin=begin,
            offset=offset,
            likeliest=None,
            is_whole=piece.ended is not None,
        )
        if self.asked.token_ids:
            about["token_ids"] = piece.ids
        return self._chunk(about)

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What a stream ends with, if usage is asked for."""
        return {**self.head, "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        samples = self.asked.sampling.samples if self.asked.sampling else 1
        read = sum(len(choice.prompt) for choice in choices[::samples])
        made = sum(len(choice.ids) for choice in choices)
        return {
            "prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made
        }  # fmt: skip

    def _chunk(self, choice: dict) -> dict[str, Any]:
        about = {**self.head, "choices": [choice]}
        return about | {"usage": None} if self.asked.include_usage else about

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        ids, logps, text, likeliest = choice.ids, choice.logps, choice.text, None
        if choice.echo:
            ids, text = [*choice.prompt, *ids], self.tokenizer.decode(choice.prompt) + text
        if choice.score is not None:
            score = choice.score
            tops = list(zip(score.likeliest, score.likeliest_logps, strict=True))
            likeliest = [None, *tops, *zip(choice.ids, choice.logps, strict=True)]
            logps = [None, *score.token_logps, *logps]
        about = {
            "index": index,
            "finish_reason": REASONS.get(choice.ended, "length"),
            "logprobs": self._logprobs(
                ids, logps, begin=0, offset=0, likeliest=likeliest, is_whole=True
            ),
        }
        if self.asked.is_chat:
            about["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            about["text"] = text
        if self.asked.token_ids:
            about["token_ids"] = choice.ids
            about["prompt_token_ids"] = choice.prompt
        return about

    def _logprobs(
        self, ids, logps, *, begin: int, offset: int, likeliest, is_whole: bool
    ) -> dict | None:
        """Log-probabilities of `ids` from `begin` on, in the form of the endpoint. `likeliest` are
        (id, log-probability) of each place; None: what is chosen is the likeliest."""
        if not self.asked.logprobs:
            return None
        decode = self._decode
        texts = token_texts(ids, begin, decode, is_whole=is_whole)
        ids, logps = ids[begin:], logps[begin:]
        tops: list[dict | None] = [None] * len(ids)
        if self.asked.top:
            pairs = likeliest or list(zip(ids, logps, strict=True))
            for n, (pair, own) in enumerate(zip(pairs, ids, strict=True)):
                if pair is not None:
                    best, logp = pair
                    said = texts[n] if best == own else decode([best])
                    if best != own and said == texts[n]:
                        said = f"token_id:{best}"  # another token of the same text
                    tops[n] = {said: logp}
        if not self.asked.is_chat:
            offsets = [offset]
            for text in texts:
                offsets.append(offsets[-1] + len(text))
            return {
                "tokens": texts, "token_logprobs": logps, "text_offset": offsets[:-1],
                "top_logprobs": tops if self.asked.top else None,
            }  # fmt: skip
        return {
            "content": [
                {
                    **_one(text, logp),
                    "top_logprobs": [_one(t, p) for t, p in (top or {}).items()],
                }
                for text, logp, top in zip(texts, logps, tops, strict=True)
            ],
            "refusal": None,
        }

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=False)


def _one(text: str, logp: float) -> dict:
    return {"token": text, "logprob": logp, "bytes": list(text.encode(errors="replace"))}


def token_texts(
    ids: Sequence[int], begin: int, decode: Callable[[Sequence[int]], str], *, is_whole: bool
) -> list[str]:
    """What each of `ids` from `begin` on adds to the text of those before it. A part of a character
    adds nothing until the last of them, or the end of what `is_whole`."""
    texts = []
    for n in range(begin, len(ids)):
        first = max(n - WINDOW, 0)
        before = decode(ids[first:n]).rstrip(BROKEN) if n else ""
        after = decode(ids[first : n + 1])
        if not (is_whole and n == len(ids) - 1):
            after = after.rstrip(BROKEN)
        follows = after.startswith(before)
        texts.append(after[len(before) :] if follows else decode(ids[n : n + 1]))
    return texts
