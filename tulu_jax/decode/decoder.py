"""Generates and scores any number of requests of any length, on one device or a mesh.

A prompt without its last token is computed in packed rows, by the attention of training, and its
keys and values go into pages of a cache (`models/paged_attention.py`). From its last token on a
continuation is one row of a batch that makes a token a step. A program runs several steps, and ends
early when a row has ended for which another waits; the host then fills its slot (`pages.py`). Where
fewer rows are left than half of the slots, a program of half as many runs.

A row's tokens depend on its prompt, its settings and its key alone. So pages begin where prompts
do, and attention goes by pages: sums have the same order wherever a prompt lies, whatever is beside
it. With float32 on a CPU the bits are the same (`docs/decoding.md`).
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Key

from tulu_jax import validation
from tulu_jax.decode import call, continuation, programs, score_rows
from tulu_jax.decode.results import Piece, Result, Score, Usage
from tulu_jax.decode.sampling import Sampling
from tulu_jax.models import llama, paged_attention
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.parallel import sharding

STEP = 64  # positions by which the lengths of packed rows differ, or the pages if they are smaller
LEAST = 64  # positions of a packed row: XLA multiplies fewer in another order on a CPU


class Decoder:
    """Compiled programs of a model, without its parameters.

    `slots` continuations are decoded at once, `steps` tokens of each in one program; prompts are
    computed in rows of `row_length` positions, or more for a longer one. A cache has pages of
    `page` positions, `cache_positions` in all: None is enough for the longest requests of a call. A
    row is at most `max_length` long, None: as the model's `max_positions` say. `attend` is the
    attention of a step. Under `jax.set_mesh`, parameters may be sharded.
    """

    def __init__(
        self,
        config: LlamaConfig,
        execution: ExecutionConfig,
        *,
        slots: int = 16,
        steps: int = 16,
        page: int = 64,
        row_length: int = 1024,
        cache_positions: int | None = None,
        max_length: int | None = None,
        attend: Callable = paged_attention.attend,
    ):
        for name, value in (("slots", slots), ("steps", steps), ("page", page)):
            if value < 1:
                raise validation.UsageError(f"{name} = {value}: expected a positive number")
        self.config, self.execution = config, execution
        self.slots, self.steps, self.page, self.row_length = slots, steps, page, row_length
        self.cache_positions = cache_positions
        self.max_length = config.max_positions if max_length is None else max_length
        self.attend = attend
        self.usage = Usage()

    def generate(
        self,
        params: llama.Params,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        key: Key[Array, "..."],
        *,
        detokenize: continuation.Detokenize | None = None,
        stream: Callable[[Piece], None] | None = None,
        ended: Callable[[Result], None] | None = None,
    ) -> list[Result]:
        """The continuations of each prompt, those of the first prompt first.

        `sampling` is one for all or one for each. Sample s of prompt i draws from `key` folded with
        i and s, or, where there is a key for each prompt, from that of the prompt folded with s.
        `stream` is given what is new after every program, `ended` each continuation when it has
        ended. Raises `UsageError` that lists what is wrong with the requests.
        """
        prompts = [[int(i) for i in prompt] for prompt in prompts]
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        self._check(prompts, each, key, detokenize)
        self.usage = Usage()
        if not prompts:
            return []
        params = programs.in_compute_dtype(params, self.execution)
        return call.of_all(self, params, prompts, each, key).run(detokenize, stream, ended)

    def open(self, params: llama.Params, *, stops: int) -> call.Call:
        """A call without requests, which takes them while it runs. Its cache has `cache_positions`,
        or room for all slots at `max_length`; no request has more than `stops` stop ids."""
        pages = self.capacity()
        if pages is None:
            slots = max(1, self.slots // self.parts)
            pages = slots * (-(-self.max_length // self.page) + 1) + 1
        params = programs.in_compute_dtype(params, self.execution)
        key_impl = jax.random.key_impl(jax.random.key(0))
        self.usage = Usage()
        return call.Call(self, params, pages=pages, stops=stops, key_impl=key_impl)

    def score(
        self,
        params: llama.Params,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
    ) -> list[Score]:
        """Scores of each continuation after the prompt of the same place, all positions as the
        training forward pass has them: prompts that begin alike are computed once. Raises
        `UsageError` as `generate` does."""
        prompts = [[int(i) for i in prompt] for prompt in prompts]
        continuations = [[int(i) for i in ids] for ids in continuations]
        self._check_scored(prompts, continuations)
        if not prompts:
            return []
        longest = max(map(len, prompts)) + max(map(len, continuations))
        length = self.row_length if 2 * longest <= 3 * self.row_length // 2 else 2 * longest
        rows = score_rows.lay_out(prompts, continuations, length=length)
        rows.sort(key=lambda row: -row.length)  # a batch is as long as its longest
        params = programs.in_compute_dtype(params, self.execution)
        ways, found = sharding.ways("batch"), []
        places, entries = score_rows.sizes(rows)
        for first in range(0, len(rows), ways):
            batch = score_rows.batch(
                rows[first : first + ways],
                count=ways,
                length=self.bucket(rows[first].length),
                places=places,
                entries=entries,
            )
            scored = programs.score(params, batch, config=self.config, execution=self.execution)
            found.append(jax.tree.map(np.asarray, scored))
        return list(score_rows.collect(rows, found, ways, len(prompts)))

    @property
    def parts(self) -> int:
        """Into how many parts the ambient mesh divides rows and their pages."""
        return sharding.ways("rows")

    def bucket(self, length: int) -> int:
        """The length of the packed row that `length` positions are computed in: whole pages that
        the mesh divides, few of them different, and no more for large pages."""
        unit = math.lcm(self.page, sharding.ways("positions"))
        step = math.gcd(unit, STEP)
        few = step * programs.rounded(-(-max(length, LEAST) // step))
        return unit * -(-few // unit)

    def fits(self, prompt: int, sampling: Sampling) -> int:
        """New tokens that a prompt of that many ids may have."""
        return min(sampling.max_new_tokens, self.max_length - prompt)

    def pages_of(self, prompt: int, sampling: Sampling) -> int:
        """Pages that a prompt's continuations may come to hold, one of them after the other; the
        last token that comes out is never put in."""
        positions = prompt - 1 + self.fits(prompt, sampling)
        return -(-positions // self.page) + (sampling.samples > 1)

    def capacity(self) -> int | None:
        """Pages of each part of the cache, nobody's included; None: as many as are needed."""
        if self.cache_positions is None:
            return None
        return self.cache_positions // self.page // self.parts + 1

    def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raises `UsageError` as `generate` of this one request would."""
        self._check([list(prompt)], [sampling], jax.random.key(0), str)

    def check_scored(self, prompt: Sequence[int], continuation: Sequence[int]) -> None:
        """Raises `UsageError` as `score` of this one request would."""
        self._check_scored([list(prompt)], [list(continuation)])

    def _check(self, prompts, each, key, detokenize) -> None:
        problems = []
        if len(each) != len(prompts):
            problems.append(f"there are {len(each)} samplings for {len(prompts)} prompts")
        if key.shape not in ((), (len(prompts),)):
            problems.append(f"there are keys {key.shape} for {len(prompts)} prompts")
        capacity = self.capacity()
        for i, (prompt, sampling) in enumerate(zip(prompts, each, strict=False)):
            problems += self._problems(f"prompt {i}", prompt, most=self.max_length - 1)
            problems += [
                f"prompt {i} is to end with the id {stop}; the model's vocabulary has "
                f"{self.config.vocab_size}"
                for stop in sampling.stop_ids
                if stop >= self.config.vocab_size
            ]
            needs = self.pages_of(len(prompt), sampling) + 1
            if capacity is not None and needs > capacity and len(prompt) < self.max_length:
                problems.append(
                    f"prompt {i} of {len(prompt):,} ids with {self.fits(len(prompt), sampling):,} "
                    f"new tokens needs {(needs - 1) * self.page:,} positions of the cache, whose "
                    f"parts have {(capacity - 1) * self.page:,}; expected fewer, or "
                    f"cache_positions of {(needs - 1) * self.page * self.parts:,}"
                )
        if detokenize is None and any(sampling.stop for sampling in each):
            problems.append("there are stop strings, but no `detokenize` to find them with")
        if problems:
            raise validation.UsageError("cannot generate: " + "; ".join(problems))

    def _check_scored(self, prompts, continuations) -> None:
        problems = []
        if len(prompts) != len(continuations):
            problems.append(f"there are {len(continuations)} continuations, {len(prompts)} prompts")
        for i, (prompt, ids) in enumerate(zip(prompts, continuations, strict=False)):
            found = self._problems(f"prompt {i}", prompt, most=self.max_length)
            found += self._problems(f"continuation {i}", ids, most=self.max_length)
            if not found and len(prompt) + len(ids) > self.max_length + 1:
                found.append(
                    f"prompt {i} of {len(prompt):,} ids and its continuation of {len(ids):,} are "
                    f"longer than the model's {self.max_length:,} positions and one"
                )
            problems += found
        if problems:
            raise validation.UsageError("cannot score: " + "; ".join(problems))

    def _problems(self, name: str, ids: list[int], *, most: int) -> list[str]:
        if not ids:
            return [f"{name} is empty"]
        problems, size = [], self.config.vocab_size
        if max(ids) >= size or min(ids) < 0:
            wrong = max(ids) if max(ids) >= size else min(ids)
            problems.append(f"{name} has the id {wrong}; the model's vocabulary has {size}")
        if len(ids) > most:
            problems.append(
                f"{name} has {len(ids):,} ids; expected at most {most:,}, for a model of "
                f"{self.max_length:,} positions"
            )
        return problems
