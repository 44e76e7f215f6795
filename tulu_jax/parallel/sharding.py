"""Where every array lives: parameter path -> logical axes -> mesh axes, and how devices talk.

The forward and backward passes are written as each device runs them, under one `jax.shard_map`
(`per_device`): weights are gathered where they are used and their gradients reduce-scattered by the
transposition of that gather, activations move only where this file's functions are called. Outside
it, for optimizer, decoding and metrics, XLA places what the tables say.
"""

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Table = tuple[tuple[str, tuple[str, ...]], ...]

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
    (r"model/layers/self_attn/q_proj/kernel/(codes|absmax)", ("layers", "embed", "heads")),
    (r"model/layers/self_attn/[kv]_proj/kernel/(codes|absmax)", ("layers", "embed", "kv_heads")),
    (r"model/layers/self_attn/o_proj/kernel/(codes|absmax)", ("layers", "heads", "embed")),
    (r"model/layers/mlp/(gate|up)_proj/kernel/(codes|absmax)", ("layers", "embed", "mlp")),
    (r"model/layers/mlp/down_proj/kernel/(codes|absmax)", ("layers", "mlp", "embed")),
    (r"model/layers/self_attn/q_proj/kernel/outmax", ("layers", "norm", "heads")),
    (r"model/layers/self_attn/[kv]_proj/kernel/outmax", ("layers", "norm", "kv_heads")),
    (r"model/layers/mlp/(gate|up)_proj/kernel/outmax", ("layers", "norm", "mlp")),
    (r"model/layers/(self_attn/o|mlp/down)_proj/kernel/outmax", ("layers", "norm", "embed")),
    (r"model/layers/.*_proj/kernel/absmax2", ("layers", "norm")),
    (r"model/layers/.*_proj/kernel/offset", ("layers",)),
    (r"model/layers/(self_attn/[qkv]|mlp/(gate|up))_proj/lora_a", ("layers", "embed", "rank")),
    (r"model/layers/self_attn/o_proj/lora_a", ("layers", "adapter_heads", "rank")),
    (r"model/layers/mlp/down_proj/lora_a", ("layers", "adapter_mlp", "rank")),
    (r"model/layers/self_attn/q_proj/lora_b", ("layers", "rank", "adapter_heads")),
    (r"model/layers/self_attn/[kv]_proj/lora_b", ("layers", "rank", "adapter_kv_heads")),
    (r"model/layers/mlp/(gate|up)_proj/lora_b", ("layers", "rank", "adapter_mlp")),
    (r"model/layers/(self_attn/o|mlp/down)_proj/lora_b", ("layers", "rank", "embed")),
    (r"model/norm/scale", ("norm",)),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r"score/kernel", ("norm", "norm")),
)

AXIS_RULES = {
    "batch": ("data", "fsdp"),
    "rows": ("data", "fsdp", "context"),  # of a decoder's cache, and what its attention sees
    "length": "context",
    "positions": ("context", "tensor"),  # the length of activations between blocks
    "tensor": "tensor",
    "residual": "context",  # of a decoding step, whose rows are not divided so
    "embed": ("fsdp", "context"),
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "adapter_heads": ("tensor", "fsdp", "context"),
    "adapter_kv_heads": ("tensor", "fsdp", "context"),
    "adapter_mlp": ("tensor", "fsdp", "context"),
    "rank": None,
    "layers": None,
    "norm": None,
}

# The fifth axis of a mesh that only decodes (`slices.resident`): it divides the query heads that
# share a key/value head, and with them the MLP; each device along it has that head for rows of its
# own. Where a mesh has it these stand in place of the lines above.
GROUP = "group"
WITH_GROUP = {
    "rows": ("data", "fsdp", "context", GROUP),
    "positions": ("context", "tensor", GROUP),
    "tensor": ("tensor", GROUP),
    "mlp": ("tensor", GROUP),
    "heads": ("tensor", GROUP),
    "vocab": ("tensor", GROUP),
    "adapter_heads": ("tensor", GROUP, "fsdp", "context"),
    "adapter_mlp": ("tensor", GROUP, "fsdp", "context"),
}

# Of an adapter's leaf without `embed`: the logical axis that is left when it has been gathered
# along the mesh axes of `embed`, which are the minor ones of its own.
WITHOUT_EMBED = {"adapter_heads": "heads", "adapter_kv_heads": "kv_heads", "adapter_mlp": "mlp"}


def rule(logical_axis: str, mesh_axes: Collection[str]) -> str | tuple[str, ...] | None:
    """Which of `mesh_axes` divide `logical_axis`."""
    rules = AXIS_RULES | WITH_GROUP if GROUP in mesh_axes else AXIS_RULES
    return rules[logical_axis]


def spec(*logical_axes: str | None, mesh: Mesh | None = None) -> PartitionSpec:
    """The axes of `mesh`, by default the ambient one, of an array whose dimensions carry these
    logical names (None: replicated)."""
    names = (mesh or jax.sharding.get_abstract_mesh()).axis_names
    return PartitionSpec(*(rule(axis, names) if axis else None for axis in logical_axes))


def num_devices() -> int:
    """Devices among which XLA divides what is computed here: those of the ambient mesh
    (`jax.set_mesh`); 1 without one, and inside `per_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(size for name, size in mesh.shape.items() if name not in mesh.manual_axes)


def ways(logical_axis: str) -> int:
    """Into how many parts XLA divides `logical_axis` here: by the ambient mesh; 1 without one, and
    inside `per_device`."""
    if num_devices() == 1:
        return 1
    return shards(logical_axis, jax.sharding.get_abstract_mesh().shape)[1]


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`x` placed by its logical axes on the ambient mesh, if XLA divides it over one."""
    if num_devices() == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def per_device(function: Callable, in_specs, out_specs) -> Callable:
    """`function` as each device of the ambient mesh runs it on its shards; itself without a mesh
    and inside another `per_device`."""
    if num_devices() == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _bound(logical_axis: str) -> list[str]:
    """Mesh axes of `logical_axis` that this device can talk over, the major one first."""
    mesh = jax.sharding.get_abstract_mesh()
    divides = rule(logical_axis, mesh.axis_names)
    names = (divides,) if isinstance(divides, str) else divides or ()
    return [name for name in names if name in mesh.manual_axes and mesh.shape[name] > 1]


def axis_index(logical_axis: str) -> jax.Array | int:
    """Which shard of `logical_axis` this device holds; 0 where it is whole."""
    index = 0
    for name in _bound(logical_axis):
        index = index * jax.lax.axis_size(name) + jax.lax.axis_index(name)
    return index


def axis_size(logical_axis: str) -> int:
    """Into how many shards `logical_axis` is divided inside `per_device`."""
    return math.prod(jax.lax.axis_size(name) for name in _bound(logical_axis))


def gather(x: jax.Array, axis: int, logical_axis: str, *, pairs_first: bool = False) -> jax.Array:
    """`x` whole along `axis`, whose shards follow `logical_axis`; its cotangent is
    reduce-scattered.

    One mesh axis after the other, the minor first: a slice's torus has a ring for each, while a
    group over three torus dimensions has none and XLA would sum zero-padded copies. With
    `pairs_first` the devices of a mesh axis exchange what they have with their neighbours, two by
    two, and then gather among every other: for an axis laid over a line of two chips and a ring
    (`mesh.make`), over which together the compiler gathers nothing beside compute.
    """
    for name in reversed(_bound(logical_axis)):
        x = _gather(x, name, axis, pairs_first)
    return x


def scatter_sum(
    x: jax.Array, axis: int, logical_axis: str, *, pairs_first: bool = False
) -> jax.Array:
    """Sum of the devices' `x`, of which each keeps its shard of `axis`; cotangents are gathered, as
    `gather` does."""
    for name in _bound(logical_axis):
        x = _scatter(x, name, axis, pairs_first)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x, name, axis, pairs_first):
    devices = jax.lax.axis_size(name)
    if not pairs_first or devices % 2 or devices == 2:
        return jax.lax.all_gather(x, name, axis=axis, tiled=True)
    other = jax.lax.ppermute(x, name, [(device, device ^ 1) for device in range(devices)])
    is_first = jax.lax.axis_index(name) % 2 == 0
    pair = [jnp.concatenate(both, axis) for both in ((x, other), (other, x))]
    groups = [list(range(first, devices, 2)) for first in (0, 1)]
    x = jnp.where(is_first, *pair)
    return jax.lax.all_gather(x, name, axis=axis, tiled=True, axis_index_groups=groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _scatter(x, name, axis, pairs_first):
    """Where that costs no copy the shards lead in memory: from other layouts XLA may sum all of `x`
    on every device and then cut.

    Of two devices each sends the half that the other keeps; XLA would send all of both. The barrier
    keeps XLA from making one slice of a half and of the shard that an earlier axis left, without
    which it no longer knows that axis's sum for a scatter.
    """
    devices = jax.lax.axis_size(name)
    if devices > 2 and math.prod(x.shape[:axis]) > 1:
        return jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
    if devices > 2:
        kept = x.shape[:axis] + (x.shape[axis] // devices,) + x.shape[axis + 1 :]
        shards = x.reshape(devices, kept[axis], -1)
        shards = with_layout_constraint(shards, Layout((0, 1, 2)))
        return jax.lax.psum_scatter(shards, name).reshape(kept)
    x = jax.lax.optimization_barrier(x)
    size, index = x.shape[axis] // 2, jax.lax.axis_index(name)
    kept = jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)
    sent = jax.lax.dynamic_slice_in_dim(x, (1 - index) * size, size, axis)
    return kept + jax.lax.ppermute(sent, name, [(0, 1), (1, 0)])


_gather.defvjp(
    lambda x, *how: (_gather(x, *how), None),
    lambda name, axis, pairs_first, _, cotangent: (_scatter(cotangent, name, axis, pairs_first),),
)
_scatter.defvjp(
    lambda x, *how: (_scatter(x, *how), None),
    lambda name, axis, pairs_first, _, cotangent: (_gather(cotangent, name, axis, pairs_first),),
)


def own(x: jax.Array, axis: int, logical_axis: str) -> jax.Array:
    """This device's shard of `x`, which the devices along `logical_axis` all hold whole."""
    size = x.shape[axis] // axis_size(logical_axis)
    return jax.lax.dynamic_slice_in_dim(x, axis_index(logical_axis) * size, size, axis)


def exchange(x: jax.Array, *, cut: int, joined: int, mesh_axis: str) -> jax.Array:
    """`x` with `joined` whole, of which the devices along `mesh_axis` have a part each, and of
    `cut`, which all of them have whole, this device's part alone."""
    if mesh_axis not in jax.sharding.get_abstract_mesh().manual_axes:
        return x
    return jax.lax.all_to_all(x, mesh_axis, split_axis=cut, concat_axis=joined, tiled=True)


def whole(param: jax.Array, name: str, *, but: tuple[str, ...] = ()) -> jax.Array:
    """The parameter called `name` gathered from its shards, except along logical axes `but`.

    The layer axis is not one of `param`, nor of what is divided.
    """
    axes = [axis for axis in param_axes(name) if axis != "layers"]
    for dimension, axis in enumerate(axes):
        param = jnp.moveaxis(param, dimension, 0)
        if axis in WITHOUT_EMBED:
            param, axis = gather(param, 0, "embed"), WITHOUT_EMBED[axis]
        if axis not in but:
            param = gather(param, 0, axis)
        param = jnp.moveaxis(param, 0, dimension)
    return param


def total(x: jax.Array) -> jax.Array:
    """Sum of `x` over all devices inside `per_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.psum(x, tuple(mesh.manual_axes)) if mesh.manual_axes else x


def replicate(x: jax.Array) -> jax.Array:
    """`x` whole on every device of the ambient mesh, so that every process can read it."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def path_name(path) -> str:
    """A pytree path as 'model/norm/scale'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_axes(name: str, more: Table = ()) -> tuple[str, ...]:
    """Logical axes of the parameter `name`. Raises `ValueError` unless exactly one line of
    PARAM_AXES and `more` matches."""
    matches = [axes for pattern, axes in (*PARAM_AXES, *more) if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise ValueError(
            f"parameter {name!r} matches {len(matches)} lines of PARAM_AXES; expected exactly one"
        )
    return matches[0]


def param_specs(params):
    """The `PartitionSpec` of every parameter of a nested dict."""
    return jax.tree.map_with_path(lambda path, _: spec(*param_axes(path_name(path))), params)


def param_shardings(mesh: Mesh, params, more: Table = ()):
    """The `NamedSharding` of every parameter of a nested dict; `more` are lines for leaves that
    PARAM_AXES does not have."""

    def leaf(path, _):
        return NamedSharding(mesh, spec(*param_axes(path_name(path), more), mesh=mesh))

    return jax.tree.map_with_path(leaf, params)


def shards(logical_axis: str, mesh_sizes: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes that divide `logical_axis`, and into how many shards."""
    divides = rule(logical_axis, mesh_sizes)
    names = (divides,) if isinstance(divides, str) else divides or ()
    return names, math.prod(mesh_sizes[name] for name in names)


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
            names, divisor = shards(axis, mesh_sizes)
            if size % divisor:
                blocks = name.endswith("/absmax")  # which are not cut, of a quantised weight
                of_size = f"{size} blocks of 64" if blocks else f"size {size}"
                problems.setdefault(
                    (axis, size),
                    f"{axis} of {of_size} ({name}) cannot be divided over mesh axes "
                    f"{' x '.join(names)} = {divisor}; {what_divides(size, mesh_sizes)}",
                )

    jax.tree.map_with_path(check, abstract_params)
    return list(problems.values())
