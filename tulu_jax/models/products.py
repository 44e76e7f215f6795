"""Products of rows [B, T, ...] with a kernel, as the device takes them fastest."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from tulu_jax.kernels import target


def multiply(
    x: Float[Array, "B T *inputs"], kernel: Float[Array, "*inputs_and_outputs"]
) -> Float[Array, "B T *outputs"]:
    """x · kernel over all inputs, in the dtype of both.

    On a CPU the rows lie end to end. With two axes of rows XLA turns the gradient of the result
    around before it multiplies it with x, together with what it is computed from, element by
    element: a layer's update takes twice as long (`benchmarks/train_step_cpu.py`).
    """
    inputs = x.ndim - 2
    if target.platform() != "cpu":
        axes = range(inputs)[::-1]  # as einsum orders them: compiled programs stay as they were
        return jnp.tensordot(x, kernel, ([2 + axis for axis in axes], list(axes)))
    size = math.prod(kernel.shape[:inputs])
    found = x.reshape(-1, size) @ kernel.reshape(size, -1)
    return found.reshape(*x.shape[:2], *kernel.shape[inputs:])
