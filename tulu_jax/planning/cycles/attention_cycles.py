"""How long the attention kernel takes for given rows: compiled for a chip, its cycles counted.

The kernel is compiled without a TPU and its scheduled cycles are counted (`schedule.py`); what its
lists hold, and so how often each of its bodies runs, follows from where the documents of a row
begin and end.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax import chips
from tulu_jax.kernels import flash_attention as flash
from tulu_jax.kernels import flash_attention_tuning as tuning
from tulu_jax.planning import rows
from tulu_jax.planning.cycles import schedule

TARGET = f"{__file__}:one_pass"
STAGES = ("forward", "backward")
FLAGS = {
    "first": flash.FIRST,
    "last": flash.LAST,
    "clear": flash.CLEAR,
    "clear_query": flash.CLEAR_QUERY,
    "last_query": flash.LAST_QUERY,
}

# The side blocks of each kernel, in the order of its text.
SIDES = {
    "forward": ("first", "clear", "last"),
    "backward": ("first", "clear", "clear_query", "last_query", "last"),
}

# Of each stage how often a row runs what: 'steps', those of SIDES, and by kind of pair 'kinds'.
Counts = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What one device has: `heads` and `kv_heads`, `queries` of a row of `keys`."""

    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    dtype: str = "bfloat16"

    def fit(self, tiling: flash.Tiling) -> flash.Tiling:
        """`flash_attention.fit` for this shape."""
        return flash.fit(
            tiling,
            queries=self.queries,
            keys=self.keys,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            itemsize=jnp.dtype(self.dtype).itemsize,
        )


def request(chip: str, shape: Shape, stage: str, tile: flash.Tile) -> schedule.Request:
    """What `schedule.compile_for` compiles: `one_pass` with this tile."""
    arguments = dict(
        chip=chip, shape=dataclasses.asdict(shape), stage=stage, tile=dataclasses.asdict(tile)
    )
    return schedule.Request(target=TARGET, arguments=arguments)


def one_pass(chip: str, shape: dict, stage: str, tile: dict):
    """A jitted pass of the kernel with this tile over one row, and its abstract arguments."""
    size = Shape(**shape)
    both = dict.fromkeys(STAGES, flash.Tile(**tile))
    tiling = dataclasses.replace(tuning.tiling(chip, size.dtype), **both)

    def prepare(own, key):
        return flash.prepare(
            segment_ids=own,
            kv_segment_ids=key,
            branches=None,
            kv_branches=None,
            query_offset=0,
            tiling=tiling,
        )

    def abstract(*dimensions, dtype):
        return jax.ShapeDtypeStruct((1, *dimensions), dtype)

    ids = [abstract(n, dtype=jnp.int32) for n in (size.queries, size.keys)]
    plan = jax.eval_shape(prepare, *ids)
    given = jnp.dtype(size.dtype)
    q = abstract(size.heads, size.queries, size.head_dim, dtype=given)
    static = flash.static_of(q, size.head_dim, False)
    inside = jnp.dtype(jnp.float32) if tiling.widened else given
    q = abstract(size.heads, size.queries, size.head_dim, dtype=inside)
    k = abstract(size.kv_heads, size.keys, size.head_dim, dtype=inside)
    if stage == "forward":
        run = lambda q, k, v, p: flash._forward(q, k, v, p, online=False, static=static)  # noqa: E731
        return jax.jit(run), (q, k, k, plan)
    stats = abstract(size.heads, 2, size.queries, dtype=jnp.float32)
    run = lambda q, k, v, s, d, p: flash._backward(q, k, v, s, d, p, static)  # noqa: E731
    return jax.jit(run), (q, k, k, stats, q, plan)


def milliseconds(
    chip: str, kernel: schedule.Kernel, tile: flash.Tile, stage: str, heads: int, counts: Counts
) -> float:
    """One pass over a row with these counts, all `heads` on all cores of a device."""
    hardware, count = chips.CHIPS[chip], counts[stage]
    scale = heads / tile.heads / hardware.cores
    cycles = kernel.cycles(
        steps=count["steps"] * scale,
        inner=count["pairs"] / count["steps"],
        compute=[count["kinds"][kind] * scale for kind in flash.kinds(tile)],
        side=[count[name] * scale for name in SIDES[stage]],
    )
    return 1e3 * cycles / hardware.clock


def count_packed(tiling: flash.Tiling, segments: np.ndarray, shards: int = 1) -> Counts:
    """Mean counts of rows int [R, T] of consecutive segments, from where these begin and end.

    Of `shards` devices with an equal run of queries each, those of the one with most pairs.
    """
    means, number_of_rows = {}, len(segments)
    for stage in STAGES:
        tile = getattr(tiling, stage)
        block = tile.block
        edges = flash.edge_kinds(tile)
        parts = len(edges)
        # Parts of a block see each other as blocks do.
        split = segments.reshape(number_of_rows, -1, parts, block // parts)
        high = split.max(3)  # [R, blocks, parts]
        low = np.where(split > 0, split, high[..., None] + 1).min(3)
        number = high.max(2)
        uniform = (split == number[..., None, None]).all((2, 3))
        earlier = np.tri(number.shape[1], k=-1, dtype=bool)[None]
        # Segments are consecutive: a later part sees an earlier one if its first is their last.
        seen = low[:, :, None, :, None] <= high[:, None, :, None, :]
        seen &= (high > 0)[:, :, None, :, None] & (high > 0)[:, None, :, None, :]
        seen &= earlier[..., None, None]  # [R, i, j, query part, key part]
        active = seen.any((3, 4))
        full = active & (uniform & (number > 0))[:, :, None] & uniform[:, None]
        full &= number[:, :, None] == number[:, None]
        edge = active & ~full
        start = seen.any(3).argmax(3)
        end = parts - seen.any(4)[..., ::-1].argmax(3)
        own = np.eye(number.shape[1], dtype=bool) & (number > 0)[:, :, None]
        kinds = {flash.FULL: full, flash.DIAGONAL: own}
        which = edges[start, end - 1]
        kinds |= {kind: edge & (which == kind) for kind in flash.kinds(tile)[2:]}
        blocks = number.shape[1] // shards  # of queries, on a device
        each = {n: x.sum(2).reshape(-1, shards, blocks).sum(2) for n, x in kinds.items()}
        most = sum(each.values()).argmax(1)[:, None]
        kinds = {n: np.take_along_axis(x, most, 1).mean() for n, x in each.items()}
        # A block without work is met once, to be written: with the first key, or the first query.
        met = (active | own).reshape(-1, shards, blocks, number.shape[1])
        met[..., 0] |= ~met.any(3)
        if stage == "backward":
            met[:, :, 0] |= ~met.any(2)
        load = tile.load
        steps = met.reshape(*met.shape[:2], blocks // load, load, -1, load).any((3, 5))
        rows, device = np.arange(len(most)), most[:, 0]
        means[stage] = dict.fromkeys(SIDES[stage], blocks)
        means[stage]["pairs"] = met[rows, device].sum((1, 2)).mean()
        means[stage]["steps"] = steps[rows, device].sum((1, 2)).mean()
        if stage == "backward":
            means[stage] |= dict.fromkeys(("first", "last"), number.shape[1])
            means[stage]["last_query"] = blocks // load  # those loaded together at once
            means[stage]["clear_query"] = blocks - kinds[flash.DIAGONAL]
        means[stage]["clear"] = means[stage]["first"] - kinds[flash.DIAGONAL]
        means[stage]["kinds"] = kinds
    return means


def executed(tiling: flash.Tiling, counts: Counts) -> float:
    """Executed (query, key) products of a row, the mean over the seven of both passes."""
    total = 0.0
    for stage, weight in (("forward", 2 / 7), ("backward", 5 / 7)):  # products of each pass
        tile = getattr(tiling, stage)
        for kind, times in counts[stage]["kinds"].items():
            total += weight * times * sum(n * m for _, n, _, m in flash.chunks(kind, tile))
    return total


def block_milliseconds(chip: str, shape: Shape, held: rows.Documents) -> dict[int, float]:
    """Milliseconds of forward and backward over a row of documents `held`, by size of block: the
    tuned one and halves of it, as far as they compile; of several devices that share a row, the one
    with most pairs. Larger blocks execute more for the same bodies.
    """
    tuned = tuning.tiling(chip, shape.dtype)
    largest, shards = shape.fit(tuned).forward.block, shape.keys // shape.queries
    fitted = {
        block: shape.fit(tuning.with_block(tuned, block))
        for block in (largest, largest // 2)
        if block % flash.LANES == 0 and shape.queries % block == 0
    }
    wanted = [(block, stage) for block in fitted for stage in STAGES]
    requests = [request(chip, shape, s, getattr(fitted[b], s)) for b, s in wanted]
    programs = schedule.compile_for(chip, requests, timeout=3600)
    segments = np.stack(
        [np.repeat(np.arange(1, len(row) + 1), row) for row in held.rows(shape.keys)]
    )
    found: dict[int, float] = dict.fromkeys(fitted, 0.0)
    for (block, stage), program in zip(wanted, programs, strict=True):
        if program.error:
            found.pop(block, None)
        elif block in found:
            (kernel,) = program.kernels.values()
            tile = getattr(fitted[block], stage)
            counts = count_packed(fitted[block], segments, shards)
            found[block] += milliseconds(chip, kernel, tile, stage, shape.heads, counts)
    return found
