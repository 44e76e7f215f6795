"""Products of rows [B, T, ...] with a kernel, as the device takes them fastest."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tulu_jax.kernels import target

MANY = 512  # positions with which a product is worth a pass over memory before and after it


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


def apart(x: Float[Array, "B T *features"]) -> Float[Array, "B T *features"]:
    """`x`, computed before what a TPU makes of it, and its cotangent likewise, for many positions.

    XLA would put what is computed element by element into the products beside it, before them even
    once for every tile of the result. With silu, a norm or a rotation and their gradients inside,
    products are priced at up to twice the cycles (docs/pods.md).
    """
    many = x.shape[0] * x.shape[1] >= MANY
    return _apart(x) if many and target.platform() == "tpu" else x


@jax.custom_vjp
def _apart(x):
    return jax.lax.optimization_barrier(x)


_apart.defvjp(
    lambda x: (_apart(x), None), lambda _, cotangent: (jax.lax.optimization_barrier(cotangent),)
)
