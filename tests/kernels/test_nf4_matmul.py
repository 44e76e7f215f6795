"""The product with an NF4 weight: the kernel in the interpreter and XLA's form, against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from tulu_jax import chips
from tulu_jax.kernels import nf4_matmul as nf4
from tulu_jax.kernels import nf4_tiles


@pytest.fixture
def interpreter(monkeypatch):
    """What Pallas lacks on a CPU: a rule for `pack_elementwise`, and barriers without which XLA
    merges bitcasts of different widths wrongly (jax 0.10.2)."""
    bitcast, barrier = pltpu.bitcast, jax.lax.optimization_barrier

    def bits(x, dtype):
        if dtype == jnp.bfloat16:
            return jax.lax.bitcast_convert_type(x.astype(dtype), jnp.uint16).astype(jnp.uint32)
        return jax.lax.bitcast_convert_type(x, jnp.uint32) & 0xFFFF

    def pack(pair, packed_dtype):
        low, high = (bits(x, packed_dtype) for x in pair)
        return low | high << 16

    monkeypatch.setattr(pltpu, "pack_elementwise", pack)
    monkeypatch.setattr(pltpu, "bitcast", lambda x, dtype: barrier(bitcast(barrier(x), dtype)))


def packed(codes):
    """int32 [K/8, N] of codes [K, N], by the rule that the module's first lines give."""
    K, N = codes.shape
    words = np.zeros((K // 8, N), np.uint32)
    for row in range(K):
        block, inside = divmod(row, 64)
        q, r, h = inside // 16, inside % 16 // 2, inside % 2
        words[8 * block + r] |= codes[row].astype(np.uint32) << (16 * h + 4 * q)
    return words.view(np.int32)


def weight(K, N, dtype, seed=0):
    """Random codes and scales, and the weight that they stand for, decoded by numpy."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (K, N))
    scales = (rng.random((K // 64, N)) * 0.05 + 0.003).astype(np.float32)
    whole = np.array(nf4.CODEBOOK, np.float32)[codes] * np.repeat(scales, 64, axis=0)
    return jnp.asarray(packed(codes)), jnp.asarray(scales), whole.astype(dtype)


EVEN = dict(rows=64, blocks=1, bands=1, shares=1, contracted=128, out=128)
CASES = {
    "one tile": (EVEN | dict(rows=128), 128, 128),
    "tiles and blocks": (EVEN | dict(blocks=2), 256, 256),
    # Nothing divides: a last block of rows, a last tile along the contraction and one across.
    "shorter ends": (EVEN | dict(blocks=4), 192, 192),
    "bands and shares": (EVEN | dict(bands=2, shares=2), 128, 256),
}
DECODED = [("shorter ends", decoder) for decoder in nf4.DECODERS] + [
    (name, "lanes") for name in CASES if name != "shorter ends"
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name, decoder", DECODED)
def test_kernel_decodes_exactly(name, decoder, backward, interpreter):
    """Multiplied by unit vectors the kernel gives the weights themselves, to the bit."""
    sizes, contracted, out = CASES[name]
    tile = nf4_tiles.Tile(**sizes, decoder=decoder, vmem=2**24)
    K, N = (out, contracted) if backward else (contracted, out)
    codes, scales, whole = weight(K, N, ml_dtypes.bfloat16)
    rows = tile.bands * tile.blocks * tile.rows
    x = np.resize(np.eye(contracted), (min(rows, contracted), contracted))
    x = jnp.asarray(x, jnp.bfloat16)
    found = nf4.run(x, codes, scales, tile=tile, backward=backward, interpret=True)
    np.testing.assert_array_equal(found, (whole.T if backward else whole)[: len(x)])


def test_kernel_multiplies(interpreter):
    """Random rows with leading axes, fewer than fill a register, in float32 sums."""
    codes, scales, whole = weight(128, 128, ml_dtypes.bfloat16)
    tile = nf4_tiles.fit("v4", rows=6, contracted=128, out=128)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 128)), jnp.bfloat16)
    for backward, dense in ((False, whole), (True, whole.T)):
        found = nf4.run(x, codes, scales, tile=tile, backward=backward, interpret=True)
        expected = np.asarray(x, np.float64) @ dense.astype(np.float64)
        assert found.shape == (2, 3, 128) and found.dtype == jnp.bfloat16
        # Of two sums in another order, rounded to 8 bits: half a unit in the last place and a bit.
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_decodes_exactly(dtype):
    codes, scales, whole = weight(192, 72, dtype)
    found = nf4.matmul(jnp.eye(192, dtype=dtype), codes, scales)
    np.testing.assert_array_equal(found, whole)
    _, pullback = jax.vjp(lambda x: nf4.matmul(x, codes, scales), jnp.zeros((72, 192), dtype))
    np.testing.assert_array_equal(pullback(jnp.eye(72, dtype=dtype))[0], whole.T)


def test_gradient_is_that_of_the_dense_product():
    codes, scales, whole = weight(128, 64, "float32")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 128)), jnp.float32)

    def loss(product):
        return lambda x: jnp.sum(jnp.tanh(product(x)) ** 2)

    found = jax.grad(loss(lambda x: nf4.matmul(x, codes, scales)))(x)
    expected = jax.grad(loss(lambda x: x @ whole))(x)
    # float32 sums of 128 terms in another order
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_layers_scanned_rematerialised_and_divided():
    """As a model runs them: a scan over stacked layers, checkpointed, rows divided over a mesh."""
    L, D = 3, 128
    made = [weight(D, D, "float32", seed=n) for n in range(L)]
    codes, scales, whole = (jnp.stack([jnp.asarray(one[n]) for one in made]) for n in range(3))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, D)), jnp.float32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(product, *layers):
        def body(x, layer):
            return x + jnp.tanh(product(x, *layer)), None

        body = jax.checkpoint(body, prevent_cse=False)
        return lambda x: jnp.sum(jax.lax.scan(body, x, layers)[0] ** 2)[None]

    def divided(x, codes, scales):
        return jax.grad(lambda x: run(nf4.matmul, codes, scales)(x)[0])(x)

    rows, whole_spec = jax.P("data"), jax.P()
    with jax.set_mesh(mesh):
        found = jax.jit(
            jax.shard_map(
                divided, in_specs=(rows, whole_spec, whole_spec), out_specs=rows, check_vma=False
            )
        )(x, codes, scales)
    expected = jax.grad(lambda x: run(jnp.matmul, whole)(x)[0])(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_decoded_is_kept_for_the_backward_pass():
    codes, scales, _ = weight(128, 64, "bfloat16")
    x = jnp.zeros((4, 128), jnp.bfloat16)
    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: nf4.matmul(x, codes, scales), x)[1], x)
    assert {leaf.shape for leaf in jax.tree.leaves(kept)} <= {codes.shape, scales.shape}


@pytest.mark.parametrize(
    "x, codes, scales",
    [
        ((4, 64), (16, 8), (2, 8)),  # x of another K
        ((4, 128), (16, 8), (1, 8)),  # a scale too few
        ((4, 96), (12, 8), (1, 8)),  # half a block
    ],
)
def test_shapes_that_do_not_belong_together(x, codes, scales):
    with pytest.raises(ValueError, match="do not belong together: expected"):
        nf4.matmul(jnp.zeros(x), jnp.zeros(codes, jnp.int32), jnp.zeros(scales, jnp.float32))


LENGTHS = st.integers(1, 40).map(lambda n: 256 * n) | st.sampled_from([128, 1024, 11008, 28672])


@settings(max_examples=200, deadline=None)
@given(
    chip=st.sampled_from(["v4", "v5e", "v5p", "v6e", "tpu7x"]),
    rows=st.integers(1, 20_000),
    contracted=LENGTHS,
    out=LENGTHS,
)
def test_tiles_cover_the_result_once(chip, rows, contracted, out):
    tile = nf4_tiles.fit(chip, rows=rows, contracted=contracted, out=out)
    blocks, across = tile.bands * tile.blocks, -(-out // tile.out)
    assert (blocks - 1) * tile.rows < rows <= blocks * tile.rows and tile.rows % 16 == 0
    assert across % tile.shares == 0
    assert tile.contracted <= contracted and tile.out <= out
    assert tile.contracted % 128 == tile.out % 128 == 0
    hardware, parts = chips.CHIPS[chip], tile.bands * tile.shares
    assert parts % hardware.cores == 0 or parts == 1
    scratch = 4 * tile.rows * tile.blocks * tile.out + 4 * tile.contracted * tile.out
    assert scratch < tile.vmem <= hardware.vmem
    # No product is faster than the matrix units, nor twice as slow where there is much to do.
    ideal = 2.0 * rows * contracted * out / hardware.peak
    seconds = nf4_tiles.seconds(chip, rows=rows, contracted=contracted, out=out)
    assert seconds > ideal
    if rows >= 2048 and min(contracted, out) >= 2048:
        assert seconds < 1.35 * ideal


@pytest.mark.parametrize(
    "chip, sizes",
    [
        ("v3", dict(rows=1024, contracted=1024, out=1024)),  # no bfloat16 operands
        ("v5e", dict(rows=1024, contracted=1024, out=1376)),  # 11,008 over 8 devices
        ("v5e", dict(rows=1024, contracted=2752, out=1024)),
        ("v5e", dict(rows=0, contracted=1024, out=1024)),
    ],
)
def test_where_the_kernel_does_not_go(chip, sizes):
    assert nf4_tiles.fit(chip, **sizes) is None
    assert nf4_tiles.seconds(chip, **sizes) is None


def test_a_tile_is_a_value():
    """It is an argument of compiled functions and is looked up by its fields."""
    tile = nf4_tiles.fit("v6e", rows=4096, contracted=4096, out=4096)
    assert hash(tile) == hash(dataclasses.replace(tile))
