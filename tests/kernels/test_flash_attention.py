"""The TPU attention kernel against float64, in the interpreter (compiled where there is a TPU)."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from kernels import attention_cases as cases

from tulu_jax import chips
from tulu_jax.kernels import flash_attention as flash
from tulu_jax.kernels import flash_attention_tuning as tuning

INTERPRET = jax.default_backend() != "tpu"


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
        tiling=case.tiling(),
    )


listed = jax.jit(plan_of, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def run(case, q, k, v, d_out, segments, branches):
    """Outputs, log-sum-exps and gradients of sum(out · d_out)."""
    plan = plan_of(case, segments, branches)
    attend = functools.partial(flash.flash_attention, interpret=INTERPRET)
    (out, log_sum_exp), pullback = jax.vjp(lambda q, k, v: attend(q, k, v, plan), q, k, v)
    return out, log_sum_exp, pullback((d_out, jnp.zeros_like(log_sum_exp)))


@pytest.mark.parametrize("case", cases.CASES, ids=range(len(cases.CASES)))
def test_matches_float64(case):
    @settings(max_examples=10, deadline=None)
    @given(st.data())
    def check(data):
        segments, branches = data.draw(cases.layouts(case))
        arrays = cases.draw_arrays(case, data.draw(st.integers(0, 2**31)))
        found = run(case, *arrays, segments, branches)
        cases.assert_matches_float64(case, arrays, segments, branches, found)

    check()


def simulated(function, *arguments):
    """`function` compiled with its kernels run by the simulator of a TPU with two cores: memory
    that nothing wrote is NaN, copies are made as late as a wait for them allows, parallel steps
    come in a random order. Returns the results and the cores that did something.

    The simulator prints what is wrong: two cores, or a core and a copy, that touch one place in no
    order ("RACE DETECTED"), and copies that nothing waited for.
    """
    cores = set()

    def record(token, point, core):
        del point
        cores.add(int(core))
        return token

    simulator = pltpu.InterpretParams(
        num_cores_or_threads=2,
        detect_races=True,
        uninitialized_memory="nan",
        dma_execution_mode="on_wait",
        random_seed=0,
        grid_point_recorder=record,
    )
    with pltpu.force_tpu_interpret_mode(simulator):
        results = jax.block_until_ready(jax.jit(function)(*arguments))
    return results, cores


@pytest.mark.skipif(not INTERPRET, reason="the simulator runs on a CPU")
@pytest.mark.slow
def test_two_cores_do_not_race(capfd):
    case = cases.Case(queries=200, keys=200, load=2)
    segments = np.repeat([1, 2, 3, 0], [90, 77, 20, 13])[None].astype(np.int32)
    arrays = cases.draw_arrays(case, 0)
    plan = plan_of(case, segments, None)
    tiling = dataclasses.replace(plan.tiling, cores=2)
    assert case.heads // tiling.forward.heads == case.heads // tiling.backward.heads == 2
    plan = dataclasses.replace(plan, tiling=tiling)

    def both(q, k, v, d_out):
        attend = lambda q, k, v: flash.flash_attention(q, k, v, plan, interpret=False)  # noqa: E731
        (out, log_sum_exp), pullback = jax.vjp(attend, q, k, v)
        return out, log_sum_exp, pullback((d_out, jnp.zeros_like(log_sum_exp)))

    found, cores = simulated(both, *arrays)
    assert cores == {0, 1}
    assert capfd.readouterr().out == ""
    cases.assert_matches_float64(case, arrays, segments, None, found)


@pytest.mark.skipif(not INTERPRET, reason="the simulator runs on a CPU")
def test_a_race_would_be_reported(capfd):
    """Two cores write the same block."""

    def kernel(x, out):
        out[...] = x[...] + pl.program_id(0)

    def race(x):
        block = pl.BlockSpec((8, 128), lambda i: (0, 0))
        return pl.pallas_call(
            kernel,
            grid=(2,),
            in_specs=[block],
            out_specs=block,
            out_shape=x,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        )(x)

    try:
        simulated(race, jnp.ones((8, 128)))
        said = capfd.readouterr().out
    except RuntimeError as error:  # of jax 0.12; 0.10 prints it and goes on
        said = str(error)
    assert "RACE DETECTED" in said


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_list_holds_what_is_visible_and_meets_every_block(data):
    case = data.draw(st.sampled_from(cases.CASES))
    segments, branches = data.draw(cases.layouts(case))
    plan = jax.tree.map(np.asarray, listed(case, segments, branches))
    seen = cases.visible(case, segments, branches)[0]
    block = case.tiling().forward.block
    padded = [-(-n // block) * block for n in seen.shape]
    seen = np.pad(seen, [(0, n - m) for n, m in zip(padded, seen.shape, strict=True)])
    tiles = seen.reshape(padded[0] // block, block, padded[1] // block, block).swapaxes(1, 2)
    for pairs in (plan.forward, plan.backward):
        count = pairs.start[pairs.count[0]]
        found = {
            (i, j): flag & flash.KIND
            for i, j, flag in zip(pairs.query[:count], pairs.key[:count], pairs.flag, strict=False)
        }
        assert len(found) == count  # none twice
        active = {pair for pair, kind in found.items() if kind != flash.EMPTY}
        assert active == set(zip(*np.nonzero(tiles.any((2, 3))), strict=True))
        whole = {pair for pair, kind in found.items() if kind == flash.FULL}
        assert whole == set(zip(*np.nonzero(tiles.all((2, 3))), strict=True))
        diagonal = {(i, j) for i, j in active - whole if i * block + case.offset == j * block}
        assert diagonal == {p for p, kind in found.items() if kind == flash.DIAGONAL}
        for i, j in active - whole - diagonal:  # what its kind leaves out is not visible
            tile = case.tiling().forward
            left_out = tiles[i, j].copy()
            work = flash.chunks(int(found[i, j]), tile)
            for k, n, q, m in work:
                left_out[q : q + m, k : k + n] = False
            assert not left_out.any()
            part = block // len(flash.edge_kinds(tile))  # and no kind with less work would do
            queries, keys = (tiles[i, j].any(axis) for axis in (1, 0))
            start = keys.argmax() // part * part
            end = -(-(block - queries[::-1].argmax()) // part) * part
            for kind in flash.kinds(tile)[2:]:
                products = flash.chunks(kind, tile)
                covered = products[0][0] <= start and products[0][3] >= end
                less = sum(n * m for _, n, _, m in products) < sum(n * m for _, n, _, m in work)
                assert not (covered and less)
        assert {i for i, _ in found} == set(range(tiles.shape[0]))
    assert {j for _, j in found} == set(range(tiles.shape[1]))


@pytest.mark.parametrize("scale", [1.0, 30.0])  # 30: logits of thousands, the guard's branch
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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", cases.BREAKING)
def test_inputs_that_break_the_sum_without_a_maximum(name, transposed):
    case = dataclasses.replace(cases.CASES[0], transposed=transposed)
    segments = np.repeat([1, 2, 0], [140, 100, 60])[None].astype(np.int32)
    q, k, v, d_out = cases.draw_arrays(case, 1)
    q, k = cases.BREAKING[name](q, k)
    static = flash.static_of(q, case.head_dim, INTERPRET)
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, 84), (0, 0))) for x in (q, k, v)]
    plan = plan_of(case, segments, None)
    _, lse = flash._forward(*padded, plan, online=False, static=static)
    assert np.isinf(lse).any(), "the input does not break it"
    out, _, grads = run(case, q, k, v, d_out, segments, None)
    expected_out, _, expected_grads = cases.reference(
        q, k, v, d_out, cases.visible(case, segments, None)
    )
    # Logits of size L have rounding errors of L · 2^-24 · a few, and so have probabilities.
    scores = np.einsum("bnth,bnsh->bnts", q, np.repeat(k, 2, axis=1)) / 8
    limit = max(1e-5, 4 * 2.0**-24 * np.abs(scores).max())
    for found, expected in zip((out, *grads), (expected_out, *expected_grads), strict=True):
        assert np.isfinite(found).all()
        assert cases.error(case, found, expected) < limit
    assert not np.asarray(out)[:, :, segments[0] == 0].any()


def test_overflow_of_the_values_alone_is_noticed():
    """Sums in range, products with the values not: every logit is 60, every value 1e35."""
    case = cases.CASES[0]
    segments = np.ones((1, case.keys), np.int32)
    q, k, v, d_out = (jnp.zeros_like(x) for x in cases.draw_arrays(case, 0))
    q, k = q.at[..., 0].set(8.0), k.at[..., 0].set(60.0)
    out, _, _ = run(case, q, k, v + 1e35, d_out, segments, None)
    np.testing.assert_allclose(out, np.full(out.shape, 1e35), rtol=1e-5)


def test_gradient_of_the_log_sum_exp():
    case = cases.CASES[0]
    segments = np.repeat([1, 2], [140, 160])[None].astype(np.int32)
    q, k, v, _ = cases.draw_arrays(case, 2)
    weights = jax.random.normal(jax.random.key(0), q.shape[:3])
    plan = plan_of(case, segments, None)

    def ours(q, k):
        lse = flash.flash_attention(q, k, v, plan, interpret=INTERPRET)[1]
        return (lse * weights).sum()

    def dense(q, k):
        scores = jnp.einsum("BNTH,BNSH->BNTS", q, jnp.repeat(k, 2, axis=1), precision="highest")
        seen = cases.visible(case, segments, None)[:, None]
        lse = jax.nn.logsumexp(jnp.where(seen, scores / 8, -jnp.inf), axis=-1)
        return (lse * weights).sum()

    for found, expected in zip(
        jax.jit(jax.grad(ours, (0, 1)))(q, k), jax.jit(jax.grad(dense, (0, 1)))(q, k), strict=True
    ):
        assert cases.error(case, found, np.asarray(expected, np.float64)) < 1e-5


def test_under_scan_and_checkpoint():
    case = cases.CASES[0]
    segments = np.repeat([1, 2], [140, 160])[None].astype(np.int32)
    q, k, v, d_out = cases.draw_arrays(case, 3)

    def loss(q, k, v, wrap):
        plan = plan_of(case, segments, None)

        def layer(x, _):
            return flash.flash_attention(x, k, v, plan, interpret=INTERPRET)[0], None

        return (jax.lax.scan(wrap(layer), q, None, length=2)[0] * d_out).sum()

    plain, remat = (
        jax.jit(jax.grad(functools.partial(loss, wrap=wrap), (0, 1, 2)))(q, k, v)
        for wrap in (lambda f: f, functools.partial(jax.checkpoint, prevent_cse=False))
    )
    for x, y in zip(plain, remat, strict=True):
        assert np.asarray(x).any()
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def arguments(**changes):
    """Arrays and a plan that fit together, but for `changes` of shapes."""
    case = cases.CASES[0]
    shapes = {
        "q": (1, case.heads, case.queries, 64),
        "k": (1, case.kv_heads, case.keys, 64),
        "v": (1, case.kv_heads, case.keys, 64),
    } | changes
    plan = plan_of(case, np.ones((1, case.keys), np.int32), None)
    return [jnp.zeros(shape) for shape in shapes.values()], plan


@pytest.mark.parametrize("changes, message", [
    ({"q": (4, 300, 64)}, r"q has 3 axes, shape \(4, 300, 64\); expected 4"),
    ({"q": (1, 3, 300, 64)}, r"q \(1, 3, 300, 64\), k .* do not belong together"),
    ({"v": (1, 2, 299, 64)}, "do not belong together"),
    ({"q": (1, 4, 256, 64)}, "plan is for 1 rows of 300 queries .* found 1 rows of 256 and 300"),
    ({n: (1, 2, 300, 320) for n in "qkv"}, "head size 320: expected 1 to 256"),
])  # fmt: skip
def test_shapes_that_do_not_belong_together(changes, message):
    arrays, plan = arguments(**changes)
    with pytest.raises(ValueError, match=message):
        unchecked = inspect.unwrap(flash.flash_attention)  # of the types that pytest checks
        unchecked(*arrays, plan, interpret=True)


def test_ids_are_checked():
    tiling = cases.CASES[0].tiling()
    ids = jnp.ones((1, 300), jnp.int32)
    good = dict(segment_ids=ids, kv_segment_ids=ids, branches=None, kv_branches=None)
    for changes, message in (
        ({"segment_ids": ids.astype(jnp.float32)}, "segment_ids is float32; expected integers"),
        ({"kv_branches": ids}, "found only one of them"),
        ({"branches": ids[:, :9], "kv_branches": ids}, r"branches has shape \(1, 9\); expected"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(flash.prepare)(**good | changes, query_offset=0, tiling=tiling)
    with pytest.raises(ValueError, match="operands are float16; expected one of"):
        tuning.tiling("v4", "float16")
    with pytest.raises(ValueError, match="bytes of SMEM; found 1,048,576"):
        ids = jnp.ones((64, 4096), jnp.int32)
        good = dict(segment_ids=ids, kv_segment_ids=ids, branches=None, kv_branches=None)
        jax.eval_shape(lambda: flash.prepare(**good, query_offset=0, tiling=tiling))


@pytest.mark.parametrize("chip, queries", [("v3", 128), ("v5p", 256)])
def test_as_many_rows_are_listed_as_fit_and_leave_room(chip, queries):
    """Of a row's part on one device, whatever the rows hold; twice as many do not fit."""
    sizes = dict(queries=queries, keys=8192)
    tiling = tuning.tiling(chip, "bfloat16")
    tiling = flash.fit(tiling, heads=8, kv_heads=1, head_dim=128, itemsize=2, **sizes)
    most = flash.most_rows(tiling, **sizes)

    def prepared(rows):
        ids = {
            name: jax.ShapeDtypeStruct((rows, length), jnp.int32)
            for name, length in zip(("segment_ids", "kv_segment_ids"), sizes.values(), strict=True)
        }
        rest = dict(branches=None, kv_branches=None, tiling=tiling)
        offset = jax.ShapeDtypeStruct((), jnp.int32)
        jax.eval_shape(functools.partial(flash.prepare, **rest), **ids, query_offset=offset)

    prepared(most)
    with pytest.raises(ValueError, match="bytes of SMEM"):
        prepared(2 * (most + 1))


@pytest.mark.parametrize("chip", chips.CHIPS)
@pytest.mark.parametrize("heads, kv_heads", [(32, 32), (64, 8), (8, 1), (3, 3)])
def test_tuned_tiles_fit_any_number_of_heads(chip, heads, kv_heads):
    for dtype in ("bfloat16", "float32") if chip != "v3" else ("bfloat16",):
        tiling = tuning.tiling(chip, dtype)
        found = flash.fit(
            tiling,
            queries=8192,
            keys=8192,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=128,
            itemsize=jnp.dtype(dtype).itemsize,
        )
        for tile in (found.forward, found.backward):
            assert heads % tile.heads == 0
            group = heads // kv_heads
            assert group % tile.heads == 0 or tile.heads % group == 0
            if heads % (2 * tiling.cores) == 0:  # both cores get as much to do
                assert heads // tile.heads % tiling.cores == 0


def test_a_row_too_long_for_vmem_is_refused():
    with pytest.raises(ValueError, match=r"bytes of VMEM; found 16,777,216.*shard the seq"):
        flash.fit(
            tuning.tiling("v4", "bfloat16"),
            queries=65536,
            keys=65536,
            heads=8,
            kv_heads=8,
            head_dim=128,
            itemsize=2,
        )
