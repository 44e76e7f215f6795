"""Adapters: what they add, what dropout depends on, and that nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax import validation
from tulu_jax.models import llama, lora
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.quant import nf4

TINY = LlamaConfig(
    vocab_size=64, num_layers=2, embed_dim=64, mlp_dim=192, num_heads=4, num_kv_heads=2,
    head_dim=16, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=128,
)  # fmt: skip
ADAPTER = lora.LoRAConfig(rank=4, alpha=8.0, dropout=0.25)


def rows(batch=2, length=16):
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, 64)
    ones = jnp.ones((batch, length), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ones.shape)
    return dict(tokens=tokens, segment_ids=ones, positions=positions)


def execution(adapter=ADAPTER, dtype="float32"):
    return ExecutionConfig(compute_dtype=dtype, attention="xla", adapter=adapter)


def adapters(config=ADAPTER, zero=False):
    found = lora.init(config, TINY.projections, TINY.num_layers, jax.random.key(2))
    if zero:
        return found
    key = jax.random.key(3)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape, x.dtype), found)


def joined(base, adapter):
    common = base.keys() & adapter.keys()
    return base | adapter | {name: joined(base[name], adapter[name]) for name in common}


def merged(base, adapter, config=ADAPTER):
    """The kernels with s · A B added, in float32."""

    def walk(base, adapter, path=()):
        if lora.A in adapter:
            delta = config.scale * jnp.einsum("LKR,LRN->LKN", adapter[lora.A], adapter[lora.B])
            return {"kernel": base["kernel"] + delta.reshape(base["kernel"].shape)}
        return base | {name: walk(base[name], adapter[name]) for name in adapter}

    return walk(base, adapter)


def test_an_adapter_adds_its_product_and_b_of_zero_adds_nothing():
    base = llama.init_params(TINY, jax.random.key(0))
    plain = llama.logits(TINY, execution(None), base, **rows())
    fresh = llama.logits(TINY, execution(), joined(base, adapters(zero=True)), **rows())
    np.testing.assert_array_equal(plain, fresh)
    found = llama.logits(TINY, execution(), joined(base, adapters()), **rows())
    expected = llama.logits(TINY, execution(None), merged(base, adapters()), **rows())
    assert np.abs(np.asarray(found - plain)).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_initialisation_is_pefts():
    shapes = {"self_attn/q_proj": (64, 128), "mlp/down_proj": (192, 64)}
    config = dataclasses.replace(ADAPTER, rank=32)
    found = lora.init(config, shapes, 3, jax.random.key(0))["model"]["layers"]
    a = np.asarray(found["mlp"]["down_proj"][lora.A])
    assert a.shape == (3, 192, 32) and not np.asarray(found["mlp"]["down_proj"][lora.B]).any()
    bound = 1 / np.sqrt(192)  # of kaiming_uniform_(a=sqrt(5)) for 192 inputs
    assert np.abs(a).max() <= bound
    np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.02)
    assert (
        found["self_attn"]["q_proj"][lora.A][0] != found["self_attn"]["q_proj"][lora.A][1]
    ).any()


def test_targets_and_scales():
    attention = dataclasses.replace(ADAPTER, targets="attention")
    found = lora.init(attention, TINY.projections, 2, jax.random.key(0))["model"]["layers"]
    assert list(found) == ["self_attn"] and len(found["self_attn"]) == 4
    two = dataclasses.replace(ADAPTER, targets="q_proj, up_proj")
    assert two.names == ("q_proj", "up_proj")
    assert ADAPTER.scale == 2.0
    assert dataclasses.replace(ADAPTER, rank_stabilised=True).scale == 4.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(rank=0), "rank = 0: expected 1 to"),
        (dict(alpha=0.0), "alpha = 0.0: expected a positive number"),
        (dict(dropout=1.0), r"dropout = 1.0: not in \[0, 1\)"),
        (dict(targets="q_proj,wq"), "wq is unknown; expected one of .*'all'.*or names of"),
        (dict(targets=" "), "nothing is unknown"),
        (dict(dtype="float16"), "dtype = 'float16'"),
    ],
)
def test_bad_settings_are_named(change, said):
    with pytest.raises(validation.UsageError, match=said):
        dataclasses.replace(ADAPTER, **change)


@pytest.mark.parametrize("features", [64, 192, 172, 43, 640])
def test_a_mask_is_of_the_row_the_position_and_the_feature(features):
    """The share that is kept; any cut of rows, positions or features gives the same mask."""
    noise = lora.noise(jnp.int32(5), jax.random.key(7), (8,))
    by_position = lora.by_position(noise, 64)

    def kept(noise, count=features, first=0, stream=3):
        whole = dict(features=count, of=features, first=first)
        return np.asarray(lora.kept(noise, stream, 0.25, **whole))

    mask = kept(by_position)
    sigma = np.sqrt(0.25 * 0.75 / mask.size)
    assert abs(mask.mean() - 0.75) < 5 * sigma
    np.testing.assert_array_equal(mask[3:5, 10:20], kept(by_position[3:5, 10:20]))
    if features % 4 == 0:
        shards = [kept(by_position, features // 4, n * (features // 4)) for n in range(4)]
        np.testing.assert_array_equal(mask, np.concatenate(shards, axis=2))
    for other in (
        kept(by_position, stream=4),
        kept(lora.by_position(lora.noise(jnp.int32(6), jax.random.key(7), (8,)), 64)),
        kept(lora.by_position(lora.noise(jnp.int32(5), jax.random.key(8), (8,)), 64)),
    ):
        assert abs((mask == other).mean() - 0.625) < 8 * sigma  # as of independent draws


def test_dropout_scales_what_it_keeps_and_none_is_drawn_without_noise():
    base = llama.init_params(TINY, jax.random.key(0))
    params = joined(base, adapters())
    noise = lora.noise(jnp.int32(0), jax.random.key(0), (2,))
    quiet = llama.hidden_states(TINY, execution(), params, **rows())
    loud = llama.hidden_states(TINY, execution(), params, **rows(), noise=noise)
    again = llama.hidden_states(TINY, execution(), params, **rows(), noise=noise)
    np.testing.assert_array_equal(loud, again)
    assert (loud != quiet).any()
    x = jnp.ones((1, 4, 64))
    keep = jnp.arange(64) < 48
    found = lora.delta(
        ADAPTER, jnp.eye(64), jnp.eye(64), x, jnp.broadcast_to(keep[None, None], x.shape)
    )
    np.testing.assert_allclose(found, 2.0 / 0.75 * jnp.where(keep[None, None], x, 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("quant", "mesh", "parts"),
    [
        pytest.param(
            nf4.QuantConfig(), dict(fsdp=2, context=2, tensor=2), 2, marks=pytest.mark.slow
        ),
        (nf4.QuantConfig(), dict(fsdp=2, tensor=2, context=2), 1),
        (None, dict(fsdp=2, context=2, tensor=2), 2),
    ],
)
def test_every_mesh_gives_the_same(quant, mesh, parts):
    """Loss, gradients of A and B, and dropout, with rows whole and in parts."""
    from tulu_jax.parallel import mesh as mesh_lib
    from tulu_jax.parallel import sharding

    wide = dataclasses.replace(TINY, embed_dim=256, head_dim=64, mlp_dim=512)
    base = llama.init_params(wide, jax.random.key(0))
    base = base if quant is None else nf4.quantise_params(base, quant)
    trained = lora.init(ADAPTER, wide.projections, 2, jax.random.key(2))
    trained = jax.tree.map(lambda x: x + 0.01, trained)
    noise = lora.noise(jnp.int32(5), jax.random.key(7), (4,))

    def loss(trained, base, parts):
        run = dataclasses.replace(execution(), row_parts=parts)
        hidden = llama.hidden_states(wide, run, joined(base, trained), **rows(4, 32), noise=noise)
        return jnp.sum(jnp.sin(hidden) * jnp.arange(256)[None, None])

    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=2)(trained, base, 1)
    devices = mesh_lib.make(mesh_lib.MeshConfig(**mesh))
    with jax.set_mesh(devices):
        placed = [
            jax.device_put(tree, sharding.param_shardings(devices, tree))
            for tree in (trained, base)
        ]
        for leaf in jax.tree.leaves(placed[0]):  # all are divided over fsdp and context
            assert leaf.addressable_shards[0].data.size * 4 <= leaf.size
        found, theirs = jax.jit(jax.value_and_grad(loss), static_argnums=2)(*placed, parts)
    np.testing.assert_allclose(found, value, rtol=2e-4)
    for mine, other in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-4 * np.abs(np.asarray(mine)).max())
