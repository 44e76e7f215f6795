"""The meshes that divide a slice and a run, ranked by an estimate from shapes and links alone."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax
import numpy as np

from tulu_jax import preflight, validation
from tulu_jax.models.config import GATHERED, KERNEL, REMAT_POLICIES
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.planning import aot, cost
from tulu_jax.planning.topology import Topology
from tulu_jax.recipe import TrainConfig

SPARE = 0.05  # of HBM that a plan leaves
LONG = 512  # positions of a device between blocks that are worth two parts
POLICIES = [name for name, kept in REMAT_POLICIES.items() if kept is not None]


def candidates(config: TrainConfig, topology: Topology) -> Iterator[list[TrainConfig]]:
    """Every mesh and micro-batch that divides the slice and the run, each with what may be kept of
    a layer and of the optimizer: what costs least time first, a smaller moment last."""
    sizes = [n for n in range(1, topology.num_devices + 1) if topology.num_devices % n == 0]
    micros = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    for tensor, context in itertools.product(sizes, sizes):
        if topology.num_devices % (tensor * context):
            continue
        left = topology.num_devices // (tensor * context)
        if left % topology.slices:
            continue
        axes = (topology.slices, left // topology.slices, context, tensor)
        # Where a device holds many positions between blocks, two parts hide what `tensor` moves.
        parts = 2 if tensor > 1 and config.data.max_length >= LONG * context * tensor else 1
        named = dict(zip(mesh_lib.AXES, axes, strict=True), topology=topology.name)
        mesh = dataclasses.replace(config.mesh, **named, context_first=False, pairs_first=False)
        for micro in micros:
            found = [
                dataclasses.replace(
                    config,
                    mesh=mesh,
                    micro_batch_size=micro,
                    execution=dataclasses.replace(
                        config.execution, remat_policy=policy, row_parts=parts
                    ),
                    optimizer=dataclasses.replace(config.optimizer, mu_dtype=dtype),
                )
                for dtype, policy in itertools.product(("float32", "bfloat16"), POLICIES)
                if (KERNEL not in REMAT_POLICIES[policy] or mesh.fsdp * context > 1)
                and (GATHERED not in REMAT_POLICIES[policy] or tensor > 1)
            ]
            if list(preflight.mesh_problems(found[0], topology.num_devices)):
                continue
            yield found
            if _order(topology, axes, True) != _order(topology, axes, False):
                beside = dataclasses.replace(mesh, context_first=True)
                yield [dataclasses.replace(candidate, mesh=beside) for candidate in found]


def guess(config: TrainConfig, topology: Topology) -> tuple[float, float]:
    """Seconds of a step and bytes a device from shapes alone, to choose what is worth compiling.

    Products at 85 % of the peak; on the links that each mesh axis has, weights move once for each
    forward and backward of a micro-batch and their gradients once, activations over `tensor` for
    each product's input and output, keys and values over `context`; nothing hides.
    """
    model = config.model
    sizes = config.mesh.sizes(topology.num_devices)
    micro = config.micro_batch_size or config.batch_size
    pieces = config.batch_size // micro
    kept_names = REMAT_POLICIES[config.execution.remat_policy]
    full = not kept_names
    flops = model.flops_per_token(1024) * config.batch_size * config.data.max_length
    mlp = model.num_layers * model.embed_dim * model.mlp_dim / model.num_params  # of one product
    again = 1.0 if full else mlp * sum(name not in kept_names for name in ("gate", "up"))
    compute = cost.ideal_seconds(flops * (1 + again / 3), topology) / 0.85
    shards = sizes["fsdp"] * sizes["context"]
    seconds = _link_seconds(topology, tuple(sizes.values()), config.mesh.context_first)
    weights = 2 * model.num_params / sizes["tensor"]  # bytes, whole over fsdp x context
    scattered = weights * seconds["fsdp"] + weights / sizes["fsdp"] * seconds["context"]
    if sizes["fsdp"] > math.prod(sorted(topology.shape)[-2:]):
        scattered *= 1.5  # a group over three torus axes is slower, compiled, than its links are
    tokens = config.batch_size * config.data.max_length / (sizes["data"] * sizes["fsdp"])
    activations = 2 * tokens / sizes["context"] * model.embed_dim * model.num_layers
    moves = 11 if full else 8 if GATHERED in kept_names else 10
    activations *= moves * seconds["tensor"]
    width = 2 * model.num_kv_heads * model.head_dim / sizes["tensor"]
    keys = 2 * tokens * width * model.num_layers * 3 * seconds["context"]
    fetched = scattered / (1 if config.execution.gather_dtype is None else 2)
    moving = fetched * (1 if KERNEL in kept_names else 2) + scattered
    moving = moving * pieces + activations + keys
    rows_and_heads = (
        max(1, config.batch_size // (sizes["data"] * sizes["fsdp"])),
        model.num_heads // sizes["tensor"],
    )
    kernel = functools.partial(
        aot.attention_seconds,
        config,
        topology,
        aot.documents(config),
        rows_and_heads,
        config.data.max_length // sizes["context"],
    )
    attention = (1 + full) * (kernel(backward=False) or 0.0) + (kernel(backward=True) or 0.0)
    compute += model.num_layers * attention
    moments = {"float32": 4, "bfloat16": 2}[config.optimizer.mu_dtype]
    state = model.num_params * (4 + 4 + moments + 4) / (shards * sizes["tensor"])
    kept = _kept(config, sizes, micro)
    gathered = 3 * 2 * model.embed_dim * model.mlp_dim / sizes["tensor"] * 2
    heads = 8 * model.vocab_size * model.embed_dim
    frozen, trained = 0.0, 1
    if config.objective.reward_from is not None:  # PPO: a value model too, and two that are frozen
        frozen, trained = 2 * 4 * model.num_params / (shards * sizes["tensor"]), 2
    return trained * (compute + moving), trained * (state + kept) + frozen + gathered + heads


@functools.cache
def _made(
    topology: Topology, sizes: tuple[int, ...], context_first: bool, pairs_first: bool = False
) -> jax.sharding.Mesh:
    axes = dict(zip(mesh_lib.AXES, sizes, strict=True))
    config = mesh_lib.MeshConfig(**axes, context_first=context_first, pairs_first=pairs_first)
    return mesh_lib.make(config, topology.devices())


def _order(topology: Topology, *how) -> tuple[int, ...]:
    return tuple(device.id for device in _made(topology, *how).devices.flat)


@functools.cache
def _link_seconds(
    topology: Topology, shape: tuple[int, ...], context_first: bool
) -> dict[str, float]:
    """Seconds that each axis of a mesh needs to gather a byte, the largest of its groups."""
    places = aot.places(_made(topology, shape, context_first), topology)
    ids = np.arange(topology.num_devices).reshape(shape)
    size = 1e9
    found = {}
    for axis, name in enumerate(mesh_lib.AXES):
        groups = np.moveaxis(ids, axis, -1).reshape(-1, shape[axis])
        found[name] = max(
            cost.link_seconds("all-gather", size, group, places, topology)[0] / size
            for group in groups[:: max(1, len(groups) // 8)].tolist()
        )
    return found


def _kept(config: TrainConfig, sizes: dict[str, int], micro: int) -> float:
    model = config.model
    tokens = micro * config.data.max_length / (sizes["data"] * sizes["fsdp"] * sizes["context"])
    layer = 2 * tokens * model.embed_dim / sizes["tensor"]
    if kept := REMAT_POLICIES[config.execution.remat_policy]:
        products = sum(name in kept for name in ("gate", "up"))
        width = 2 * model.num_heads * model.head_dim + products * model.mlp_dim + model.embed_dim
        layer += 2 * tokens * width / sizes["tensor"]
        layer += 4 * tokens * model.num_kv_heads * model.head_dim / sizes["tensor"]
        if GATHERED in kept:  # before the attention and before the MLP
            layer += 2 * 2 * tokens * model.embed_dim
        if KERNEL in kept:  # as it was gathered
            layer += (
                2 * sum(math.prod(shape) for shape in model.projections.values()) / sizes["tensor"]
            )
    return layer * model.num_layers


def _executed(config: TrainConfig, **changes) -> TrainConfig:
    execution = dataclasses.replace(config.execution, **changes)
    return dataclasses.replace(config, execution=execution)


def _other_products(config: TrainConfig, topology: Topology) -> TrainConfig:
    """Products apart if they were not, and the other way round."""
    return _executed(config, products_apart=not config.execution.products_apart)


def _keeping(policy: str, config: TrainConfig, topology: Topology) -> TrainConfig | None:
    """Kept of a layer what `policy` says, if all products are kept: there it may be faster to keep
    what was gathered, or to gather it again."""
    sizes, kept = config.mesh.sizes(topology.num_devices), REMAT_POLICIES[policy]
    now = config.execution.remat_policy
    if now == policy or now not in KEEPING:
        return None
    alone = {KERNEL: sizes["fsdp"] * sizes["context"], GATHERED: sizes["tensor"]}
    if any(alone.get(name) == 1 for name in kept):
        return None
    return _executed(config, remat_policy=policy)


def _by_pairs(config: TrainConfig, topology: Topology) -> TrainConfig | None:
    """Rows in two parts, gathered between pairs first, where `tensor` lies over a line of two chips
    and more."""
    mesh = dataclasses.replace(config.mesh, pairs_first=True)
    sizes = tuple(mesh.sizes(topology.num_devices).values())
    positions = config.data.max_length // (sizes[-1] * sizes[-2])
    usual, paired = (
        _order(topology, sizes, mesh.context_first, pairs_first) for pairs_first in (False, True)
    )
    if config.mesh.pairs_first or usual == paired or positions % 2:
        return None
    return _executed(dataclasses.replace(config, mesh=mesh), row_parts=2)


KEEPING = ("save_projections", "save_gathered", "save_kernels", "save_all_gathered")
FORMS = (_other_products, _by_pairs, *(functools.partial(_keeping, name) for name in KEEPING))


def ranked(config: TrainConfig, topology: Topology) -> list[TrainConfig]:
    """Of each mesh and micro-batch what fits by estimate, the fastest first. Raises `UsageError` if
    nothing does."""
    found, room = [], topology.hardware.hbm * (1 - SPARE)
    for number, alike in enumerate(candidates(config, topology)):
        for candidate in alike:
            seconds, size = guess(candidate, topology)
            if size < room:
                found.append((seconds, number, candidate))
                break
    if not found:
        raise validation.UsageError(
            f"no mesh, micro-batch and rematerialisation fits {topology.name} by estimate; choose "
            "a larger slice"
        )
    return [candidate for _, _, candidate in sorted(found, key=lambda item: item[:2])]
