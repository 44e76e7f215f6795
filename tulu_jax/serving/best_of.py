"""Best of n: of several answers that a model draws, the one that a reward model likes most."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from tulu_jax import validation
from tulu_jax.decode.results import Score
from tulu_jax.decode.sampling import Sampling
from tulu_jax.serving.engine import Done, Engine, Ids, Reply

Scores = Callable[[list[list[int]]], list[float]]  # of rows of ids, prompt and answer


def kl_budget(n: int) -> float:
    """log n − (n − 1)/n nats an answer: what the best of `n` is away from the model that drew them
    at most (Beirami et al. 2024; nearly equal where answers are many and unlike)."""
    return math.log(n) - (n - 1) / n


def problems(n: int, temperature: float | None):
    """Why the best of `n` cannot be chosen of what is drawn at `temperature` (None: as each request
    has it), one line each."""
    if n < 1:
        yield f"best_of = {n}: expected 1 or more"
    if n > 1 and temperature == 0:
        yield (
            f"best_of = {n} at temperature 0, where all {n} answers are the same; expected a "
            "temperature above 0, such as 1, or best_of = 1"
        )


class BestOfEngine:
    """An `Engine` that draws `n` answers to each prompt by `engine` and gives back the one with the
    highest score, by `scores` of its prompt and its ids; the first of those with equal scores.

    One that came to no end is taken only where none did, since a reward model judges at the end.
    Raises `UsageError` for `n` below 1.
    """

    def __init__(self, engine: Engine, scores: Scores, n: int):
        validation.raise_if(problems(n, None))
        self.engine, self.scores, self.n = engine, scores, n
        self.max_length = engine.max_length

    def generate(
        self,
        prompts: Sequence[Ids],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None,
        done: Done | None = None,
    ) -> list[list[Reply]]:
        """As `Engine` has it, one reply a prompt. Raises `UsageError` for greedy answers, for
        several samples, and where the engine tells no ids."""
        validation.raise_if(problems(self.n, sampling.temperature))
        if sampling.samples > 1:
            raise validation.UsageError(
                f"best_of = {self.n} of a request for {sampling.samples} samples: expected one; "
                "leave out the benchmark that asks for several"
            )
        chosen: list[list[Reply]] = [[] for _ in prompts]

        def ended(place: int, replies: list[Reply]) -> None:
            chosen[place] = [self._best(list(prompts[place]), replies)]
            if done is not None:
                done(place, chosen[place])

        many = dataclasses.replace(sampling, samples=self.n)
        self.engine.generate(prompts, many, seeds=seeds, done=ended)
        return chosen

    def score(self, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> list[Score]:
        """Those of the model that draws."""
        return self.engine.score(prompts, continuations)

    def _best(self, prompt: list[int], replies: list[Reply]) -> Reply:
        if any(reply.ids is None for reply in replies):
            raise validation.UsageError(
                "best_of scores answers by their ids, which this engine does not tell; expected "
                "our own decoder"
            )
        scores = self.scores([[*prompt, *reply.ids] for reply in replies])
        ranks = [(r.ended == "stop", score) for r, score in zip(replies, scores, strict=True)]
        return replies[ranks.index(max(ranks))]
