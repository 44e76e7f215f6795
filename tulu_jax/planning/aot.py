"""Compiles the train step of a config for a slice that is not there, and says what it would do."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax import step as step_lib
from tulu_jax.kernels import nf4_tiles
from tulu_jax.models.config import KEEP_NOTHING, KERNEL, REMAT_POLICIES, SCORE
from tulu_jax.parallel import balance, compiler, sharding
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.planning import calibration, compiled, cost, hlo, rows
from tulu_jax.planning.topology import Topology
from tulu_jax.recipe import TrainConfig
from tulu_jax.training.state import VALUE

PAIRS_PER_ROW = 256  # the shape depends on the shortest pair of the data, the time does not
ATTENTION_BLOCK = 512
LARGEST_SUM = 8e6  # bytes that a step may all-reduce at once: a network's norms' and scalars


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes a device, by kind. `params` train, `frozen` ones do not. `kept` is what the forward
    pass keeps for the backward pass, part of `temporaries`, and `gradients` likewise."""

    params: int
    frozen: int
    moments: int
    gradients: int
    kept: int
    temporaries: int
    code: int
    peak: int
    hbm: int

    @property
    def spare(self) -> float:
        """The part of HBM that is left at the peak."""
        return 1 - self.peak / self.hbm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One compiled train step: memory, cost, FLOPs of all devices, and the seconds it took to
    compile. Of attention `model_flops` count the pairs of positions that are visible in the rows,
    and `whole_flops` all pairs of a row. `positions` and `examples` are those of an update;
    `faults` are what a divided step should not have."""

    topology: Topology
    mesh: dict[str, int]
    memory: Memory
    cost: cost.Cost
    model_flops: float
    whole_flops: float
    executed_flops: float
    positions: int
    examples: float
    compile_seconds: float
    faults: list[str]
    text: str

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the slice could do in the predicted time, by visible attention."""
        return cost.ideal_seconds(self.model_flops, self.topology) / self.cost.seconds

    @property
    def whole_mfu(self) -> float:
        """The same, by attention counted whole, as many publish it."""
        return cost.ideal_seconds(self.whole_flops, self.topology) / self.cost.seconds

    @property
    def tokens_per_second(self) -> float:
        """Positions of the rows a second, padding among them."""
        return self.positions / self.cost.seconds

    @property
    def band(self) -> calibration.Band:
        """How far the predicted time may be off."""
        return calibration.band(self.cost)


class DoesNotFit(ValueError):
    """The compiler ran out of HBM; the message has its words."""


def documents(config: TrainConfig) -> rows.Documents:
    """What the rows of this run hold: one example each, packed pairs or packed conversations."""
    if config.data.packing == "none":
        return rows.WHOLE
    return rows.OF_KIND[config.objective.kind]


def compile_step(
    config: TrainConfig,
    topology: Topology,
    *,
    num_steps: int,
    held: rows.Documents | None = None,
) -> Step:
    """The step that `train` would run, compiled for `topology` and priced for rows that hold
    documents `held` (default: those of the recipe).

    Raises `DoesNotFit` where the compiler finds no room, and `ValueError` for a mesh that does not
    fill the slice.
    """
    held = documents(config) if held is None else held
    devices = topology.devices()
    mesh = mesh_lib.make(config.mesh, devices)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        state, frozen = step_lib.abstract_state(config, mesh)
        batch = step_lib.abstract_batch(config, mesh, places=PAIRS_PER_ROW)
        traced = jax.jit(
            step_lib.make_train_step(config, num_steps),
            donate_argnums=0,
        ).trace(state, frozen, batch)
        executed = flops(traced.jaxpr.jaxpr)
        lowered = traced.lower(lowering_platforms=("tpu",))
        made = compiled_for(lowered, topology, mesh, compiler.options(devices[0].device_kind))
    seconds = time.perf_counter() - start
    text = made["hlo"]
    module = hlo.parse(text)
    row_count = math.prod(batch["tokens"].shape[:-1])
    networks = [config.model]
    if VALUE in state.params:
        networks.append(config.model.with_head(SCORE))
    length = config.data.max_length
    attention, whole = (
        len(networks) * _attention_flops(config, row_count * squares)
        for squares in (held.visible(length), 2.0 * length**2)
    )
    products = sum(network.flops_per_token(0) for network in networks) * row_count * length
    # Products of a pair of blocks: 2 forward and 5 backward where 6 are the model's.
    again = 2 if config.execution.remat_policy == KEEP_NOTHING else 0
    examples = config.batch_size * held.examples(length)
    return Step(
        topology=topology,
        mesh=dict(mesh.shape),
        memory=_memory(config, state, frozen, module, made, topology),
        cost=estimated(module, config, topology, mesh, held),
        model_flops=products + attention,
        whole_flops=products + whole,
        executed_flops=executed + attention * (7 + again) / 6,
        positions=math.prod(batch["tokens"].shape),
        examples=examples,
        compile_seconds=seconds,
        faults=faults(
            module,
            dict(mesh.shape),
            _divided(config, mesh, state, frozen),
            networks=len(networks),
        ),
        text=text,
    )


def estimated(
    module: hlo.Module,
    config: TrainConfig,
    topology: Topology,
    mesh: jax.sharding.Mesh,
    held: rows.Documents,
) -> cost.Cost:
    """What one run of a program over rows of `config` costs that hold documents `held`."""
    return cost.Estimator(
        module,
        topology,
        places(mesh, topology),
        cost.mesh_axes(dict(mesh.shape)),
        kernel_seconds=lambda name, text: _kernel_seconds(name, text, config, topology, held),
        dynamic_trips=_key_blocks(config.data.max_length, held),
    ).estimate()


def compiled_for(
    lowered, topology: Topology, mesh: jax.sharding.Mesh, options: dict[str, str]
) -> dict[str, Any]:
    """What `_make` gives of a lowered program, or gave of it before. Raises `DoesNotFit` where the
    compiler finds no room."""
    place = f"{topology.name} {topology.hardware.options} {list(mesh.devices.flat)}"
    make = functools.partial(_make, lowered, options)
    try:
        return compiled.kept(make, lowered, place=place, options=options)
    except Exception as error:  # jax has no type for it
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_out_of_memory(str(error))) from error


def _make(lowered, options: dict[str, str]) -> dict[str, Any]:
    """Compiles; the optimized program, and bytes a device."""
    program = lowered.compile(options)
    analysis = program.memory_analysis()
    return {
        "hlo": program.as_text(),
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }


def _divided(config: TrainConfig, mesh, state, frozen) -> dict[str, tuple[int, ...]]:
    """Whole shapes of arrays of which no device should hold more than its part: stacked parameters
    and the residual; but for those that a device's part of another array has, as codes of a weight
    may have that of an adapter, and o_proj's kept as it was gathered that of k_proj."""
    whole = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        if len(leaf.shape) > 2 and leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    }
    rows = config.micro_batch_size or config.batch_size
    residual = (rows, config.data.max_length, config.model.embed_dim)
    spec = jax.NamedSharding(mesh, sharding.spec("batch", "positions", None))
    if rows > 1 and spec.shard_shape(residual) != residual:
        whole["residual"] = residual
    parts = {
        leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves((state.params, frozen))
    }
    if KERNEL in (REMAT_POLICIES[config.execution.remat_policy] or ()):
        parts |= set(_gathered(state.params))
    return {name: shape for name, shape in whole.items() if shape not in parts}


def _gathered(params) -> Iterator[tuple[int, ...]]:
    """Shapes of a device's part of stacked weights when they were gathered, the axis along which
    they were in front."""
    for leaf in jax.tree.leaves(params):
        by_gathers = sharding.rule("embed", leaf.sharding.mesh.axis_names)
        for axis, divides in enumerate(leaf.sharding.spec):
            if axis and divides == by_gathers:
                layers, *part = leaf.sharding.shard_shape(leaf.shape)
                del part[axis - 1]
                yield (layers, leaf.shape[axis], *part)


def faults(
    module: hlo.Module,
    mesh: dict[str, int],
    divided: dict[str, tuple[int, ...]],
    *,
    networks: int = 1,
) -> list[str]:
    """Large sums over devices that are not scattered, and whole copies of `divided` arrays.

    Gradients are summed whole only over `data`, which does not divide what they belong to, but
    for norms', of which a step trains those of `networks` and XLA sums all in one operation.
    """
    axes, found = cost.mesh_axes(mesh), []
    for i in (i for body in module.computations.values() for i in body):
        size = sum(hlo.shape_bytes(i.shape))
        if i.collective == "all-reduce" and size > networks * LARGEST_SUM:
            over = axes(hlo.group(i, math.prod(mesh.values())))
            if over != "data":
                found.append(f"{i.name} sums {size / 1e6:,.0f} MB whole over {over}")
        for name, shape in divided.items():
            if f"[{','.join(map(str, shape))}]" in i.shape:
                found.append(f"{i.name} holds {name} {list(shape)} whole")
    return list(dict.fromkeys(found))


def _key_blocks(length: int, held: rows.Documents) -> float:
    """Mean number of key blocks that a query block of the blockwise form sees."""
    block = min(ATTENTION_BLOCK, length)
    return held.pairs(length, block=block, shards=1) / (length // block)


def places(mesh: jax.sharding.Mesh, topology: Topology) -> np.ndarray:
    """int [devices, 1 + torus axes]: slice and coordinates of each position of the mesh."""
    axes = len(topology.shape)
    return np.array(
        [[getattr(d, "slice_index", 0) or 0, *d.coords[:axes]] for d in mesh.devices.flat]
    )


def _attention_flops(config: TrainConfig, squares: float) -> float:
    """Model FLOPs of attention in an update: 6·L·N·H times the sum of squared lengths, which is
    twice the pairs of positions that count."""
    model = config.model
    return 6.0 * model.num_layers * model.num_heads * model.head_dim * squares


def _kernel_seconds(
    name: str, text: str, config: TrainConfig, topology: Topology, held: rows.Documents
) -> tuple[str, float] | None:
    """What the kernel `name` of a compiled step is and how long it takes; None for another one."""
    if name.startswith("nf4_"):
        kind, seconds = "matrix", product_seconds(name, text, topology)
    else:
        found = re.search(r"\b(?:bf16|f32)\[(\d+),(\d+),(\d+),\d+\]", text)
        if not name.startswith("flash_") or not found:
            return None
        B, N, T = map(int, found.groups())
        kind, backward = "attention", "backward" in name
        seconds = attention_seconds(config, topology, held, (B, N), T, backward=backward)
    return None if seconds is None else (kind, seconds)


def product_seconds(name: str, text: str, topology: Topology) -> float | None:
    """Seconds of the product with NF4 weights of this name and text, from the shapes of x [M, C]
    and of codes [K/8, N]."""
    found = re.search(r"constraints=\{bf16\[(\d+),(\d+)\]\S* s32\[(\d+),(\d+)\]", text)
    if not found:
        return None
    M, C, words, N = map(int, found.groups())
    out = 8 * words if "backward" in name else N
    return nf4_tiles.seconds(topology.chip, rows=M, contracted=C, out=out)


def attention_seconds(
    config: TrainConfig,
    topology: Topology,
    held: rows.Documents,
    shape: tuple[int, int],
    queries: int,
    *,
    backward: bool,
) -> float | None:
    """Seconds of one call of the attention kernel on the device with the most pairs of blocks.

    `shape` is the rows and heads of a device and `queries` its part of a row; None where the kernel
    was not counted for the chip.
    """
    chip = topology.hardware
    if chip.attention is None:
        return None
    length, block = config.data.max_length, min(ATTENTION_BLOCK, queries)
    shards = max(1, length // queries)
    balanced = bool(config.execution.balanced) and balance.divides(length, shards)
    block = math.gcd(queries // 2, block) if balanced else block
    pairs = held.pairs(length, block=block, shards=shards, balanced=balanced)
    scale = (block / ATTENTION_BLOCK) ** 2 * max(1.0, config.model.head_dim / 128)
    return math.prod(shape) * pairs * chip.attention[backward] * scale / chip.cores / chip.clock


def flops(jaxpr) -> float:
    """FLOPs of the matrix products of a jaxpr on all devices, loops unrolled; of kernels only those
    with NF4 weights, and of a conditional the cheapest branch (the others guard)."""
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [
            getattr(value, "jaxpr", value)
            for parameter in equation.params.values()
            for value in (parameter if isinstance(parameter, (tuple, list)) else (parameter,))
            if hasattr(getattr(value, "jaxpr", value), "eqns")
        ]
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
        elif name == "scan":
            total += equation.params["length"] * flops(inner[0])
        elif name == "cond":
            total += min(map(flops, inner))
        elif name == "shard_map":
            total += equation.params["mesh"].size * flops(inner[0])
        elif name == "pallas_call":
            if equation.params["name"].startswith("nf4_"):
                x, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
                total += 2.0 * math.prod(x) * out[-1]
        else:
            total += sum(map(flops, inner))
    return total


def bytes_per_device(tree) -> int:
    """Bytes of one device's shards of abstract arrays that are placed."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _memory(config, state, frozen, module, made: dict[str, Any], topology: Topology) -> Memory:
    params = bytes_per_device(state.params)
    layers = config.model.num_layers
    dtypes = config.param_dtype if config.micro_batches == 1 else "float32"
    gradients = params * jnp.dtype(dtypes).itemsize // jnp.dtype(config.param_dtype).itemsize
    return Memory(
        params=params,
        frozen=bytes_per_device(frozen),
        moments=bytes_per_device(state.opt_state),
        gradients=gradients,
        kept=_kept(module, layers, state.params),
        temporaries=made["temporaries"],
        code=made["code"],
        peak=made["arguments"] + made["temporaries"] + made["code"],
        hbm=topology.hardware.hbm,
    )


def _kept(module: hlo.Module, layers: int, params) -> int:
    """Bytes of what loops carry with a leading axis of `layers` that is no shard of a parameter."""
    shards = {
        ",".join(map(str, leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(params)
    }
    largest = 0.0
    for body in module.computations.values():
        for i in body:
            if i.operation != "while":
                continue
            arrays = re.findall(r"([a-z]+\d+)\[((\d+),[\d,]+)\]", i.shape)
            size = sum(
                sum(hlo.shape_bytes(f"{kind}[{dims}]"))
                for kind, dims, leading in arrays
                if int(leading) == layers and dims not in shards
            )
            largest = max(largest, size)
    return int(largest)


def _out_of_memory(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    wanted = [line for line in lines if "Used" in line or "exceeded" in line.lower()]
    return " ".join(wanted[:2] or lines[:2])[:600]
