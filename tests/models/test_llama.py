"""Sizes, packing and numerics of the model itself; parity with Hugging Face is in tests/interop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.models import config as config_lib
from tulu_jax.models import kept_keys, layers, llama, paged_attention
from tulu_jax.models.config import ExecutionConfig, LlamaConfig

TINY = LlamaConfig(
    vocab_size=64, num_layers=2, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=128,
)  # fmt: skip
EXACT = ExecutionConfig(compute_dtype="float32", attention="xla", remat=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # from the `config.json` of each base on the hub
        ("llama2_7b", 6_738_415_616),
        ("llama2_13b", 13_015_864_320),
        ("llama2_70b", 68_976_648_192),
        ("codellama_7b", 6_738_546_688),
        ("codellama_13b", 13_016_028_160),
        ("codellama_34b", 33_743_970_304),
    ],
)
def test_published_sizes(name, expected):
    config = config_lib.named(name)
    params = llama.abstract_params(config, "bfloat16")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_params == expected


def test_unknown_size_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'llama2_70b'"):
        config_lib.named("llama2_70")


def test_invalid_shapes_are_all_reported():
    with pytest.raises(ValueError) as error:
        dataclasses.replace(TINY, num_kv_heads=3, head_dim=7)
    assert "num_kv_heads = 3" in str(error.value) and "head_dim = 7" in str(error.value)


def packed_inputs(lengths, total, seed=0):
    tokens = np.random.default_rng(seed).integers(3, TINY.vocab_size, total)
    segment_ids, positions = np.zeros(total, np.int32), np.zeros(total, np.int32)
    start = 0
    for number, length in enumerate(lengths, 1):
        segment_ids[start : start + length] = number
        positions[start : start + length] = np.arange(length)
        start += length
    arrays = (tokens.astype(np.int32), segment_ids, positions)
    return dict(zip(("tokens", "segment_ids", "positions"), arrays, strict=True))


def batch_of(row):
    return {name: jnp.asarray(value)[None] for name, value in row.items()}


@pytest.mark.parametrize("attention", ["xla", "blockwise"])
def test_packed_logits_equal_each_conversation_alone(attention):
    execution = dataclasses.replace(EXACT, attention=attention)
    params = llama.init_params(TINY, jax.random.key(0))
    row = packed_inputs([7, 5, 9], 24)
    packed = llama.logits(TINY, execution, params, **batch_of(row))[0]
    start = 0
    for length in (7, 5, 9):
        alone = packed_inputs([length], length)
        alone["tokens"] = row["tokens"][start : start + length]
        expected = llama.logits(TINY, execution, params, **batch_of(alone))[0]
        np.testing.assert_allclose(packed[start : start + length], expected, atol=1e-5)
        start += length


def test_changing_segment_one_leaves_segment_two_bit_identical():
    params = llama.init_params(TINY, jax.random.key(0))
    row = packed_inputs([8, 8], 16)
    run = jax.jit(lambda row: llama.logits(TINY, EXACT, params, **row))
    before = run(batch_of(row))
    changed = row["tokens"].copy()
    changed[:8] = changed[:8][::-1]
    after = run(batch_of({**row, "tokens": changed}))
    assert np.array_equal(before[0, 8:], after[0, 8:])
    assert not np.array_equal(before[0, :8], after[0, :8])


@pytest.mark.parametrize("policy", config_lib.REMAT_POLICIES)
def test_rematerialisation_changes_nothing(policy):
    params = llama.init_params(TINY, jax.random.key(0))
    inputs = batch_of(packed_inputs([10, 4], 16))

    def grads(execution):
        def loss(p):
            return jnp.square(llama.logits(TINY, execution, p, **inputs)).mean()

        return jax.jit(jax.grad(loss))(params)

    plain = grads(EXACT)
    remat = grads(dataclasses.replace(EXACT, remat=True, remat_policy=policy))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, remat)


def test_rotary_angles_are_float32_at_long_positions():
    """bfloat16 angles (EasyLM's `llama_model.py`) are wrong past ~256 positions; ours are not."""
    positions = jnp.asarray([[8191]])
    cos, sin = layers.rotary_angles(positions, head_dim=128, theta=1e4)
    frequencies = 1e4 ** (-np.arange(0, 128, 2) / 128)
    assert cos.dtype == sin.dtype == jnp.float32
    # float32 rounds an angle of 8191 rad by up to 2.4e-4, the frequency's own rounding doubles it
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(8191 * frequencies), atol=1e-3)
    np.testing.assert_allclose(sin[0, 0, 0], np.sin(8191 * frequencies), atol=1e-3)


def test_bfloat16_compute_is_close_and_its_statistics_are_float32():
    params = llama.init_params(TINY, jax.random.key(0))
    inputs = batch_of(packed_inputs([16], 16))
    exact = llama.logits(TINY, EXACT, params, **inputs)
    rounded = llama.logits(
        TINY, dataclasses.replace(EXACT, compute_dtype="bfloat16"), params, **inputs
    )
    assert rounded.dtype == jnp.float32
    scale = float(jnp.std(exact))
    assert float(jnp.abs(rounded - exact).max()) < 0.1 * scale  # bfloat16 keeps 8 bits


def test_a_step_over_pages_equals_the_whole_row():
    """A row's prompt from a packed row into pages that are not in order, then a token a step; the
    other row of the batch has ended."""
    params = llama.init_params(TINY, jax.random.key(0))
    row = packed_inputs([4, 8, 4], 16)  # of which the second is decoded from its third token on
    expected = llama.hidden_states(TINY, EXACT, params, **batch_of(row))[0, 4:12]
    cache = paged_attention.empty_cache(TINY, pages=6, page=4, dtype="float32")
    kept = kept_keys.keys_and_values(TINY, EXACT, params, block=None, **batch_of(row))
    places = jnp.asarray([[paged_attention.NOBODYS, 5, 3, paged_attention.NOBODYS]])
    cache = paged_attention.filled(cache, kept, jnp.arange(4), places[0])
    cache = paged_attention.copied(cache, jnp.asarray([3]), jnp.asarray([1]))
    table = jnp.asarray([[0, 0], [5, 1]])
    for n in range(2, 8):
        positions = jnp.asarray([n, n])
        see = functools.partial(
            paged_attention.attend, table=table, positions=positions, active=jnp.asarray([0, 1])
        )
        tokens = jnp.asarray([7, row["tokens"][4 + n]])
        out, cache = kept_keys.step(
            TINY, EXACT, params, cache, see, tokens=tokens, positions=positions
        )
        np.testing.assert_allclose(out[1], expected[n], atol=1e-5)


def test_a_leaked_tracer_would_break_the_second_trace():
    """The abstract model is cached between traces; it must hold shapes, never a trace's values."""
    params = llama.init_params(TINY, jax.random.key(0))
    inputs = batch_of(packed_inputs([4], 4))
    for scale in (1.0, 2.0):
        jax.jit(lambda p, s=scale: llama.logits(TINY, EXACT, p, **inputs) * s)(params)
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct)
        for leaf in jax.tree.leaves(llama._abstract(TINY, EXACT)[1])
    )
