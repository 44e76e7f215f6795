"""The product of activations with an NF4 weight, and the product of its gradient.

W is [K, N] = [in, out] in blocks of 64 along K. `codes` int32 [K/8, N] holds eight 4-bit codes a
word: bits 16h + 4q … + 3 of word (8b + r, n) are the code of row 64b + 16q + 2r + h, so the word of
one register is one block of 64 rows by 128 columns and gives four registers of bfloat16 pairs in
the order of the rows. `scales` float32 [K/64, N] are the blocks' absolute maxima. A weight is
float32 codebook × float32 scale, rounded once to the dtype of the product.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

BLOCK = 64  # rows of a scale
# Normal float 4 (Dettmers et al. 2023), as bitsandbytes has it.
CODEBOOK = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def matmul(
    x: Float[Array, "*rows K"], codes: Int32[Array, "K8 N"], scales: Float32[Array, "K64 N"]
) -> Float[Array, "*rows N"]:
    """x · W in the dtype of `x`, float32 sums; differentiable in `x` alone.

    The backward pass decodes again: no decoded weight is kept for it. Raises `ValueError` for
    shapes that do not belong together.
    """
    _check(x, codes, scales)
    return _product(x, codes, scales)


def decode(
    codes: Int32[Array, "K8 N"], scales: Float32[Array, "K64 N"], dtype: jnp.dtype
) -> Float[Array, "K N"]:
    """W in `dtype`, by XLA."""
    blocks, columns = scales.shape
    words = codes.reshape(blocks, 1, 8, 1, columns)
    shifts = (4 * jnp.arange(4))[None, :, None, None, None] + 16 * jnp.arange(2)[:, None]
    values = jnp.asarray(CODEBOOK, jnp.float32)[lax.shift_right_logical(*_same(words, shifts)) & 15]
    return (values * scales[:, None, None, None]).astype(dtype).reshape(-1, columns)


def _same(words, shifts):
    shape = jnp.broadcast_shapes(words.shape, shifts.shape)
    return jnp.broadcast_to(words, shape), jnp.broadcast_to(shifts.astype(words.dtype), shape)


def _check(x, codes, scales):
    rows, columns = 8 * codes.shape[0], codes.shape[1]
    if x.shape[-1] != rows or scales.shape != (rows // BLOCK, columns) or rows % BLOCK:
        raise ValueError(
            f"x {x.shape}, codes {codes.shape} and scales {scales.shape} do not belong together: "
            f"expected [..., K], [K/8, N] and [K/{BLOCK}, N]"
        )


@jax.custom_vjp
def _product(x, codes, scales):
    return jnp.einsum("...K,KN->...N", x, decode(codes, scales, x.dtype))


def _forward(x, codes, scales):
    return _product(x, codes, scales), (codes, scales)


def _backward(residuals, gradient):
    codes, scales = residuals
    dx = jnp.einsum("...N,KN->...K", gradient, decode(codes, scales, gradient.dtype))
    return dx, None, None


_product.defvjp(_forward, _backward)
