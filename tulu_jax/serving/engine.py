"""What evaluates takes an `Engine`: something that continues prompts and scores continuations.

There are two: `OwnEngine`, parameters and our decoder, and `openai_engine.OpenAIEngine`, any server
that speaks OpenAI's protocol. Both are given ids, so that both see the same ones.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from tulu_jax import validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.decoder import Decoder
from tulu_jax.decode.results import Score
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


@runtime_checkable
class Engine(Protocol):
    """Continues and scores any number of requests, of any length."""

    def generate(
        self, prompts: Sequence[Ids | str], sampling: Sampling, *, seeds: Sequence[int] | None
    ) -> list[list[Reply]]:
        """The `sampling.samples` continuations of each prompt, which also ends at the `</s>` of the
        tokenizer. `seeds` has one for each prompt, None where nothing is drawn. A text is a prompt
        with its BOS before it. Raises `UsageError`."""

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
    """(prompt, continuation) of each of `texts` behind `prefix`, for `score`.

    The whole is encoded, as it would have been in training. Where the end of the prompt and the
    beginning of a text are one token, that token belongs to the continuation. Raises `UsageError`
    for a text that adds no token.
    """
    prompt, found = chat_prompt(messages, tokenizer, chat=chat, prefix=prefix), []
    for text in texts:
        whole = chat_prompt(messages, tokenizer, chat=chat, prefix=prefix + text)
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

    def generate(
        self, prompts: Sequence[Ids | str], sampling: Sampling, *, seeds: Sequence[int] | None
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
        with self._on_mesh():
            results = self.decoder.generate(
                self.params,
                ids,
                dataclasses.replace(sampling, stop_ids=stop_ids),
                jnp.stack([jax.random.key(seed) for seed in seeds]),
                detokenize=self.tokenizer.decode,
            )
        replies: list[list[Reply]] = [[] for _ in prompts]
        for result in results:
            replies[result.prompt].append(
                Reply(
                    text=result.text,
                    ended="length" if result.ended == "length" else "stop",
                    ids=result.ids,
                    token_logps=result.logps,
                )
            )
        return replies

    def score(self, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> list[Score]:
        """As `Engine` has it."""
        with self._on_mesh():
            return self.decoder.score(self.params, prompts, continuations)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
