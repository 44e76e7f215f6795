"""Compiles the decoder's programs for a slice that is not there, and says what they would do.

The programs are those of `decode/programs.py`: `fill` computes a packed row of prompts,
`run_steps` makes tokens. Weights lie as `slices.resident` says. A step is priced as the compiled
loop body runs, for rows that hold the prompt and half of the new tokens, and compared with what HBM
alone would take to read the weights and the live cache once.
"""

import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax import step as step_lib
from tulu_jax.decode import decoder, programs
from tulu_jax.kernels import decode_attention
from tulu_jax.models import llama, paged_attention, streamed_layers
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding, slices
from tulu_jax.planning import aot, cost, decoding_faults, hlo
from tulu_jax.planning.cycles import decode_cycles, product_cycles
from tulu_jax.planning.decoding_times import STEPS, Asked, Decoding
from tulu_jax.planning.topology import Topology
from tulu_jax.recipe import TrainConfig

SPARE = 0.1  # of HBM that is left beside weights and cache for temporaries
MOST_ROWS = 256  # at once


def mesh_of(config: TrainConfig, topology: Topology) -> mesh_lib.MeshConfig:
    """The mesh that decodes on `topology`. Raises `UsageError` where it divides nothing."""
    return slices.resident(topology.num_devices, config.axis_sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """`run_steps` for `rows` rows of pages in a table of `table`, and `fill` for a packed row of
    `length` positions in each of `parts` parts, compiled for a slice."""

    config: TrainConfig
    topology: Topology
    mesh: jax.sharding.Mesh
    parts: int
    page: int
    rows: int
    table: int
    length: int
    weights: Any
    cache: Any
    stepped: dict[str, Any]
    filled: dict[str, Any]
    compile_seconds: float

    @functools.cached_property
    def modules(self) -> tuple[hlo.Module, hlo.Module]:
        """Both programs, parsed."""
        return hlo.parse(self.stepped["hlo"]), hlo.parse(self.filled["hlo"])

    def price(self, asked: Asked) -> Decoding:
        """What `asked` takes of these programs; it is no longer than what they were made for."""
        config, topology, mesh, rows = self.config, self.topology, self.mesh, self.rows
        used = min(rows, asked.rows)
        estimate = functools.partial(
            _estimated, topology=topology, mesh=mesh, prefetches=True, shorter=True
        )
        kernels = functools.partial(
            _step_kernel, config=config, topology=topology, mesh=mesh, page=self.page,
            rows=rows, used=used, live=math.ceil(asked.live),
        )  # fmt: skip
        step_module, fill_module = self.modules
        step, least, most = (
            scaled(estimate(step_module, kernels, believed=believed), 1 / STEPS)
            for believed in ("products", "none", "all")
        )
        in_row = _prompts_of_a_row(asked, self.parts, self.page, self.length)
        embedding = self.weights["model"]["embed_tokens"]
        # Of the embedding a step reads a row for each token.
        read = _total(self.weights) - (0 if config.model.tie_embeddings else _total(embedding))
        read += used * asked.live * _position_bytes(config)
        return Decoding(
            topology=topology,
            model=config.model,
            asked=asked,
            mesh=dict(mesh.shape),
            rows=rows,
            per_fill=min(self.parts * in_row, asked.prompts),
            weights=aot.bytes_per_device(self.weights),
            cache=aot.bytes_per_device(self.cache),
            temporaries=max(self.stepped["temporaries"], self.filled["temporaries"]),
            code=self.stepped["code"] + self.filled["code"],
            step=step,
            least=least.seconds,
            most=most.seconds,
            limit=read / topology.num_devices / topology.hardware.bandwidth,
            fill=estimate(
                fill_module,
                functools.partial(
                    _prompt_seconds,
                    config=config,
                    topology=topology,
                    length=self.length,
                    prompts=in_row,
                    prompt_length=asked.prompt_length - 1,
                ),
            ),
            relaid=decoding_faults.relaid(step_module, self.weights, self.cache),
            faults=decoding_faults.faults(step_module, dict(mesh.shape), self.weights, self.cache),
            compile_seconds=self.compile_seconds,
            texts={"decode": self.stepped["hlo"], "prefill": self.filled["hlo"]},
        )


def compiled(
    config: TrainConfig, topology: Topology, asked: Asked, *, slots: int | None = None
) -> Programs:
    """The decoder's programs for `topology` and requests as long as `asked`: those of a `Decoder`
    with so many `slots` and with the cache that a call of its own makes; None: for as many rows as
    there is room for.

    Raises `aot.DoesNotFit` where the compiler finds no room, and `UsageError` for a slice that does
    not divide the model.
    """
    devices = topology.devices()
    mesh = mesh_lib.make(mesh_of(config, topology), devices)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        page = paged_attention.page_for(config.model, tensor=mesh.shape["tensor"])
        own = decoder.Decoder(config.model, config.execution, page=page)
        weights, parts = _weights(config, mesh), own.parts
        table = -(-asked.length // page)
        page_bytes = _page_bytes(config, mesh, page)
        held = aot.bytes_per_device(weights)
        if slots is None:
            each = _rows(-(-asked.rows // parts), held, table * page_bytes, topology)
            pages = parts * (each * table + 1)
        else:
            most, needs = max(1, slots // parts), -(-(asked.length - 1) // page)
            pages = parts * programs.rounded(min(most, asked.rows) * needs + most + 1)
            each = max(programs.FEWEST_ROWS, min(most, -(-asked.rows // parts)))
        rows = parts * each
        shape = (config.model.num_layers, pages, config.model.num_kv_heads, page)
        cached = jax.ShapeDtypeStruct(
            (*shape, config.model.head_dim),
            config.execution.compute_dtype,
            sharding=jax.NamedSharding(mesh, sharding.spec(*paged_attention.AXES)),
        )
        cache = {"k": cached, "v": cached}
        make = functools.partial(_compiled, topology, mesh)
        stepped = make(_step_program(config, weights, cache, rows, table))
        in_row = _prompts_of_a_row(asked, parts, page, own.row_length)
        length = own.bucket(in_row * _pages_of_a_prompt(asked, page) * page)
        filled = make(_fill_program(config, weights, cache, (parts, length), page))
    return Programs(
        config=config,
        topology=topology,
        mesh=mesh,
        parts=parts,
        page=page,
        rows=rows,
        table=table,
        length=length,
        weights=weights,
        cache=cache,
        stepped=stepped,
        filled=filled,
        compile_seconds=time.perf_counter() - start,
    )


def _pages_of_a_prompt(asked: Asked, page: int) -> int:
    """Without its last token, which is a step's."""
    return max(1, -(-(asked.prompt_length - 1) // page))


def _prompts_of_a_row(asked: Asked, parts: int, page: int, length: int) -> int:
    """How many prompts go into a packed row of `length`; each part has one such row."""
    return max(
        1, min(-(-asked.prompts // parts), length // (_pages_of_a_prompt(asked, page) * page))
    )


def price(config: TrainConfig, topology: Topology, asked: Asked) -> Decoding:
    """The decoder's programs for `topology`, compiled for `asked` and priced. Raises what
    `compiled` does."""
    return compiled(config, topology, asked).price(asked)


def _weights(config: TrainConfig, mesh) -> dict[str, Any]:
    """Abstract parameters as a decoder has them, placed; with adapters those too."""
    params = step_lib.abstract_base(config)
    if config.adapter is not None:
        trains, frozen = step_lib.abstract_split(config)
        params = llama.own(frozen.whole(llama.own(trains)))
    params = jax.eval_shape(
        functools.partial(programs.in_compute_dtype, execution=config.execution), params
    )
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        params,
        sharding.param_shardings(mesh, params),
    )


def _position_bytes(config: TrainConfig) -> int:
    """Of the cache of one position, all layers and heads."""
    model = config.model
    size = jnp.dtype(config.execution.compute_dtype).itemsize
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * size


def _page_bytes(config: TrainConfig, mesh, page: int) -> int:
    """Of a page on a device."""
    return page * _position_bytes(config) // sharding.shards("kv_heads", dict(mesh.shape))[1]


def _rows(prompts: int, weights: int, row: int, topology: Topology) -> int:
    """How many of a part's prompts are decoded at once: all, or as many as there is room for."""
    room = topology.hardware.hbm * (1 - SPARE) - weights
    most = max(programs.FEWEST_ROWS, min(MOST_ROWS, int(room // row)))
    if prompts <= most:
        return max(programs.FEWEST_ROWS, prompts)
    return 1 << (most.bit_length() - 1)


def _total(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _step_program(config, weights, cache, rows: int, table: int):
    ints = ("token", "position", "left", "count", "min_new_tokens", "top_k")
    of_rows = {name: np.zeros(rows, np.int32) for name in ints}
    of_rows |= {name: np.ones(rows, np.float32) for name in ("temperature", "top_p")}
    of_rows["keys"] = np.zeros((rows, 2), np.uint32)
    of_rows["stop_ids"] = np.zeros((rows, 1), np.int32)
    of_rows["table"] = np.zeros((rows, table), np.int32)
    return programs.run_steps.trace(
        weights, cache, of_rows, np.int32(rows - 1), config=config.model,
        execution=config.execution, steps=STEPS, attend=paged_attention.attend,
        key_impl="threefry2x32",
    )  # fmt: skip


def _fill_program(config, weights, cache, shape: tuple[int, int], page: int):
    names = ("tokens", "segment_ids", "positions")
    packed = {name: np.zeros(shape, np.int32) for name in names}
    taken, places = np.zeros((2, math.prod(shape) // page), np.int32)
    return programs.fill.trace(
        weights, cache, packed, taken, places, None, config=config.model,
        execution=config.execution, page=page,
    )  # fmt: skip


def _compiled(topology: Topology, mesh, traced) -> dict[str, Any]:
    lowered = traced.lower(lowering_platforms=("tpu",))
    return aot.compiled_for(lowered, topology, mesh, {})


def _estimated(module, attention, *, topology, mesh, **ways) -> cost.Cost:
    return cost.Estimator(
        module,
        topology,
        aot.places(mesh, topology),
        cost.mesh_axes(dict(mesh.shape)),
        kernel_seconds=attention,
        dynamic_trips=1.0,
        **ways,
    ).estimate()


def scaled(of: cost.Cost, by: float) -> cost.Cost:
    """`by` times a cost."""
    times = {
        name: getattr(of, name) * by
        for name in ("matrix", "attention", "memory", "interconnect", "hidden")
    }
    wire = {key: size * by for key, size in of.wire.items()}
    top = [(seconds * by, runs * by, name, kind) for seconds, runs, name, kind in of.top]
    return cost.Cost(**times, wire=wire, top=top, unknown=of.unknown)


def _step_kernel(name, text, *, config, topology, mesh, rows, used, page, live):
    """What a call of a step's kernel takes of all `rows`, of which `used` see `live` positions
    each; None for another kernel, or where nobody counted."""
    del text
    model = config.model
    ways = {axis: sharding.shards(axis, mesh.shape)[1] for axis in ("heads", "kv_heads", "rows")}
    kv_heads = model.num_kv_heads // ways["kv_heads"]
    if name.startswith(decode_attention.NAME):
        shape = decode_cycles.Shape(
            rows=rows // ways["rows"],
            heads=model.num_heads // ways["kv_heads"],
            kv_heads=kv_heads,
            page=page,
            table=-(-live // page),
        )
        call = decode_cycles.call(topology.chip, shape, used=-(-used // ways["rows"]), seen=live)
    elif name.startswith(streamed_layers.NAME):
        kind = name.removeprefix(streamed_layers.NAME).split(".")[0]
        shape = product_cycles.Shape(
            rows=rows,
            embed=model.embed_dim,
            heads=model.num_heads // ways["heads"],
            kv_heads=kv_heads,
            mlp=model.mlp_dim // ways["heads"],
        )
        call = product_cycles.call(topology.chip, kind, shape)
    else:
        return None
    return call and (call.kind, call.seconds)


def _prompt_seconds(name, text, *, config, topology, length, prompts, prompt_length):
    """Of the attention kernel of training over the prompts of a row; None for another one."""
    found = re.search(r"\b(?:bf16|f32)\[(\d+),(\d+),(\d+),\d+\]", text)
    chip = topology.hardware
    if not name.startswith("flash_") or not found or chip.attention is None:
        return None
    B, N, T = map(int, found.groups())
    block = min(aot.ATTENTION_BLOCK, T)
    blocks = -(-prompt_length // block)
    pairs = min(prompts * blocks * (blocks + 1) / 2, (length // block) ** 2)
    pairs = max(1.0, pairs * T / length)
    scale = (block / aot.ATTENTION_BLOCK) ** 2 * max(1.0, config.model.head_dim / 128)
    return "attention", B * N * pairs * chip.attention[0] * scale / chip.cores / chip.clock
