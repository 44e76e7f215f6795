"""A decoding step through kernels in interpret mode, against the layers that XLA multiplies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.models import kept_keys, llama, paged_attention, streamed_layers
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding, slices

CONFIG = LlamaConfig(
    vocab_size=64, num_layers=3, embed_dim=256, mlp_dim=512, num_heads=4, num_kv_heads=2,
    head_dim=128, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=64,
)  # fmt: skip
EXECUTION = ExecutionConfig(compute_dtype="bfloat16")
ROWS, PAGE = 4, 16


def steps(params, parts):
    """Hidden states of two steps of four rows, in `parts`, and the cache behind them."""
    table = jnp.tile(1 + jnp.arange(ROWS // parts, dtype=jnp.int32), parts)[:, None]

    @jax.jit
    def run(params, cache, tokens, positions):
        see = functools.partial(
            paged_attention.attend,
            table=table,
            positions=positions,
            active=jnp.ones(ROWS, jnp.int32),
        )
        return kept_keys.step(
            CONFIG, EXECUTION, params, cache, see, tokens=tokens, positions=positions
        )

    cache = paged_attention.empty_cache(CONFIG, pages=parts + ROWS, page=PAGE, dtype="bfloat16")
    found = []
    for position in range(2):
        tokens = jnp.array([5, 6, 7, 8]) + position
        hidden, cache = run(params, cache, tokens, jnp.full(ROWS, position, jnp.int32))
        found.append(hidden)
    return [np.asarray(x, np.float32) for x in (*found, cache["k"], cache["v"])]


@pytest.fixture
def params():
    drawn = llama.init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: (3 * x if x.ndim > 2 else x).astype(jnp.bfloat16), drawn)


@pytest.mark.parametrize("devices, cores", [(1, 1), (2, 2), (4, 1)])
def test_a_step_is_what_xla_makes_of_it(params, devices, cores, monkeypatch):
    mesh = mesh_lib.make(slices.resident(devices, CONFIG.axis_sizes), jax.devices()[:devices])
    parts = max(1, devices // CONFIG.num_kv_heads)
    assert dict(mesh.shape).get("group", 1) == parts
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.param_shardings(mesh, params))
        expected = steps(params, parts)
        used = []

        def rings(block, x):
            used.append(x.shape)
            return streamed_layers.rings_of(block, ROWS, cores)

        monkeypatch.setattr(streamed_layers, "rings", rings)
        found = steps(params, parts)
    assert used == [(ROWS, 1, CONFIG.embed_dim)]
    for one, other in zip(found, expected, strict=True):
        # Some thirty roundings to bfloat16 lie between, of which a few fall another way.
        np.testing.assert_allclose(one, other, atol=2**-5 * np.abs(other).max())
        assert other.std() > 0.05 * np.abs(other).max()


def test_where_weights_do_not_stream(params):
    model = llama.trunk(CONFIG, EXECUTION, params)
    x = jnp.zeros((ROWS, 1, CONFIG.embed_dim), jnp.bfloat16)
    assert streamed_layers.rings(model.layers, x) is None  # no TPU
    assert streamed_layers.rings_of(model.layers, ROWS, 2) is not None
    wide = llama.init_params(CONFIG, jax.random.key(0))
    assert streamed_layers.rings_of(llama.trunk(CONFIG, EXECUTION, wide).layers, ROWS, 1) is None
