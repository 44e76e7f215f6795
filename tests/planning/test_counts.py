"""What a row asks of the attention kernel: counted from documents as from the kernel's lists."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.kernels import flash_attention as flash
from tulu_jax.kernels import flash_attention_tuning as tuning
from tulu_jax.planning.cycles import attention_cycles

LENGTH = 1024


def rows_of(draw, number):
    """Rows of consecutive documents, some with padding at their end."""
    found = np.zeros((number, LENGTH), np.int32)
    for row in found:
        used = LENGTH if draw.random() < 0.5 else int(draw.integers(1, LENGTH))
        ends = np.sort(draw.choice(np.arange(1, used), size=min(5, used - 1), replace=False))
        row[:used] = np.repeat(np.arange(len(ends) + 1) + 1, np.diff([0, *ends, used]))
    return found


@functools.partial(jax.jit, static_argnums=0)
def prepared(tiling, queries, keys, offset):
    return flash.prepare(
        segment_ids=queries,
        kv_segment_ids=keys,
        branches=None,
        kv_branches=None,
        query_offset=offset,
        tiling=tiling,
    )


def listed(tiling, row, shards, shard):
    """Counts of what `flash_attention.prepare` lists for one device's part of a row."""
    T = LENGTH // shards
    queries = jnp.asarray(row[None, shard * T : (shard + 1) * T])
    plan = prepared(tiling, queries, jnp.asarray(row[None]), jnp.int32(shard * T))
    counts = {}
    for stage in attention_cycles.STAGES:
        pairs = getattr(plan, stage)
        flags = np.asarray(pairs.flag)[: int(pairs.start[pairs.count[0]])]
        counts[stage] = {
            name: (flags & bit != 0).sum() for name, bit in attention_cycles.FLAGS.items()
        }
        counts[stage] |= {"pairs": len(flags), "steps": int(pairs.count[0])}
        kinds = flash.kinds(getattr(tiling, stage))
        counts[stage]["kinds"] = {n: (flags & flash.KIND == n).sum() for n in kinds}
    return counts


@pytest.mark.parametrize(
    "block, load, shards", [(128, 1, 1), (128, 2, 4), (256, 1, 4), (256, 2, 1)]
)
def test_documents_are_counted_as_they_are_listed(block, load, shards):
    tile = dataclasses.replace(tuning.INTERPRETED.forward, block=block, load=load)
    tiling = dataclasses.replace(tuning.INTERPRETED, forward=tile, backward=tile)
    for row in rows_of(np.random.default_rng(block + shards), 4):
        counts = attention_cycles.count_packed(tiling, row[None], shards)
        parts = [listed(tiling, row, shards, shard) for shard in range(shards)]
        for stage in attention_cycles.STAGES:
            most = max(parts, key=lambda part: sum(part[stage]["kinds"].values()))[stage]
            found = counts[stage]
            kinds = {n: x for n, x in found["kinds"].items() if n in most["kinds"]}
            assert kinds == most["kinds"], (row, stage)
            assert sum(found["kinds"].values()) == sum(kinds.values())
            names = ("steps", "pairs", *attention_cycles.SIDES[stage])
            assert {n: found[n] for n in names} == {n: most[n] for n in names}, (row, stage)


def test_executed_products_are_those_of_the_pairs():
    tiling = tuning.with_block(tuning.INTERPRETED, 256)
    one = attention_cycles.count_packed(tiling, np.ones((1, LENGTH), np.int32))
    blocks = LENGTH // 256
    whole, diagonal = blocks * (blocks - 1) / 2 * 256**2, blocks * (128 * 256 + 128 * 128)
    assert attention_cycles.executed(tiling, one) == pytest.approx(whole + diagonal)
