"""What one update changes (step, parameters and optimizer state), and what it never does."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax.parallel import sharding

VALUE, REWARD = "value", "reward"  # networks beside the policy, below these names
STACKED = "model/layers/"  # parameters of all layers, stacked on axis 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` is an int32 scalar, the number of updates made; `params` a nested dict of the arrays
    that the optimizer updates."""

    step: Any
    params: Any
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """Parameters that an update reads and never changes: without gradients, moments or copies in a
    checkpoint, and not donated.

    `base` is a nested dict of the policy's leaves that do not train; `reference` are the parameters
    of a whole model beside it, and below `REWARD` those of a reward model if there is one. Without
    such a model, or with None, the reference is `base`, if that is a whole model.
    """

    base: Any = dataclasses.field(default_factory=dict)
    reference: Any = None

    def whole(self, params: dict) -> dict:
        """The parameters of the policy: `params`, which train, and those of `base`."""
        return _joined(self.base, params)

    def value(self, params: dict) -> dict:
        """The parameters of the value network among `params`: whole, or beside a frozen `base`, on
        whose trunk it stands with adapters of its own."""
        trunk = {name: self.base[name] for name in ("model",) if name in self.base}
        return _joined(trunk, params[VALUE])

    @property
    def first(self) -> dict:
        """The parameters of the reference, which is the policy as the run began."""
        found = {name: part for name, part in (self.reference or {}).items() if name != REWARD}
        return found or self.base


def _joined(one: dict, other: dict) -> dict:
    common = one.keys() & other.keys()
    return one | other | {name: _joined(one[name], other[name]) for name in common}


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

    return fingerprint_of(jax.jit(lambda tree: jax.tree.map(leaf_sums, tree))(params))


def leaf_sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two sums of a leaf, uint32."""
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{leaf.dtype.itemsize * 8}"))
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        place = place * jnp.uint32(leaf.shape[axis]) + jax.lax.broadcasted_iota(
            jnp.uint32, leaf.shape, axis
        )
    return jnp.sum(bits), jnp.sum(bits * (2 * place + 1))


def fingerprint_of(sums: dict) -> str:
    """The fingerprint of parameters of whose leaves these are the sums."""
    result = hashlib.sha256()
    for path, value in jax.tree.leaves_with_path(jax.device_get(sums)):
        result.update(f"{sharding.path_name(path)}={np.uint32(value)};".encode())
    return result.hexdigest()[:16]
