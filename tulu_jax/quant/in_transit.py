"""Weights in transit as int8: a code for each, and a scale for each index of the first axis.

What shares a scale is all that a device has of one index of the axis along which the weight is
gathered: the scales are one vector, which XLA applies within the products that read the codes.
(Scales in blocks of that axis it writes out first, as large as the weight: `docs/pods.md`.)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from tulu_jax.quant import nf4


def encode(weight: Float[Array, "D ..."]) -> tuple[Int8[Array, "D ..."], Array]:
    """Codes and scales, bfloat16 [D], of `weight`, bfloat16 or float32.

    A scale is the largest magnitude of its index over 127, rounded to bfloat16. Decoded in float32,
    a weight is off by half a scale at most, and by nothing where it is an integer times a bfloat16
    scale and the largest integer of its index is 127. An index with what is not finite decodes to
    NaN.
    """
    weight = weight.astype(jnp.float32)
    scales = nf4.largest(weight.reshape(len(weight), -1), axis=1) * np.float32(1 / 127)
    # Without this XLA may round by a scale that it never rounded itself.
    scales = jax.lax.reduce_precision(scales, exponent_bits=8, mantissa_bits=7)
    codes = jnp.round(weight / _along(jnp.where(scales > 0, scales, 1), weight))
    return codes.astype(jnp.int8), scales.astype(jnp.bfloat16)


def decode(codes: Int8[Array, "D ..."], scales: Array, dtype) -> Float[Array, "D ..."]:
    """The weight in `dtype`: the product of code and scale, rounded once. bfloat16 has both
    exactly, and its products cost a TPU half of float32's."""
    return codes.astype(dtype) * _along(scales.astype(dtype), codes)


def _along(scales, x):
    return scales.reshape(-1, *[1] * (x.ndim - 1))
