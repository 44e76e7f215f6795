"""Attention against a float64 loop, and what packing promises."""

import functools
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.test_util import check_grads

from tulu_jax.models import attention as attention_lib
from tulu_jax.models import xla_attention
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding

IMPLEMENTATIONS = ("xla", "triangular", "blockwise")
GENERAL = ("xla", "blockwise")  # also for queries at an offset


def reference(q, k, v, segment_ids, kv_segment_ids, query_offset, branches=None):
    """float64 softmax attention, one query at a time; `branches` of rows of S."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        keys = [
            s
            for s in range(k.shape[1])
            if s <= t + query_offset and kv_segment_ids[b, s] == segment_ids[b, t] != 0
            if branches is None or branches[b, s] in (0, branches[b, t + query_offset])
        ]
        if keys:
            scores = k[b, keys, n // group] @ q[b, t, n] / np.sqrt(H)
            p = np.exp(scores - scores.max())
            out[b, t, n] = (p / p.sum()) @ v[b, keys, n // group]
    return out


def draw_inputs(seed, *, batch, length, kv_heads, group, head_dim=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (batch, length, kv_heads * group, head_dim), dtype)
    k, v = (jax.random.normal(x, (batch, length, kv_heads, head_dim), dtype) for x in keys[1:])
    return q, k, v


@st.composite
def segment_rows(draw, batch, length):
    """Rows of segments 1..k followed by padding, as the packer makes them."""
    rows = []
    for _ in range(batch):
        lengths = draw(st.lists(st.integers(1, length), min_size=0, max_size=5))
        row = np.zeros(length, np.int32)
        start = 0
        for number, size in enumerate(lengths, 1):
            row[start : start + size] = number
            start += size
        rows.append(row)
    return np.stack(rows)


@functools.partial(jax.jit, static_argnums=(5, 6))
def value_and_grads(q, k, v, weights, segments, implementation, block):
    def scalar(q, k, v):
        out = attention_lib.attention(
            q,
            k,
            v,
            segment_ids=segments,
            kv_segment_ids=segments,
            query_offset=0,
            implementation=implementation,
        )
        return (out * weights).sum(), out

    sizes = {"BLOCK": block, "TRIANGLE_BLOCK": block}
    with unittest.mock.patch.multiple(xla_attention, **sizes):
        (_, out), grads = jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, grads


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_matches_float64_forward_and_backward(data):
    length, block = data.draw(st.sampled_from([(5, 4), (23, 8), (8, 512)]))
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 3)]))
    segments = data.draw(segment_rows(2, length))
    q, k, v = draw_inputs(0, batch=2, length=length, kv_heads=kv_heads, group=group)
    expected = reference(q, k, v, segments, segments, 0)
    weights = jax.random.normal(jax.random.key(9), q.shape)

    results = {
        name: value_and_grads(q, k, v, weights, jnp.asarray(segments), name, block)
        for name in IMPLEMENTATIONS
    }
    for name, (out, grads) in results.items():
        np.testing.assert_allclose(out, expected, atol=5e-6, err_msg=name)
        assert np.all(np.asarray(out)[segments == 0] == 0), name
        for ours, dense in zip(grads, results["xla"][1], strict=True):
            np.testing.assert_allclose(ours, dense, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_matches_finite_differences(implementation):
    q, k, v = draw_inputs(3, batch=1, length=6, kv_heads=1, group=2, head_dim=4)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])

    def scalar(q, k, v):
        out = attention_lib.attention(
            q,
            k,
            v,
            segment_ids=segments,
            kv_segment_ids=segments,
            query_offset=0,
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(3 * out))

    check_grads(jax.jit(scalar), (q, k, v), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("implementation", GENERAL)
def test_queries_at_an_offset_equal_the_same_rows_of_the_whole(implementation):
    q, k, v = draw_inputs(1, batch=2, length=24, kv_heads=2, group=2)
    segments = jnp.asarray(np.repeat([[1] * 10 + [2] * 14], 2, axis=0))
    common = dict(kv_segment_ids=segments, implementation=implementation)
    whole = attention_lib.attention(q, k, v, segment_ids=segments, query_offset=0, **common)
    part = attention_lib.attention(
        q[:, 16:], k, v, segment_ids=segments[:, 16:], query_offset=16, **common
    )
    np.testing.assert_allclose(part, whole[:, 16:], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_changing_one_segment_leaves_the_other_bit_identical(implementation):
    q, k, v = draw_inputs(2, batch=1, length=40, kv_heads=2, group=2)
    segments = jnp.asarray([[1] * 17 + [2] * 20 + [0] * 3])
    run = jax.jit(
        lambda q, k, v: attention_lib.attention(
            q,
            k,
            v,
            segment_ids=segments,
            kv_segment_ids=segments,
            query_offset=0,
            implementation=implementation,
        )
    )
    before = run(q, k, v)
    after = run(q.at[:, :17].multiply(3), k.at[:, :17].add(100), v.at[:, :17].set(-7))
    assert np.array_equal(before[:, 17:], after[:, 17:])
    assert not np.array_equal(before[:, :17], after[:, :17])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [300.0, 1e4])
def test_huge_logits_stay_finite(implementation, scale):
    q, k, v = draw_inputs(4, batch=1, length=12, kv_heads=1, group=1)
    segments = jnp.ones((1, 12), jnp.int32)

    def scalar(q, k, v):
        out = attention_lib.attention(
            q,
            k,
            v,
            segment_ids=segments,
            kv_segment_ids=segments,
            query_offset=0,
            implementation=implementation,
        )
        return out.sum()

    value, grads = jax.value_and_grad(scalar, argnums=(0, 1, 2))(q * scale, k, v)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
    expected = reference(q * scale, k, v, segments, segments, 0).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-4)


PAIRS = np.array([[1] * 14 + [2] * 8 + [0] * 2, [1] * 24])
BRANCHES = np.array([[0] * 4 + [1] * 6 + [2] * 4 + [0] * 3 + [1] * 2 + [2] * 3 + [0] * 2,
                     [0] * 8 + [1] * 8 + [2] * 8])  # fmt: skip


def test_blockwise_attention_looks_at_tiles_with_a_visible_key_only():
    """The other answer of a pair is a tile nobody needs, and so is padding."""
    segments = np.array([[1] * 12 + [2] * 8 + [0] * 4])
    branches = np.array([[0] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [1] * 4 + [0] * 4])
    with unittest.mock.patch.object(xla_attention, "BLOCK", 4):
        tiles = attention_lib.prepare(
            segment_ids=jnp.asarray(segments),
            kv_segment_ids=jnp.asarray(segments),
            branches=jnp.asarray(branches),
            kv_branches=jnp.asarray(branches),
            query_offset=0,
            implementation="blockwise",
            heads=(1, 1, 8),
            dtype=jnp.dtype("float32"),
        )["tiles"]
    order, counts = np.asarray(tiles["order"]), np.asarray(tiles["counts"])
    seen = [order[i, : counts[i]].tolist() for i in range(6)]
    assert seen == [[0], [0, 1], [0, 2], [3], [3, 4], []]


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "pallas_interpret"])
def test_answers_of_a_pair_do_not_see_each_other(implementation):
    """Every implementation against float64, with branches; an offset where it takes one."""
    offset = 0 if implementation == "triangular" else 8
    q, k, v = draw_inputs(5, batch=2, length=24, kv_heads=2, group=2)

    @jax.jit
    def run(q, k, v):
        return attention_lib.attention(
            q,
            k,
            v,
            segment_ids=jnp.asarray(PAIRS[:, offset:]),
            kv_segment_ids=jnp.asarray(PAIRS),
            branches=jnp.asarray(BRANCHES[:, offset:]),
            kv_branches=jnp.asarray(BRANCHES),
            query_offset=offset,
            implementation=implementation,
        )

    with unittest.mock.patch.multiple(xla_attention, BLOCK=8, TRIANGLE_BLOCK=8):
        found = run(q[:, offset:], k, v)
    expected = reference(q[:, offset:], k, v, PAIRS[:, offset:], PAIRS, offset, BRANCHES)
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_the_kernel_on_a_mesh_equals_dense_attention_on_one_device():
    """Rows over `data`, the sequence over `context`, heads over `tensor`; gradients too."""
    q, k, v = draw_inputs(6, batch=2, length=96, kv_heads=2, group=2, head_dim=16)
    segments = jnp.asarray(np.repeat([[1] * 40 + [2] * 50 + [0] * 6], 2, axis=0))
    weights = jax.random.normal(jax.random.key(1), q.shape)

    def loss(q, k, v, implementation):
        out = attention_lib.attention(
            q,
            k,
            v,
            segment_ids=segments,
            kv_segment_ids=segments,
            query_offset=0,
            implementation=implementation,
        )
        return (out * weights).sum()

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    expected = run(q, k, v, "xla")
    devices = mesh_lib.make(mesh_lib.MeshConfig(data=2, fsdp=1, context=2, tensor=2))
    with jax.set_mesh(devices):
        queries, keys = (
            NamedSharding(devices, sharding.spec("batch", axis, "heads", None))
            for axis in ("length", None)
        )
        placed = (jax.device_put(x, s) for x, s in ((q, queries), (k, keys), (v, keys)))
        found = run(*placed, "pallas_interpret")
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-5)


def test_what_auto_means():
    choose = functools.partial(attention_lib.choose, "auto", dtype=jnp.dtype("bfloat16"))
    assert choose(queries=1, keys=64, platform="tpu") == "xla"
    assert choose(queries=64, keys=64, platform="cpu") == "triangular"
    assert choose(queries=64, keys=128, platform="cpu") == "blockwise"
    assert choose(queries=2048, keys=2048, platform="gpu") == "blockwise"
    for kind, expected in (("TPU v3", "pallas"), ("TPU v2", "blockwise")):
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=2, platform="tpu")
        devices = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(devices):
            assert choose(queries=64, keys=64, platform="tpu") == expected
            if kind == "TPU v3":  # whose VMEM exact products of float32 do not fit in
                found = choose(queries=64, keys=64, platform="tpu", dtype=jnp.dtype("float32"))
                assert found == "blockwise"
    sizes = dict(queries=64, keys=64, platform="tpu", dtype=jnp.dtype("bfloat16"))
    kept = attention_lib.choose("triangular", **sizes)
    assert kept == "triangular"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_auto_means_on_a_gpu_lowers_for_cuda(dtype):
    """Forward and backward with branches, 8,192 tokens, where no card is."""
    q, k = (jax.ShapeDtypeStruct((1, 8192, n, 128), jnp.dtype(dtype)) for n in (8, 2))
    ids = jax.ShapeDtypeStruct((1, 8192), jnp.int32)

    def both(q, k, v, d_out, ids, branches):
        attend = functools.partial(
            attention_lib.attention,
            segment_ids=ids,
            kv_segment_ids=ids,
            branches=branches,
            kv_branches=branches,
            query_offset=0,
            implementation=attention_lib.choose(
                "auto", queries=8192, keys=8192, platform="gpu", dtype=q.dtype
            ),
        )
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(d_out)

    lowered = jax.jit(both).trace(q, k, k, q, ids, ids).lower(lowering_platforms=("cuda",))
    assert "8192x8192" not in lowered.as_text()  # no scores of whole rows


@pytest.mark.parametrize("name, message", [
    ("pallas", "'pallas' does not run on 'cpu'; expected a TPU v3 or later"),
    ("palas", "'palas' does not exist; expected 'auto'"),
])  # fmt: skip
def test_what_does_not_run_here_is_refused_not_replaced(name, message):
    q, k, v = draw_inputs(0, batch=1, length=4, kv_heads=1, group=1)
    ones = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=message):
        attention_lib.attention(
            q,
            k,
            v,
            segment_ids=ones,
            kv_segment_ids=ones,
            query_offset=0,
            implementation=name,
        )
