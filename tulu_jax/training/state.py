"""What one update changes: step, parameters and optimizer state."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax.parallel import sharding

STACKED = "model/layers/"  # parameters of all layers, one behind the other on axis 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` is an int32 scalar, the number of updates made; `params` a nested dict of arrays."""

    step: Any
    params: Any
    opt_state: Any


def not_finite(params: dict) -> dict[str, list[int]]:
    """{path: layers} of the parameters with a value that is not finite; no layers for those that
    are not stacked."""

    def finite(path, leaf):
        stacked = sharding.path_name(path).startswith(STACKED)
        whole = jnp.isfinite(leaf).all(axis=tuple(range(int(stacked), leaf.ndim)))
        return sharding.replicate(whole)

    found = jax.jit(lambda tree: jax.tree.map_with_path(finite, tree))(params)
    return {
        sharding.path_name(path): np.flatnonzero(~whole).tolist() if whole.ndim else []
        for path, whole in jax.tree.leaves_with_path(jax.device_get(found))
        if not whole.all()
    }


def fingerprint(params: dict) -> str:
    """A hash of the values of all parameters, the same on every mesh.

    Each leaf is reduced on its devices to two wrap-around uint32 sums of its bits, one of them
    weighted by position; integer sums do not depend on the order of reduction.
    """

    def digest(leaf):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{leaf.dtype.itemsize * 8}"))
        bits = bits.astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis in range(leaf.ndim):
            place = place * jnp.uint32(leaf.shape[axis]) + jax.lax.broadcasted_iota(
                jnp.uint32, leaf.shape, axis
            )
        return jnp.sum(bits), jnp.sum(bits * (2 * place + 1))

    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(digest, tree))(params))
    result = hashlib.sha256()
    for path, value in jax.tree.leaves_with_path(sums):
        result.update(f"{sharding.path_name(path)}={np.uint32(value)};".encode())
    return result.hexdigest()[:16]
