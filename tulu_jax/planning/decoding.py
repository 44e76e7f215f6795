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

from tulu_jax import chips
from tulu_jax import step as step_lib
from tulu_jax.decode import call, decoder, programs
from tulu_jax.kernels import decode_attention
from tulu_jax.models import llama, paged_attention
from tulu_jax.models.config import SCORE, LlamaConfig
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding, slices
from tulu_jax.planning import aot, calibration, cost, hlo
from tulu_jax.planning.cycles import decode_cycles
from tulu_jax.planning.topology import Topology
from tulu_jax.recipe import TrainConfig

STEPS = 16  # of a program, as the decoder has them
SPARE = 0.1  # of HBM that is left beside weights and cache for temporaries
MOST_ROWS = 256  # at once
START = 2e-6  # seconds in which the first pages of a call of the attention kernel come


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """`prompts` of `prompt_length` ids each, and `samples` of `new_tokens` after every one; no new
    tokens, where prompts are scored."""

    prompts: int
    prompt_length: int
    new_tokens: int
    samples: int = 1

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    @property
    def length(self) -> int:
        return self.prompt_length + self.new_tokens

    @property
    def live(self) -> float:
        """Positions that a row has in the middle of its answer."""
        return self.prompt_length + self.new_tokens / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """`rows` are decoded at once, `per_fill` prompts computed at once. Bytes are those of a device,
    `temporaries` of the larger program, `relaid` those of weights that a program of `STEPS` steps
    copies to another layout before the first. `step` is a step of it with its part of that, `fill`
    one run. `least` and `most` are the seconds of a step by traffic alone, and where no operation
    is shorter than the compiler's own estimate of it; `limit` is what HBM takes to read weights and
    live cache once, over the whole slice."""

    topology: Topology
    model: LlamaConfig
    asked: Asked
    mesh: dict[str, int]
    rows: int
    per_fill: int
    weights: int
    cache: int
    temporaries: int
    code: int
    relaid: int
    step: cost.Cost
    least: float
    most: float
    limit: float
    fill: cost.Cost
    faults: list[str]
    compile_seconds: float
    texts: dict[str, str]

    @property
    def fits(self) -> bool:
        return self.peak <= self.topology.hardware.hbm

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.temporaries + self.code

    @property
    def ratio(self) -> float:
        """A step over the limit of HBM."""
        return self.step.seconds / self.limit

    @property
    def fills(self) -> int:
        """Runs of the program that computes prompts, for all of them."""
        return math.ceil(self.asked.prompts / self.per_fill)

    @property
    def steps(self) -> int:
        """Steps for all tokens."""
        return math.ceil(self.asked.rows / self.rows) * self.asked.new_tokens

    @property
    def seconds(self) -> float:
        """All prompts and all their tokens; the host's visits are not in it."""
        return self.fills * self.fill.seconds + self.steps * self.step.seconds

    @property
    def step_between(self) -> tuple[float, float]:
        """The least and the most seconds of a step: by the readings that `least` and `most` are and
        by the calibration, which has no decoder in it."""
        low, high = calibration.band(self.step).of(self.step.seconds)
        return min(low, self.least), max(high, self.most)

    @property
    def fill_between(self) -> tuple[float, float]:
        """The least and the most seconds of a fill, by the calibration."""
        return calibration.band(self.fill).of(self.fill.seconds)

    @property
    def between(self) -> tuple[float, float]:
        """The least and the most seconds of all prompts and all tokens."""
        low, high = (
            self.fills * fill + self.steps * step
            for fill, step in zip(self.fill_between, self.step_between, strict=True)
        )
        return low, high

    @property
    def mfu(self) -> float:
        """Of steps while all rows are in use. A query sees all that is live, so that attention
        counted whole is the same."""
        seen = 2 * self.asked.prompt_length + self.asked.new_tokens  # twice what is live
        flops = self.model.flops_per_token(seen) / 3
        return cost.ideal_seconds(flops * self.decoded, self.topology)

    def prefill_mfu(self, *, whole: bool) -> float:
        """Of prompts, which have no output projection, by visible attention or counted `whole`."""
        length = (1 + whole) * (self.asked.prompt_length - 1)
        flops = self.model.with_head(SCORE).flops_per_token(length) / 3
        return cost.ideal_seconds(flops * self.prefilled, self.topology)

    @property
    def decoded(self) -> float:
        """New tokens a second while all rows are in use."""
        return min(self.rows, self.asked.rows) / self.step.seconds

    @property
    def prefilled(self) -> float:
        """Prompt tokens a second."""
        return self.per_fill * (self.asked.prompt_length - 1) / self.fill.seconds

    def as_dict(self) -> dict[str, Any]:
        """JSON: everything that the table shows, in bytes and seconds."""
        hbm = self.topology.hardware.hbm
        return {
            "topology": self.topology.name,
            "chips": self.topology.num_chips,
            **dataclasses.asdict(self.asked),
            "mesh": self.mesh,
            "fits": self.fits,
            "rows": self.rows,
            "bytes": {
                "weights": self.weights,
                "cache": self.cache,
                "temporaries": self.temporaries,
                "code": self.code,
                "peak": self.peak,
                "hbm": hbm,
            },
            "spare": 1 - self.peak / hbm,
            "step": _parts(self.step),
            "step_by_traffic": self.least,
            "step_by_compiler": self.most,
            "relaid_bytes": self.relaid,
            "hbm_limit": self.limit,
            "over_hbm_limit": self.ratio,
            "fill": _parts(self.fill),
            "decode_tokens_per_second": self.decoded,
            "decode_mfu": self.mfu,
            "prefill_tokens_per_second": self.prefilled,
            "prefill_mfu": self.prefill_mfu(whole=False),
            "prefill_mfu_whole_attention": self.prefill_mfu(whole=True),
            "seconds": self.seconds,
            "seconds_between": self.between,
            "step_between": self.step_between,
            "fill_between": self.fill_between,
            "wire_bytes": {f"{k} over {a}": v for (k, a), v in self.step.wire.items()},
            "faults": self.faults,
            "compile_seconds": self.compile_seconds,
            "largest": self.step.top[:20],
        }


def _parts(of: cost.Cost) -> dict[str, float]:
    return {
        "seconds": of.seconds,
        "matrix": of.matrix,
        "attention": of.attention,
        "memory": of.memory,
        "interconnect": of.interconnect,
        "hidden_interconnect": of.hidden,
    }


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
        attention = functools.partial(
            _attention_seconds, config=config, topology=topology, mesh=mesh, page=self.page,
            rows=-(-used // self.parts), live=math.ceil(asked.live),
        )  # fmt: skip
        step_module, fill_module = self.modules
        step, least, most = (
            scaled(estimate(step_module, attention, believed=believed), 1 / STEPS)
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
            relaid=relaid(step_module, self.weights, self.cache),
            faults=faults(step_module, dict(mesh.shape), self.weights, self.cache),
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
            each = max(call.FEWEST_ROWS, min(most, -(-asked.rows // parts)))
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
    most = max(call.FEWEST_ROWS, min(MOST_ROWS, int(room // row)))
    if prompts <= most:
        return max(call.FEWEST_ROWS, prompts)
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
        weights, cache, of_rows, True, config=config.model, execution=config.execution,
        steps=STEPS, attend=paged_attention.attend, key_impl="threefry2x32",
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


def _attention_seconds(name, text, *, config, topology, mesh, rows, page, live):
    """Of a call of the decode kernel by a device's `rows`, which see `live` positions each: counted
    cycles or the traffic of live pages; None for another kernel, or where nobody counted."""
    del text
    if not name.startswith(decode_attention.NAME) or topology.chip not in decode_cycles.COUNTED:
        return None
    tensor, model = mesh.shape["tensor"], config.model
    shape = decode_cycles.Shape(
        rows=rows,
        heads=model.num_heads // tensor,
        kv_heads=model.num_kv_heads // tensor,
        page=page,
        table=-(-live // page),
    )
    cycles = decode_cycles.COUNTED[topology.chip]
    return "attention", START + decode_cycles.seconds(topology.chip, shape, cycles, seen=live)


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


def table(results: list[Decoding]) -> str:
    """One line a fact, one column a slice."""
    columns = [_column(result) for result in results]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:],
                                                                         strict=True))])
        for row in rows
    ]  # fmt: skip
    for result in results:
        if not result.fits:
            lines.append(f"{result.topology.name} does not fit; take fewer prompts at once, "
                         "shorter ones, or more chips")  # fmt: skip
        lines += [f"{result.topology.name} loses to its layout: {one}" for one in result.faults]
    return "\n".join(lines)


def _column(of: Decoding) -> dict[str, str]:
    step, fill, hbm = of.step, of.fill, of.topology.hardware.hbm
    axes = " x ".join(f"{name} {size}" for name, size in of.mesh.items() if size > 1)

    def gib(size):
        return f"{size / chips.GIB:.2f}"

    return {
        "slice": of.topology.name,
        "chips": f"{of.topology.num_chips}",
        "fits": "yes" if of.fits else "NO",
        "mesh": axes or "1 device",
        "prompts, length, new tokens": f"{of.asked.prompts} x {of.asked.prompt_length} + "
        f"{of.asked.new_tokens}",
        "rows at once": f"{of.rows}",
        "GiB a device: weights": gib(of.weights),
        "  cache": gib(of.cache),
        "  temporaries": gib(of.temporaries),
        "  code": gib(of.code),
        "  peak / HBM": f"{gib(of.peak)} / {gib(hbm)}",
        "ms a step": f"{1e3 * step.seconds:.3f}",
        "  between": " to ".join(f"{1e3 * end:.3f}" for end in of.step_between),
        "  HBM": f"{1e3 * step.memory:.3f}",
        "  matrix units": f"{1e3 * step.matrix:.3f}",
        "  attention (live pages)": f"{1e3 * step.attention:.3f}",
        "  interconnect, waited for": f"{1e3 * step.interconnect:.3f}",
        "  limit of HBM": f"{1e3 * of.limit:.3f}",
        "  over that limit": f"{of.ratio:.2f}",
        "    by traffic alone, by the compiler": f"{of.least / of.limit:.2f}, "
        f"{of.most / of.limit:.2f}",
        "ms a fill of prompts": f"{1e3 * fill.seconds:.2f}",
        "  between, by calibration": " to ".join(f"{1e3 * end:.2f}" for end in of.fill_between),
        "  binds": fill.binding,
        "prefill tokens/s": f"{of.prefilled:,.0f}",
        "  MFU, visible attention counted": f"{of.prefill_mfu(whole=False):.1%}",
        "  MFU, attention counted whole": f"{of.prefill_mfu(whole=True):.1%}",
        "decode tokens/s": f"{of.decoded:,.0f}",
        "  a chip": f"{of.decoded / of.topology.num_chips:,.0f}",
        "  MFU, by either count": f"{of.mfu:.2%}",
        "seconds of all": f"{of.seconds:,.1f}",
        "  all between": " to ".join(f"{end:,.1f}" for end in of.between),
        "kernels not counted": ", ".join({**step.unknown, **fill.unknown}) or "none",
        "compiled in, s": f"{of.compile_seconds:.0f}",
    }
