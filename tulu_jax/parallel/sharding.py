"""Where every array lives: parameter path -> logical axes -> mesh axes."""

import math
import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Every parameter path matches exactly one line; there is no catch-all.
PARAM_AXES = (
    (r"model/embed_tokens/embedding", ("vocab", "embed")),
    (r"model/layers/input_layernorm/scale", ("layers", "norm")),
    (r"model/layers/self_attn/q_proj/kernel", ("layers", "embed", "heads", "head_dim")),
    (r"model/layers/self_attn/[kv]_proj/kernel", ("layers", "embed", "kv_heads", "head_dim")),
    (r"model/layers/self_attn/o_proj/kernel", ("layers", "heads", "head_dim", "embed")),
    (r"model/layers/post_attention_layernorm/scale", ("layers", "norm")),
    (r"model/layers/mlp/(gate|up)_proj/kernel", ("layers", "embed", "mlp")),
    (r"model/layers/mlp/down_proj/kernel", ("layers", "mlp", "embed")),
    (r"model/norm/scale", ("norm",)),
    (r"lm_head/kernel", ("embed", "vocab")),
)

# Fields of a batch whose last axis is the sequence.
LENGTH_FIELDS = ("tokens", "targets", "loss_mask", "segment_ids", "positions", "branches")

AXIS_RULES = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "embed": ("fsdp", "context"),
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "layers": None,
    "norm": None,
}


def spec(*logical_axes: str | None) -> PartitionSpec:
    """The mesh axes of an array whose dimensions carry these logical names (None: replicated)."""
    return PartitionSpec(*(AXIS_RULES[axis] if axis else None for axis in logical_axes))


def num_devices() -> int:
    """Devices of the ambient mesh (`jax.set_mesh`); 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`x` placed by its logical axes on the ambient mesh (`jax.set_mesh`), if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def replicate(x: jax.Array) -> jax.Array:
    """`x` whole on every device of the ambient mesh, so that every process can read it."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def path_name(path) -> str:
    """A pytree path as 'model/norm/scale'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_axes(name: str) -> tuple[str, ...]:
    """Logical axes of the parameter `name`. Raises `ValueError` unless exactly one line matches."""
    matches = [axes for pattern, axes in PARAM_AXES if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise ValueError(
            f"parameter {name!r} matches {len(matches)} lines of PARAM_AXES; expected exactly one"
        )
    return matches[0]


def state_shardings(mesh: Mesh, state):
    """`NamedSharding` for every leaf of a training state: parameter-like leaves by their path.

    Optimizer moments carry the path of their parameter as a suffix, so one table serves both.
    Scalars (steps and counts) are replicated.
    """

    def leaf(path, value):
        if value.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        match = re.search(r"(model/|lm_head/).*", path_name(path))
        if match is None:
            raise ValueError(f"state leaf {path_name(path)!r} belongs to no parameter")
        return NamedSharding(mesh, spec(*param_axes(match.group())))

    return jax.tree.map_with_path(leaf, state)


def batch_sharding(mesh: Mesh, name: str, ndim: int) -> NamedSharding:
    """Sharding of batch field `name`: rows over `batch`, positions over `length`."""
    axes: list[str | None] = ["batch"] + [None] * (ndim - 1)
    if name in LENGTH_FIELDS:
        axes[-1] = "length"
    return NamedSharding(mesh, spec(*axes))


def what_divides(size: int, mesh_sizes: dict[str, int]) -> str:
    """'1, 2 or 4 would': the divisors of `size` that a mesh of as many devices can have."""
    devices = math.prod(mesh_sizes.values())
    *most, last = (str(d) for d in range(1, devices + 1) if devices % d == 0 and size % d == 0)
    return f"{', '.join(most)} or {last} would" if most else f"only {last} would"


def divisibility_problems(mesh_sizes: dict[str, int], abstract_params: dict) -> list[str]:
    """What the mesh cannot divide, one line for each logical axis with its size, divisor and what
    would divide it."""
    problems = {}

    def check(path, leaf):
        name = path_name(path)
        for size, axis in zip(leaf.shape, param_axes(name), strict=True):
            rule = AXIS_RULES[axis] or ()
            mesh_axes = (rule,) if isinstance(rule, str) else rule
            over = math.prod(mesh_sizes[mesh_axis] for mesh_axis in mesh_axes)
            if size % over:
                problems.setdefault(
                    (axis, size),
                    f"{axis} of size {size} ({name}) cannot be divided over mesh axis "
                    f"{' x '.join(mesh_axes)} = {over}; {what_divides(size, mesh_sizes)}",
                )

    jax.tree.map_with_path(check, abstract_params)
    return list(problems.values())
