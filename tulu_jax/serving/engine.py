"""What evaluates takes an `Engine`: something that continues prompts and scores continuations.

There are two: `OwnEngine`, parameters and our decoder, and `openai_engine.OpenAIEngine`, any server
that speaks OpenAI's protocol. Both are given ids, so that both see the same ones. Over the first of
them, `best_of.BestOfEngine` chooses among several answers.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from tulu_jax import validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.decoder import Decoder
from tulu_jax.decode.results import Result, Score
from tulu_jax.decode.sampling import Sampling

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """A continuation: its text, without what ended it; why it ended, 'stop' or 'length'; and where
    they are known its ids and their log-probabilities, with those of what ended it."""

    text: str
    ended: str
    ids: list[int] | None
    token_logps: list[float] | None


Done = Callable[[int, list[Reply]], None]  # of a prompt, by its place: all its continuations


@runtime_checkable
class Engine(Protocol):
    """Continues and scores any number of requests, of any length up to `max_length` positions of
    prompt and continuation (None: not told)."""

    max_length: int | None

    def generate(
        self,
        prompts: Sequence[Ids | str],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None,
        done: Done | None = None,
    ) -> list[list[Reply]]:
        """The `sampling.samples` continuations of each prompt, which also ends at the `</s>` of the
        tokenizer. `seeds` has one for each prompt, None where nothing is drawn. A text is a prompt
        with its BOS before it. `done` is told of each prompt as soon as all of its have ended.
        Raises `UsageError`."""

    def score(self, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> list[Score]:
        """The score of each continuation after the prompt of the same place. Raises
        `UsageError`."""


def chat_prompt(
    messages: list[dict], tokenizer: chat_lib.ChatTokenizer, *, chat: str, prefix: str = ""
) -> list[int]:
    """Ids from which the assistant goes on, its answer beginning with `prefix`, such as
    "The answer is:"."""
    return chat_lib.generation_prompt(messages, tokenizer, chat=chat, prefix=prefix)


def chat_continuations(
    messages: list[dict],
    texts: Sequence[str],
    tokenizer: chat_lib.ChatTokenizer,
    *,
    chat: str,
    prefix: str = "",
) -> list[tuple[list[int], list[int]]]:
    """(prompt, continuation) of each of `texts` behind `prefix`, for `score`, as `continuations`
    has them."""

    def encode(text: str) -> list[int]:
        return chat_prompt(messages, tokenizer, chat=chat, prefix=text)

    return continuations(encode, texts, prefix=prefix)


def continuations(
    encode: Callable[[str], list[int]], texts: Sequence[str], *, prefix: str
) -> list[tuple[list[int], list[int]]]:
    """(prompt, continuation) of each of `texts` behind `prefix`; `encode` gives the ids of a prompt
    that ends with a text.

    The whole is encoded, as it would have been in training. Where the end of the prompt and the
    beginning of a text are one token, that token belongs to the continuation. Raises `UsageError`
    for a text that adds no token.
    """
    prompt, found = encode(prefix), []
    for text in texts:
        whole = encode(prefix + text)
        at = next((n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), None)
        at = min(len(prompt), len(whole)) if at is None else at
        if at == len(whole):
            raise validation.UsageError(
                f"the continuation {text!r} adds no token to its prompt; expected a text"
            )
        found.append((whole[:at], whole[at:]))
    return found


def replies(
    engine: Engine,
    conversations: Sequence[list[dict]],
    sampling: Sampling,
    tokenizer: chat_lib.ChatTokenizer,
    *,
    chat: str,
    seeds: Sequence[int] | None = None,
) -> list[str]:
    """The assistant's next turn in each conversation, stripped; of several samples one after the
    other."""
    prompts = [chat_prompt(messages, tokenizer, chat=chat) for messages in conversations]
    found = engine.generate(prompts, sampling, seeds=seeds)
    return [reply.text.strip() for samples in found for reply in samples]


def with_seeds(prompts: Sequence, sampling: Sampling, seeds: Sequence[int] | None) -> list[int]:
    """A seed of each prompt. Raises `UsageError` where some are missing."""
    if seeds is None and sampling.temperature == 0:
        return [0] * len(prompts)
    if seeds is None or len(seeds) != len(prompts):
        count = "no" if seeds is None else len(seeds)
        raise validation.UsageError(
            f"there are {count} seeds for {len(prompts)} prompts at temperature "
            f"{sampling.temperature}; give one for each"
        )
    return list(seeds)


class OwnEngine:
    """Our decoder with the parameters of a model, on the mesh on which they are, if any."""

    def __init__(
        self,
        decoder: Decoder,
        params: dict,
        tokenizer: chat_lib.ChatTokenizer,
        *,
        mesh: jax.sharding.Mesh | None,
    ):
        self.decoder, self.params, self.tokenizer, self.mesh = decoder, params, tokenizer, mesh
        self.max_length = decoder.max_length

    def generate(
        self,
        prompts: Sequence[Ids | str],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None,
        done: Done | None = None,
    ) -> list[list[Reply]]:
        """As `Engine` has it; a prompt's samples draw from `jax.random.key` of its seed."""
        seeds = with_seeds(prompts, sampling, seeds)
        if not prompts:
            return []
        ids = [
            [self.tokenizer.bos_id, *self.tokenizer.encode(p)] if isinstance(p, str) else p
            for p in prompts
        ]
        stop_ids = tuple(dict.fromkeys((self.tokenizer.eos_id, *sampling.stop_ids)))
        replies: list[dict[int, Reply]] = [{} for _ in prompts]

        def ended(result):
            replies[result.prompt][result.sample] = _reply(result)
            if done is not None and len(replies[result.prompt]) == sampling.samples:
                done(result.prompt, _in_order(replies[result.prompt]))

        with self._on_mesh():
            self.decoder.generate(
                self.params,
                ids,
                dataclasses.replace(sampling, stop_ids=stop_ids),
                jnp.stack([jax.random.key(seed) for seed in seeds]),
                detokenize=self.tokenizer.decode,
                ended=ended,
            )
        return [_in_order(samples) for samples in replies]

    def score(self, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> list[Score]:
        """As `Engine` has it."""
        with self._on_mesh():
            return self.decoder.score(self.params, prompts, continuations)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def _reply(result: Result) -> Reply:
    ended = "length" if result.ended == "length" else "stop"
    return Reply(text=result.text, ended=ended, ids=result.ids, token_logps=result.logps)


def _in_order(samples: dict[int, Reply]) -> list[Reply]:
    return [samples[number] for number in sorted(samples)]
