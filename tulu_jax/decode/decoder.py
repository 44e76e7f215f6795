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

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from tulu_jax import validation
from tulu_jax.decode import continuation, score_rows
from tulu_jax.decode import pages as pages_lib
from tulu_jax.decode import sampling as sampling_lib
from tulu_jax.decode.sampling import Sampling
from tulu_jax.kernels import target
from tulu_jax.models import llama, lora, paged_attention
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.parallel import sharding

FEWEST_ROWS = 2  # of a program: XLA multiplies a single row in another order
NO_ID = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A continuation: its ids, with the stop id or the tokens that completed a stop string; of each
    id the model's log-probability; its text, without those, if there was a `detokenize`; and how it
    ended: 'stop_id', 'stop' or 'length'."""

    prompt: int
    sample: int
    ids: list[int]
    logps: list[float]
    text: str | None
    ended: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What came new of a continuation: ids, and text that stays; `ended` as `Result` has it, or
    None."""

    prompt: int
    sample: int
    ids: list[int]
    text: str
    ended: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """The log-probability of each token of a continuation after its prompt, and whether each is the
    likeliest."""

    token_logps: list[float]
    is_greedy: bool

    @property
    def logps(self) -> float:
        return sum(self.token_logps)


@dataclasses.dataclass(kw_only=True)
class Usage:
    """What the last call of `generate` computed: positions of decoding and how many of them came
    out, positions of packed rows and of prompts in them, and, added up over programs, positions of
    the pages that were held and of those how many were used."""

    decoded: int = 0
    useful: int = 0
    packed: int = 0
    prompts: int = 0
    held: int = 0
    live: int = 0


class Decoder:
    """Compiled programs of a model, without its parameters.

    `slots` continuations are decoded at once, `steps` tokens of each in one program; prompts are
    computed in rows of `row_length` positions, or more for a longer one. A cache has pages of `page`
    positions, `cache_positions` in all: None is enough for the longest requests of a call. A row is
    at most `max_length` long, None: as the model's `max_positions` say. `attend` is the attention of
    a step. Under `jax.set_mesh`, parameters may be sharded.
    """

    def __init__(
        self,
        config: LlamaConfig,
        execution: ExecutionConfig,
        *,
        slots: int = 8,
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
    ) -> list[Result]:
        """The continuations of each prompt, those of the first prompt first.

        `sampling` is one for all or one for each. Sample s of prompt i draws from `key` folded with
        i and s, or, where there is a key for each prompt, from that of the prompt folded with s.
        `stream` is given what is new after every program. Raises `UsageError` that lists what is
        wrong with the requests.
        """
        prompts = [[int(i) for i in prompt] for prompt in prompts]
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        self._check(prompts, each, key, detokenize)
        self.usage = Usage()
        if not prompts:
            return []
        call = _Call(self, in_compute_dtype(params, self.execution), prompts, each, key)
        return call.run(detokenize, stream)

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
        rows = score_rows.lay_out(prompts, continuations, length=self.row_length)
        length = self.bucket(max(row.length for row in rows))
        params = in_compute_dtype(params, self.execution)
        ways, found = self.parts, []
        places, entries = score_rows.sizes(rows)
        for first in range(0, len(rows), ways):
            batch = score_rows.batch(
                rows[first : first + ways],
                count=ways,
                length=length,
                places=places,
                entries=entries,
            )
            scored = _score(params, batch, config=self.config, execution=self.execution)
            found.append(jax.tree.map(np.asarray, scored))
        return [
            Score(token_logps=logps, is_greedy=greedy)
            for logps, greedy in score_rows.collect(rows, found, ways, len(prompts))
        ]

    @property
    def parts(self) -> int:
        """Into how many parts the ambient mesh divides rows."""
        mesh = jax.sharding.get_abstract_mesh().shape
        return math.prod(mesh.get(axis, 1) for axis in sharding.AXIS_RULES["batch"])

    def bucket(self, length: int) -> int:
        """The length of the packed row that `length` positions are computed in: whole pages that
        the mesh divides, few of them different."""
        mesh = jax.sharding.get_abstract_mesh().shape
        ways = math.prod(mesh.get(axis, 1) for axis in sharding.AXIS_RULES["positions"])
        unit = math.lcm(self.page, ways)
        return unit * rounded(-(-length // unit))

    def _fits(self, prompt: int, sampling: Sampling) -> int:
        """New tokens that a prompt of that many ids may have."""
        return min(sampling.max_new_tokens, self.max_length - prompt)

    def _pages(self, prompt: int, sampling: Sampling) -> int:
        """Pages that a prompt's continuations may come to hold, one of them after the other; the
        last token that comes out is never put in."""
        positions = prompt - 1 + self._fits(prompt, sampling)
        return -(-positions // self.page) + (sampling.samples > 1)

    def _capacity(self) -> int | None:
        """Pages of each part of the cache, nobody's included; None: as many as are needed."""
        if self.cache_positions is None:
            return None
        return self.cache_positions // self.page // self.parts + 1

    def _check(self, prompts, each, key, detokenize) -> None:
        problems = []
        if len(each) != len(prompts):
            problems.append(f"there are {len(each)} samplings for {len(prompts)} prompts")
        if key.shape not in ((), (len(prompts),)):
            problems.append(f"there are keys {key.shape} for {len(prompts)} prompts")
        capacity = self._capacity()
        for i, (prompt, sampling) in enumerate(zip(prompts, each, strict=False)):
            problems += self._problems(f"prompt {i}", prompt, most=self.max_length - 1)
            problems += [
                f"prompt {i} is to end with the id {stop}; the model's vocabulary has "
                f"{self.config.vocab_size}"
                for stop in sampling.stop_ids
                if stop >= self.config.vocab_size
            ]
            needs = self._pages(len(prompt), sampling) + 1
            if capacity is not None and needs > capacity and len(prompt) < self.max_length:
                problems.append(
                    f"prompt {i} of {len(prompt):,} ids with {self._fits(len(prompt), sampling):,} "
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


class _Call:
    """One call of `generate`: the cache, the schedule, and what came out."""

    def __init__(self, decoder: Decoder, params, prompts, each, key):
        self.decoder, self.params, self.prompts, self.each = decoder, params, prompts, each
        parts = decoder.parts
        slots = max(1, decoder.slots // parts)
        needs = [decoder._pages(len(p), s) for p, s in zip(prompts, each, strict=True)]
        samples = [sampling.samples for sampling in each]
        largest = sorted((n for n, s in zip(needs, samples, strict=True) for _ in range(s)))
        pages = decoder._capacity()
        if pages is None:
            pages = rounded(sum(largest[-slots:]) + slots + 1)
        self.schedule = pages_lib.Schedule(
            prompts,
            most=[decoder._fits(len(p), s) for p, s in zip(prompts, each, strict=True)],
            samples=samples,
            parts=parts,
            slots=slots,
            pages=pages,
            page=decoder.page,
        )
        self.table_pages = -(-decoder.max_length // decoder.page)
        self.stops = max(1, *(len(sampling.stop_ids) for sampling in each))
        self.key_impl, self.words = jax.random.key_impl(key), self._words(key, samples)
        self.cache = _empty_cache(
            config=decoder.config, pages=pages * parts, page=decoder.page,
            dtype=decoder.execution.compute_dtype,
        )  # fmt: skip
        self.sent: dict[tuple[int, int], tuple[int, int]] = {}  # ids and characters

    def _words(self, key, samples) -> dict[tuple[int, int], np.ndarray]:
        """The words of the key of each continuation; none where nothing is drawn."""
        places = [(i, s) for i, count in enumerate(samples) for s in range(count)]
        if all(sampling.temperature == 0 for sampling in self.each):
            return {}
        size = rounded(len(places))
        prompts, numbers = np.zeros((2, size), np.int32)
        prompts[: len(places)], numbers[: len(places)] = np.array(places).T
        return dict(zip(places, np.asarray(_key_words(key, prompts, numbers)), strict=False))

    def run(self, detokenize, stream) -> list[Result]:
        """All continuations, in order."""
        schedule, decoder, results = self.schedule, self.decoder, []
        while schedule.waiting or schedule.rows:
            fills = True
            while fills:
                fills, copies = schedule.admit(decoder.row_length)
                self._fill(fills)
                self._copy(copies)
            assert schedule.rows, "no row fits in the cache, which `_check` rules out"
            schedule.grow(decoder.steps)
            before = {id(row): len(row.ids) for row in schedule.rows}
            self._burst()
            for row in list(schedule.rows):
                result = self._ended(row, len(row.ids) - before[id(row)], detokenize)
                if stream is not None:
                    self._send(row, result, detokenize, stream)
                if result is not None:
                    schedule.end(row)
                    results.append(result)
                    decoder.usage.useful += len(result.ids)
        return sorted(results, key=lambda result: (result.prompt, result.sample))

    def _fill(self, fills: list[pages_lib.Fill]) -> None:
        """Computes prompts into their pages."""
        if not fills:
            return
        decoder, parts, page = self.decoder, self.schedule.parts, self.decoder.page
        length = decoder.bucket(max(fill.start + len(fill.pages) * page for fill in fills))
        tokens, segment_ids, positions = np.zeros((3, parts, length), np.int32)
        places = np.full((parts, length // page), paged_attention.NOBODYS, np.int32)
        for number, fill in enumerate(fills, 1):
            ids = self.prompts[fill.prompt][:-1]
            here = (fill.part, slice(fill.start, fill.start + len(ids)))
            tokens[here], segment_ids[here], positions[here] = ids, number, range(len(ids))
            first = fill.start // page
            places[fill.part, first : first + len(fill.pages)] = fill.pages
            decoder.usage.prompts += len(ids)
        decoder.usage.packed += tokens.size
        taken = np.broadcast_to(np.arange(length // page, dtype=np.int32), places.shape)
        self.cache = _filled(
            self.params,
            self.cache,
            dict(tokens=tokens, segment_ids=segment_ids, positions=positions),
            taken.reshape(-1),
            places.reshape(-1),
            config=decoder.config,
            execution=decoder.execution,
            page=page,
        )

    def _copy(self, copies: list[pages_lib.Copy]) -> None:
        if not copies:
            return
        lists = [[c for c in copies if c.part == part] for part in range(self.schedule.parts)]
        taken, places = np.zeros((2, len(lists), self.schedule.slots), np.int32)
        for part, listed in enumerate(lists):
            taken[part, : len(listed)] = [copy.taken for copy in listed]
            places[part, : len(listed)] = [copy.place for copy in listed]
        self.cache = _copied(self.cache, taken.reshape(-1), places.reshape(-1))

    def _burst(self) -> None:
        """Steps of all rows; their new ids and log-probabilities are added to them."""
        schedule, decoder = self.schedule, self.decoder
        by_part = [schedule.of_part(part) for part in range(schedule.parts)]
        most = max(map(len, by_part))
        size = min(max(FEWEST_ROWS, 1 << (most - 1).bit_length()), max(schedule.slots, most))
        placed = [
            (p * size + n, row) for p, rows in enumerate(by_part) for n, row in enumerate(rows)
        ]
        out, steps, self.cache = _steps(
            self.params,
            self.cache,
            self._arrays(placed, size * schedule.parts),
            bool(schedule.waiting),
            config=decoder.config,
            execution=decoder.execution,
            steps=decoder.steps,
            attend=decoder.attend,
            key_impl=self.key_impl,
        )
        steps, tokens, logps = int(steps), np.asarray(out["tokens"]), np.asarray(out["logps"])
        usage = decoder.usage
        usage.decoded += steps * size * schedule.parts
        for place, row in placed:
            count = steps
            stop_ids = self.each[row.prompt].stop_ids
            new = tokens[:count, place].tolist()
            ended = [n for n, token in enumerate(new, 1) if token in stop_ids]
            count = min([count, row.most - len(row.ids), *ended[:1]])
            row.ids += new[:count]
            row.logps += logps[:count, place].tolist()
            row.token, row.position = row.ids[-1], row.position + count
        usage.held += schedule.held()
        usage.live += schedule.live()

    def _arrays(self, placed, size: int) -> dict[str, np.ndarray]:
        """What a program needs to know of its `size` rows."""
        words = next(iter(self.words.values())) if self.words else np.zeros(2, np.uint32)
        ints = ("token", "position", "left", "count", "min_new_tokens", "top_k")
        rows = {name: np.zeros(size, np.int32) for name in ints}
        rows |= {name: np.ones(size, np.float32) for name in ("temperature", "top_p")}
        rows["temperature"][:] = 0
        rows["keys"] = np.zeros((size, *words.shape), words.dtype)
        rows["stop_ids"] = np.full((size, self.stops), NO_ID, np.int32)
        rows["table"] = np.full((size, self.table_pages), paged_attention.NOBODYS, np.int32)
        for place, row in placed:
            sampling = self.each[row.prompt]
            rows["token"][place], rows["position"][place] = row.token, row.position
            rows["left"][place], rows["count"][place] = row.most - len(row.ids), len(row.ids)
            for name in ("min_new_tokens", "temperature", "top_p", "top_k"):
                rows[name][place] = getattr(sampling, name)
            if self.words:
                rows["keys"][place] = self.words[row.prompt, row.sample]
            rows["stop_ids"][place, : len(sampling.stop_ids)] = sampling.stop_ids
            rows["table"][place, : len(row.pages)] = row.pages
        return rows

    def _ended(self, row: pages_lib.Row, fresh: int, detokenize) -> Result | None:
        """The result of a row that has ended, else None."""
        sampling = self.each[row.prompt]
        ids, logps, text, ended = row.ids, row.logps, None, None
        if ids[-1] in sampling.stop_ids:
            ended = "stop_id"
        elif len(ids) >= row.most:
            ended = "length"
        if detokenize is not None:
            found = None
            if sampling.stop:
                least = sampling.min_new_tokens
                found = continuation.stopped(ids, fresh, sampling.stop, least, detokenize)
            if found is not None:
                (count, text), ended = found, "stop"
                ids, logps = ids[:count], logps[:count]
            elif ended is not None:
                text = detokenize(ids[:-1] if ended == "stop_id" else ids)
        if ended is None:
            return None
        return Result(
            prompt=row.prompt, sample=row.sample, ids=ids, logps=logps, text=text, ended=ended
        )

    def _send(self, row: pages_lib.Row, result: Result | None, detokenize, stream) -> None:
        """Streams what of a row is new; one that began anew says nothing twice."""
        place = (row.prompt, row.sample)
        ids, text = row.ids, ""
        if result is not None:
            ids, text = result.ids, result.text or ""
        elif detokenize is not None:
            text = continuation.settled(detokenize(ids), self.each[row.prompt].stop)
        sent_ids, sent_text = self.sent.get(place, (0, 0))
        self.sent[place] = (max(sent_ids, len(ids)), max(sent_text, len(text)))
        ended = None if result is None else result.ended
        if ended or len(ids) > sent_ids:
            stream(Piece(
                prompt=row.prompt, sample=row.sample, ids=ids[sent_ids:], text=text[sent_text:],
                ended=ended,
            ))  # fmt: skip


def rounded(count: int) -> int:
    """`count` rounded up to a power of two up to 8, then to three significant bits: few sizes."""
    if count <= 8:
        return 1 << max(count - 1, 0).bit_length()
    unit = 1 << (count.bit_length() - 3)
    return -(-count // unit) * unit


def in_compute_dtype(params: llama.Params, execution: ExecutionConfig) -> llama.Params:
    """Matrices in the dtype they are multiplied in, once rather than in each step; norms, and what
    is quantised, as they are."""
    multiplied = ("kernel", "embedding", lora.A, lora.B)

    def cast(path, leaf):
        as_is = path[-1].key not in multiplied or leaf.dtype == execution.compute_dtype
        return leaf if as_is else leaf.astype(execution.compute_dtype)

    return jax.tree.map_with_path(cast, params)


def for_prompts(execution: ExecutionConfig) -> ExecutionConfig:
    """How prompts are computed: on other devices than TPUs 'auto' is 'blockwise', whose blocks are
    the pages, so that a prompt has the same sums wherever it lies in a row."""
    if execution.attention in ("auto", "triangular") and target.platform() != "tpu":
        return dataclasses.replace(execution, attention="blockwise")
    return execution


@functools.partial(jax.jit, static_argnames=("config", "pages", "page", "dtype"))
def _empty_cache(*, config, pages, page, dtype):
    return paged_attention.empty_cache(config, pages=pages, page=page, dtype=dtype)


@jax.jit
def _key_words(key, prompts, samples):
    """The words of the key of each sample of each prompt, whole on every process."""
    one = jax.vmap(jax.random.fold_in)
    keys = key[prompts] if key.ndim else jax.vmap(lambda i: jax.random.fold_in(key, i))(prompts)
    return sharding.replicate(jax.random.key_data(one(keys, samples)))


@functools.partial(
    jax.jit, static_argnames=("config", "execution", "page"), donate_argnames="cache"
)
def _filled(params, cache, rows, taken, places, *, config, execution, page):
    execution = for_prompts(execution)
    block = page if execution.attention == "blockwise" else None
    found = llama.keys_and_values(config, execution, params, block=block, **rows)
    return paged_attention.filled(cache, found, taken, places)


@functools.partial(jax.jit, donate_argnames="cache")
def _copied(cache, taken, places):
    return paged_attention.copied(cache, taken, places)


@functools.partial(
    jax.jit,
    static_argnames=("config", "execution", "steps", "attend", "key_impl"),
    donate_argnames="cache",
)
def _steps(params, cache, rows, refill, *, config, execution, steps, attend, key_impl):
    """`tokens` and `logps` [steps, B], how many steps there were, and the cache.

    A row that has no tokens `left` is idle. With `refill`, the first end of a row is the last step.
    """
    rows = {
        name: sharding.constrain(x, "batch", *[None] * (x.ndim - 1)) for name, x in rows.items()
    }
    table, stop_ids = rows.pop("table"), rows["stop_ids"]
    names = ("temperature", "top_p", "top_k", "keys", "min_new_tokens", "stop_ids")
    settings = {name: rows.pop(name) for name in names}
    B = table.shape[0]
    out = {"tokens": jnp.zeros((steps, B), jnp.int32), "logps": jnp.zeros((steps, B))}

    def step(state):
        i, ended, rows, out, cache = state
        active = rows["left"] > 0
        see = functools.partial(
            attend, table=table, positions=rows["position"], active=active.astype(jnp.int32)
        )
        hidden, cache = llama.step(
            config, execution, params, cache, see,
            tokens=rows["token"], positions=rows["position"],
        )  # fmt: skip
        logits = llama.project_one(hidden, params)
        tokens, logps = sampling_lib.choose(
            logits, count=rows["count"], key_impl=key_impl, **settings
        )
        stops = (tokens[:, None] == stop_ids).any(axis=1)
        left = jnp.where(active & ~stops, rows["left"] - 1, 0)
        rows = {
            "token": jnp.where(active, tokens, rows["token"]),
            "position": rows["position"] + active,
            "left": left,
            "count": rows["count"] + active,
        }
        out = {"tokens": out["tokens"].at[i].set(tokens), "logps": out["logps"].at[i].set(logps)}
        return i + 1, ended | (active & (left == 0)).any(), rows, out, cache

    def goes_on(state):
        i, ended, rows, *_ = state
        return (i < steps) & (rows["left"] > 0).any() & ~(refill & ended)

    state = (jnp.int32(0), jnp.bool_(False), rows, out, cache)
    i, _, _, out, cache = jax.lax.while_loop(goes_on, step, state)
    return jax.tree.map(sharding.replicate, out), sharding.replicate(i), cache


@functools.partial(jax.jit, static_argnames=("config", "execution"))
def _score(params, batch, *, config, execution):
    """Of each entry [B, E] the log-probability of its target and whether that is the likeliest."""
    hidden = llama.hidden_states(
        config, execution, params, **{name: batch[name] for name in score_rows.FIELDS}
    )
    return jax.tree.map(
        sharding.replicate, score_rows.score(hidden, llama.unembedding(params), batch)
    )
