"""What a compiled step of a decoder should not have: copies, whole weights, large transfers."""

import math
import re

import jax

from tulu_jax.parallel import sharding
from tulu_jax.planning import aot, cost, hlo


def faults(module: hlo.Module, mesh: dict[str, int], weights, cache) -> list[str]:
    """What a step should not have: transfers of more than `aot.LARGEST_SUM` bytes, whole copies of
    weights that are divided, and copies of a device's cache or of its weights. Before the first
    step weights may be laid out otherwise (`relaid`)."""
    found, axes, whole = [], cost.mesh_axes(mesh), _whole(weights)
    own = _own(weights) | _own(cache)
    whole = {dims: name for dims, name in whole.items() if dims not in own}  # as another's shard
    for computation, body in module.computations.items():
        for i in body:
            size, dims = sum(hlo.shape_bytes(i.shape)), _first_dims(i)
            if i.collective and size > aot.LARGEST_SUM:
                over = axes(hlo.group(i, math.prod(mesh.values())))
                found.append(f"{i.name} moves {size / 1e6:,.0f} MB over {over}")
            if dims in whole and i.operation not in ("parameter", "get-tuple-element", "bitcast"):
                found.append(f"{i.name} holds {whole[dims]} [{dims}] whole")
            once = computation == module.entry and dims not in _own(cache)
            if dims in own and _copied(i) and not once:
                found.append(f"{i.name} copies {own[dims]} [{dims}]")
    return list(dict.fromkeys(found))


def relaid(module: hlo.Module, weights, cache) -> int:
    """Bytes of weights of a device that are copied before the first step."""
    own = _own(weights).keys() - _own(cache).keys()
    return int(sum(
        sum(hlo.shape_bytes(i.shape, hbm=True))
        for i in module.computations[module.entry]
        if _copied(i) and _first_dims(i) in own
    ))  # fmt: skip


def _copied(i: hlo.Instruction) -> bool:
    """Whether `i` copies within HBM; to VMEM is how what is read gets there."""
    to_vmem = re.match(r"\(*\w+\[[\d,]*\]\{[^}]*S\(1\)", i.shape)
    return i.operation in ("copy", "copy-start", "transpose") and not to_vmem


def _whole(weights) -> dict[str, str]:
    """Shapes that no device should hold: of divided weights, all layers or one."""
    found = {}
    for name, leaf, shard in _matrices(weights):
        if shard != leaf.shape:
            for shape in _of_layers(leaf.shape):
                found[_dims(shape)] = name
    return found


def _own(tree) -> dict[str, str]:
    """Shapes of a device's shards, of all layers or one."""
    return {_dims(shape): name for name, _, shard in _matrices(tree) for shape in _of_layers(shard)}


def _matrices(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if len(leaf.shape) > 1 and path[-1].key != "scale":
            yield sharding.path_name(path), leaf, leaf.sharding.shard_shape(leaf.shape)


def _of_layers(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """`shape`, and of what is stacked over layers that of one."""
    return [shape, (1, *shape[1:]), shape[1:]] if len(shape) > 2 else [shape]


def _first_dims(i: hlo.Instruction) -> str:
    """The dimensions of the first array that an instruction gives."""
    found = re.match(r"\(*\w+\[([\d,]+)\]", i.shape)
    return found[1] if found else ""


def _dims(shape) -> str:
    return ",".join(map(str, shape))
