"""Products of a decoding step's rows in interpret mode, against the plain form."""

import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.kernels import decode_products as products
from tulu_jax.kernels import decode_rings

L = 3
ROWS = pytest.mark.parametrize("rows", [5, 20])  # few and more; no multiples of a register's 16
EPS = 1e-5


@pytest.fixture
def small_pieces(monkeypatch):
    """Several pieces, of which some are refilled."""
    monkeypatch.setattr(decode_rings, "FEW_BYTES", 2**17)
    for cores in (1, 2):
        monkeypatch.setitem(decode_rings.PIECE_BYTES, cores, 2**18)
        monkeypatch.setitem(decode_rings.RING_BYTES, cores, 2**19)


def draw(rng, *shape, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.bfloat16)


def normalised(x, scale):
    wide = np.asarray(x, np.float64)
    wide /= np.sqrt((wide**2).mean(-1, keepdims=True) + EPS)
    return np.asarray(jnp.asarray(wide * np.asarray(scale), jnp.bfloat16), np.float64)


@ROWS
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("heads", [(4, 1), (2, 3)], ids=str)
def test_weights_of_one_input(small_pieces, heads, cores, rows):
    """Heads between rows, heads apart, and a matrix, side by side and normalised."""
    rng, D = np.random.default_rng(0), 512
    shapes = [(D, heads[0], 128), (D, heads[1], 128), (D, 256)]
    stacks = tuple(draw(rng, L, *shape, scale=0.05) for shape in shapes)
    weights = tuple(decode_rings.weight(shape, inputs=1, middle=False) for shape in shapes)
    assert [one.form for one in weights] == ["between", "heads", "rows"]
    x, scale = draw(rng, rows, D), jnp.asarray(rng.normal(size=D), jnp.float32)
    ring = decode_rings.ring(weights, rows=rows, cores=cores, divides=True)
    assert ring.whole > ring.slots or cores == 2
    found = products.multiply(
        x, stacks, jnp.int32(1), name="qkv", ring=ring, scale=scale, eps=EPS, interpret=True
    )
    layer = np.concatenate([np.asarray(w[1], np.float64).reshape(D, -1) for w in stacks], axis=1)
    check(found, normalised(x, scale) @ layer)


@ROWS
@pytest.mark.parametrize(
    "middle, cores",
    [(1376, 1), (640, 1), (1024, 2)],
    ids=["7B over 8 devices, turned", "a shorter last piece", "two cores"],
)
def test_the_mlp(small_pieces, middle, cores, rows):
    rng, D = np.random.default_rng(1), 256
    gate, up = (draw(rng, L, D, middle, scale=0.1) for _ in range(2))
    down = draw(rng, L, middle, D, scale=0.1)
    across = decode_rings.weight((D, middle), inputs=1, middle=True)
    weights = (across, across, decode_rings.weight((middle, D), inputs=1, middle=False))
    assert across.form == ("turned" if middle % 128 else "rows")
    ring = decode_rings.ring(weights, rows=rows, cores=cores, divides=False)
    assert ring.whole + (ring.rest > 0) > ring.slots
    x, scale = draw(rng, rows, D), jnp.ones(D)
    found = products.mlp(
        x, (gate, up, down), jnp.int32(2), name="mlp", ring=ring, scale=scale, eps=EPS,
        interpret=True,
    )  # fmt: skip
    normed = normalised(x, scale)
    gate, up, down = (np.asarray(w[2], np.float64) for w in (gate, up, down))
    gated = normed @ gate
    inner = jnp.asarray(gated / (1 + np.exp(-gated)) * (normed @ up), jnp.bfloat16)
    check(found, np.asarray(inner, np.float64) @ down)


def check(found, expected):
    """To the rounding of the result, and of what is rounded on the way and may fall either way."""
    assert found.dtype == jnp.bfloat16
    found, size = np.asarray(found, np.float64), np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=2**-8 * size)


def test_what_cannot_be_cut_is_refused():
    """Halves of 1,376 fill no lanes; nor do 1,000 inputs."""
    across = decode_rings.weight((4096, 1376), inputs=1, middle=True)
    assert decode_rings.ring((across,), rows=64, cores=2, divides=False) is None
    square = decode_rings.weight((1000, 1000), inputs=1, middle=False)
    assert decode_rings.ring((square,), rows=64, cores=1, divides=True) is None
