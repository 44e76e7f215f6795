"""The GPU attention kernels against float64, in the interpreter (compiled where there is a GPU)."""

import functools
import importlib.util
import inspect
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import attention_cases as cases

from tulu_jax.kernels import flash_attention_gpu as flash

INTERPRET = jax.default_backend() != "gpu"


def tile_of(case):
    """In the interpreter small blocks, of which even a short row has several."""
    if INTERPRET:
        return flash.Tile(queries=64, keys=32, step=32, warps=4, stages=2)
    return flash.tile_of(case.head_dim, jnp.dtype(case.dtype))


def plan_of(case, segments, branches):
    segments = jnp.asarray(segments)
    branches = None if branches is None else jnp.asarray(branches)
    rows = slice(case.offset, case.offset + case.queries)
    return flash.prepare(
        segment_ids=segments[:, rows],
        kv_segment_ids=segments,
        branches=None if branches is None else branches[:, rows],
        kv_branches=branches,
        query_offset=case.offset,
        tile=tile_of(case),
    )


listed = jax.jit(plan_of, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def run(case, q, k, v, d_out, segments, branches):
    """Outputs, log-sum-exps and gradients of sum(out · d_out), heads before positions."""
    plan = plan_of(case, segments, branches)

    def attend(q, k, v):
        heads_last = (x.swapaxes(1, 2) for x in (q, k, v))
        out, lse = flash.flash_attention(*heads_last, plan, interpret=INTERPRET)
        return out.swapaxes(1, 2), lse

    (out, lse), pullback = jax.vjp(attend, q, k, v)
    return out, lse, pullback((d_out, jnp.zeros_like(lse)))


@pytest.mark.parametrize("case", cases.CASES, ids=range(len(cases.CASES)))
def test_matches_float64(case):
    @settings(max_examples=5, deadline=None)
    @given(st.data())
    def check(data):
        segments, branches = data.draw(cases.layouts(case))
        arrays = cases.draw_arrays(case, data.draw(st.integers(0, 2**31)))
        found = run(case, *arrays, segments, branches)
        cases.assert_matches_float64(case, arrays, segments, branches, found)

    check()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_lists_hold_what_is_visible_and_masks_only_where_needed(data):
    case = data.draw(st.sampled_from(cases.CASES))
    segments, branches = data.draw(cases.layouts(case))
    plan = jax.tree.map(np.asarray, listed(case, segments, branches))
    seen = cases.visible(case, segments, branches)[0]
    sizes = plan.own.shape[1], plan.key.shape[1]
    seen = np.pad(seen, [(0, n - m) for n, m in zip(sizes, seen.shape, strict=True)])
    tile = plan.tile
    for lists, rows, block in (
        (plan.keys_of[0], seen, tile.queries),
        (plan.queries_of[0], seen.T, tile.keys),
    ):
        tiles = rows.reshape(len(rows) // block, block, -1, tile.step).swapaxes(1, 2)
        assert len(lists) == len(tiles)
        for numbers, row in zip(lists, tiles, strict=True):
            whole, active = numbers[: flash.FIRST]
            numbers = numbers[flash.FIRST :]
            assert set(numbers[:whole]) == set(np.nonzero(row.all((1, 2)))[0])
            assert set(numbers[:active]) == set(np.nonzero(row.any((1, 2)))[0])


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_changing_one_segment_leaves_every_other_bit_identical(scale):
    case = cases.CASES[0]
    segments = np.repeat([1, 2, 3, 0], [90, 77, 120, 13])[None].astype(np.int32)
    arrays = cases.draw_arrays(case, 0)
    changed = [x.at[:, :, 90:167].multiply(scale).at[:, :, 90:167].add(0.5) for x in arrays]
    before, _, grads_before = run(case, *arrays, segments, None)
    after, _, grads_after = run(case, *changed, segments, None)
    others = (segments[0] == 1) | (segments[0] == 3)
    for x, y in zip((before, *grads_before), (after, *grads_after), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.array_equal(x[:, :, others], y[:, :, others])
        assert not np.array_equal(x[:, :, 90:167], y[:, :, 90:167])


@pytest.mark.parametrize("name", cases.BREAKING)
def test_extreme_logits(name):
    case = cases.CASES[0]
    segments = np.repeat([1, 2, 0], [140, 100, 60])[None].astype(np.int32)
    q, k, v, d_out = cases.draw_arrays(case, 1)
    # In steps of 1/32 the 64 products of a logit of 300 have one float32 sum, in whatever order a
    # machine adds them: else 2,400 and 63 small terms are off by up to 18 of the roundings below.
    q, k = cases.BREAKING[name](jnp.round(q * 32) / 32, jnp.round(k * 32) / 32)
    out, _, grads = run(case, q, k, v, d_out, segments, None)
    seen = cases.visible(case, segments, None)
    expected_out, _, expected_grads = cases.reference(q, k, v, d_out, seen)
    # Logits of size L have rounding errors of L · 2^-24 · a few, and so have probabilities.
    scores = np.einsum("bnth,bnsh->bnts", q, np.repeat(k, 2, axis=1)) / 8
    limit = max(1e-5, 4 * 2.0**-24 * np.abs(scores).max())
    for found, expected in zip((out, *grads), (expected_out, *expected_grads), strict=True):
        assert np.isfinite(found).all()
        assert cases.error(case, found, expected) < limit
    assert not np.asarray(out)[:, :, segments[0] == 0].any()


def test_gradient_of_the_log_sum_exp():
    case = cases.CASES[0]
    segments = np.repeat([1, 2], [140, 160])[None].astype(np.int32)
    q, k, v, _ = cases.draw_arrays(case, 2)
    weights = jax.random.normal(jax.random.key(0), q.shape[:3])
    plan = plan_of(case, segments, None)

    def ours(q, k):
        heads_last = (x.swapaxes(1, 2) for x in (q, k, v))
        return (flash.flash_attention(*heads_last, plan, interpret=INTERPRET)[1] * weights).sum()

    def dense(q, k):
        scores = jnp.einsum("BNTH,BNSH->BNTS", q, jnp.repeat(k, 2, axis=1), precision="highest")
        seen = cases.visible(case, segments, None)[:, None]
        lse = jax.nn.logsumexp(jnp.where(seen, scores / 8, -jnp.inf), axis=-1)
        return (lse * weights).sum()

    for found, expected in zip(
        jax.jit(jax.grad(ours, (0, 1)))(q, k), jax.jit(jax.grad(dense, (0, 1)))(q, k), strict=True
    ):
        assert cases.error(case, found, np.asarray(expected, np.float64)) < 1e-5


@pytest.mark.parametrize("changes, message", [
    ({"q": (300, 4, 64)}, r"q has 3 axes, shape \(300, 4, 64\); expected 4"),
    ({"q": (1, 300, 3, 64)}, r"q \(1, 300, 3, 64\), k .* do not belong together"),
    ({"v": (1, 299, 2, 64)}, "do not belong together"),
    ({"q": (1, 256, 4, 64)}, "plan is for 1 rows of 300 queries .* found 1 rows of 256 and 300"),
])  # fmt: skip
def test_shapes_that_do_not_belong_together(changes, message):
    shapes = {"q": (1, 300, 4, 64), "k": (1, 300, 2, 64), "v": (1, 300, 2, 64)} | changes
    plan = plan_of(cases.CASES[0], np.ones((1, 300), np.int32), None)
    with pytest.raises(ValueError, match=message):
        unchecked = inspect.unwrap(flash.flash_attention)  # of the types that pytest checks
        unchecked(*(jnp.zeros(shape) for shape in shapes.values()), plan, interpret=True)


def test_heads_and_dtypes_that_are_not_taken():
    with pytest.raises(ValueError, match="head size 320: expected 1 to 256"):
        flash.tile_of(320, jnp.dtype("bfloat16"))
    with pytest.raises(ValueError, match="operands are float64; expected bfloat16"):
        flash.tile_of(128, jnp.dtype("float64"))


lowers = pytest.mark.skipif(
    jax.__version_info__ > (0, 10, 2) and INTERPRET,
    reason="this jaxlib compiles Triton while it lowers, which needs the CUDA plugin",
)


@lowers
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: torch brings it on Linux",
)
def test_compiles_for_hopper_without_a_device():
    """In a process of its own, because Triton and TensorFlow do not live in one."""
    script = pathlib.Path(__file__).parents[2] / "benchmarks" / "attention_gpu.py"
    arguments = ["--capabilities", "90", "--shapes", "32/8 heads x 64"]
    found = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr[-3000:]
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["ok"] and len(report["kernels"]) == 3
    for kernel in report["kernels"].values():
        assert kernel["spilled"] == 0 and kernel["tensor core"] > 0 and kernel["async copies"] > 0


@lowers
@pytest.mark.parametrize("heads, kv_heads, head_dim, dtype, branched", [
    (32, 32, 128, "bfloat16", False),
    (64, 8, 128, "bfloat16", True),
    (32, 8, 64, "bfloat16", True),
    (8, 1, 256, "bfloat16", False),
    (8, 8, 128, "float32", False),
])  # fmt: skip
def test_lowers_for_cuda_without_a_device(heads, kv_heads, head_dim, dtype, branched):
    dtype, T = jnp.dtype(dtype), 8192
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    q, k = (jax.ShapeDtypeStruct((1, T, n, head_dim), dtype) for n in (heads, kv_heads))

    def both(q, k, v, d_out, ids, branches):
        plan = flash.prepare(
            segment_ids=ids,
            kv_segment_ids=ids,
            branches=branches if branched else None,
            kv_branches=branches if branched else None,
            query_offset=0,
            tile=flash.tile_of(head_dim, dtype),
        )
        attend = functools.partial(flash.flash_attention, plan=plan, interpret=False)
        (out, lse), pullback = jax.vjp(attend, q, k, v)
        return out, pullback((d_out, jnp.zeros_like(lse)))

    lowered = jax.jit(both).trace(q, k, k, q, ids, ids).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("triton") == 3  # forward, dQ, dK and dV
