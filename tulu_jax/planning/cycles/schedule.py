"""Scheduled cycles of compiled TPU programs, counted without a TPU.

libtpu compiles for a named chip on any Linux machine and dumps what it made. A TensorCore runs its
instruction bundles in order, and in the dump taken before waits are folded away every cycle is one
bundle, empty ones included. So the time of a kernel is the sum over its blocks (a loop's body, what
a branch skips) of the block's own cycles times how often it runs, and the time of the XLA code
around it is the bytes it moves over the bandwidth. Both are lower bounds: waits for transfers from
HBM inside kernels, bank conflicts, and throttling are not in them.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tulu_jax import chips
from tulu_jax.planning import compiled

PASSES = {
    "post-bundle-packing-post-ra": "flow",
    "pre-delay_hlo-static-per-bundle-utilization": "slots",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """`target` is 'path/to/file.py:function'; the function is called with `arguments` and gives a
    jitted function and its abstract arguments. With `meshed` it is lowered under a mesh of the one
    device, which is how a kernel that asks what it is lowered for learns it."""

    target: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    meshed: bool = False


@dataclasses.dataclass(kw_only=True)
class Block:
    """Cycles [start, end) that run under one condition: 'whole', 'loop' or 'if'.

    `own` is the cycles in no child and `slots` what each unit did in them; `trips` is a loop's
    number of runs where the compiler knows it.
    """

    kind: str
    start: int
    end: int
    trips: int | None = None
    children: list["Block"] = dataclasses.field(default_factory=list)
    own: int = 0
    slots: dict[str, int] = dataclasses.field(default_factory=dict)

    def walk(self):
        yield self
        for child in self.children:
            yield from child.walk()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One Pallas kernel: its blocks, the units' widths, and whether a second core stays idle."""

    name: str
    whole: Block
    capacity: dict[str, int]
    primary_core_only: bool

    @property
    def grid(self) -> Block:
        """The loop over grid steps."""
        loops = [block for block in self.whole.walk() if block.kind == "loop"]
        return max(loops, key=lambda block: block.end - block.start)

    @property
    def branches(self) -> dict[str, list[Block]]:
        """In program order: 'compute' uses the matrix unit, 'side' stores more than a few registers
        without it, 'step' holds the others and is run by every step, 'control' is what is left."""
        found = {"compute": [], "side": [], "step": [], "control": []}
        size = self.grid.end - self.grid.start
        for block in self.grid.walk():
            if block.kind != "if":
                continue
            if block.end - block.start > size / 2 and block.children:
                found["step"].append(block)
            elif block.slots["MXU"]:
                found["compute"].append(block)
            else:
                found["side" if block.slots["VSTORE"] > 16 else "control"].append(block)
        return found

    def cycles(self, *, steps, compute: Sequence, side: Sequence, inner: float = 1) -> float:
        """Cycles of `steps` grid steps on one core.

        `compute` and `side` say how often each of those blocks runs; everything else in the loop is
        counted for each step, and for two more that fill and drain the pipeline. A loop inside a
        step whose runs the compiler does not know runs `inner` times a step. Raises
        `ValueError` if the kernel has another number of such blocks.
        """
        branches = self.branches
        for name, runs in (("compute", compute), ("side", side)):
            if len(runs) != len(branches[name]):
                raise ValueError(
                    f"{self.name} has {len(branches[name])} {name} blocks; found {len(runs)} runs"
                )
        runs = {id(b): n for name, ns in (("compute", compute), ("side", side))
                for b, n in zip(branches[name], ns, strict=True)}  # fmt: skip
        steady = {id(block) for block in branches["step"]}

        def visit(block, times):
            if block is self.grid:
                times *= steps + 2
            elif block.kind == "loop":
                times *= block.trips or inner
            elif id(block) in steady:
                times = steps
            times = runs.get(id(block), times)
            return block.own * times + sum(visit(child, times) for child in block.children)

        return float(visit(self.whole, 1))

    def bounds(self, block: Block) -> dict[str, int]:
        """Cycles that each unit alone would need for `block`, the busiest first."""
        needed = {k: math.ceil(n / self.capacity[k]) for k, n in block.slots.items() if n}
        return dict(sorted(needed.items(), key=lambda item: -item[1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled request: kernels by name, the optimized program's text, bytes moved by the XLA
    code around kernels and the seconds that the compiler took when it made this; or why it did not
    compile."""

    request: Request
    kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)
    hlo: str = ""
    glue_bytes: float = 0.0
    seconds: float = 0.0
    error: str | None = None


# Where jax and libtpu believe that they are while they compile for devices that are not there.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file is taken
}


def child_environment(dumps: str, flags: Sequence[str]) -> dict[str, str]:
    """Environment in which jax compiles for TPUs that are not there and dumps what it made."""
    flags = [
        *flags,
        f"--xla_jf_dump_to={dumps}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_emit_annotations=true",
        "--xla_jf_debug_level=1",
        f"--xla_jf_dump_llo_pass_label_regex=({'|'.join(PASSES)})",
    ]
    return os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": " ".join(flags)}


def compile_for(
    chip: str, requests: Sequence[Request], *, timeout: int, flags: Sequence[str] = ()
) -> list[Program]:
    """Compiles the requests, in order, for `chip` in one fresh process; `flags` are libtpu's.

    A request that the compiler refuses comes back with its message in `error`; if the process dies,
    `RuntimeError` carries what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = {
            "chip": chip,
            "folder": folder,
            "requests": [dataclasses.asdict(request) for request in requests],
        }
        process = subprocess.run(
            [sys.executable, "-m", "tulu_jax.planning.cycles.schedule"],
            input=json.dumps(task),
            env=child_environment(os.path.join(folder, "dumps"), flags),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if process.returncode:
            raise RuntimeError(f"compiling for {chip} failed:\n{process.stderr[-4000:]}")
        return [
            _read(request, json.loads(pathlib.Path(folder, f"{number}.json").read_text()))
            for number, request in enumerate(requests)
        ]


def _read(request: Request, result: dict[str, Any]) -> Program:
    if result["error"]:
        return Program(request=request, error=result["error"])
    return Program(
        request=request,
        kernels={name: parse(name, **texts) for name, texts in sorted(result["kernels"].items())},
        hlo=result["hlo"],
        glue_bytes=glue_bytes(result["hlo"]),
        seconds=result["seconds"],
    )


def parse(name: str, flow: str, slots: str) -> Kernel:
    """A kernel from the text of its control flow and of its use of the units."""
    lines = slots.splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("MXU"))
    units = [unit.split(":")[-1].strip() for unit in lines[head].split(",")]
    capacity = dict(zip(units, map(int, lines[head + 1].split()), strict=True))
    rows = [list(map(int, line.split())) for line in lines[head + 3 :] if line.strip()]
    whole = _nest(_blocks(flow, len(rows)))
    for block in whole.walk():
        inside = [range(child.start, child.end) for child in block.children]
        own = set(range(block.start, block.end)).difference(*inside)
        block.own = len(own)
        totals = [sum(column) for column in zip(*(rows[n] for n in own), strict=True)]
        block.slots = dict(zip(units, totals or [0] * len(units), strict=True))
    return Kernel(
        name=name,
        whole=whole,
        capacity=capacity,
        primary_core_only="(PrimaryCoreRegion)" in flow,
    )


def _blocks(flow: str, length: int) -> list[Block]:
    """A forward branch skips an 'if', a backward one closes a 'loop'."""
    blocks = [Block(kind="whole", start=0, end=length)]
    trips = dict(re.findall(r"(%p\S*) = scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit", flow))
    start, end = 0, length
    for line in flow.splitlines():
        if match := re.match(r"\s*// region range: \[(\d+), (\d+)\)", line):
            start, end = int(match[1]), int(match[2])
        branch = re.search(r"= sbr\.(?:rel|abs)(?: \((!?%[^)]*)\))? target bundleno = (\d+)", line)
        if branch:
            target = int(branch[2])
            if target <= start:
                count = trips.get((branch[1] or "").lstrip("!"))
                count = int(count) if count else None
                blocks.append(Block(kind="loop", start=target, end=end, trips=count))
            elif target > end:
                blocks.append(Block(kind="if", start=end, end=target))
    return blocks


def _nest(blocks: list[Block]) -> Block:
    order = {"whole": 0, "loop": 1, "if": 2}
    blocks.sort(key=lambda block: (block.start, -block.end, order[block.kind]))
    inside: list[Block] = []
    for block in blocks:
        while inside and block.start >= inside[-1].end:
            inside.pop()
        if inside:
            block.end = min(block.end, inside[-1].end)
            inside[-1].children.append(block)
        inside.append(block)
    return blocks[0]


BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
FREE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "custom-call"),
    *("conditional", "copy-start", "copy-done", "partition-id", "after-all"),
}


def _bytes(shape: str) -> float:
    """Bytes of a shape that lie in HBM (memory space S(1) is VMEM)."""
    total = 0.0
    for kind, sizes, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if "S(" not in layout:
            total += BYTES.get(kind, 0) * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def glue_bytes(hlo: str) -> float:
    """HBM bytes that the entry computation reads and writes outside kernels and conditionals."""
    entry = hlo[hlo.index("\nENTRY ") :]
    shapes, total = {}, 0.0
    for line in entry.splitlines():
        match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)", line)
        if not match:
            continue
        name, shape, operation, rest = match.groups()
        shapes[name] = shape
        if operation not in FREE:
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            total += _bytes(shape) + sum(_bytes(shapes.get(x, "")) for x in operands)
    return total


def _load(target: str):
    """The function of 'path/to/file.py:function'; the file may import its neighbours."""
    path, name = target.rsplit(":", 1)
    module = sys.modules.get(path)
    if module is None:
        sys.path.insert(0, os.path.dirname(path))
        spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
        module = sys.modules[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(module, name)


def _child() -> None:
    """Compiles the task on standard input and leaves one file for each request."""
    import jax
    from jax.experimental import topologies

    # What is compiled, and so kept, does not depend on where the source lies or on its lines.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    task = json.load(sys.stdin)
    chip, dumps = chips.CHIPS[task["chip"]], pathlib.Path(task["folder"], "dumps")
    name, options = f"{task['chip']}:{chip.smallest}", dict(chip.options)
    if options:
        options["num_slices"] = 1
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    dumps.mkdir()
    for number, request in enumerate(task["requests"]):
        try:
            function, arguments = _load(request["target"])(**request["arguments"])
            meshed = request["meshed"]
            one = jax.NamedSharding(mesh, jax.P()) if meshed else place
            arguments = jax.tree.map(
                lambda x, one=one: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), arguments
            )
            with jax.set_mesh(mesh) if meshed else contextlib.nullcontext():
                traced = function.trace(*arguments)
                lowered = traced.lower(lowering_platforms=("tpu",)) if meshed else traced.lower()
            make = functools.partial(_make, lowered, dumps)
            where = f"{name} {options}"
            result = compiled.kept(make, lowered, place=where, options={}) | {"error": None}
        except Exception as error:  # every refusal goes back to the caller
            result = {"error": f"{type(error).__name__}: {error}"[:3000]}
        pathlib.Path(task["folder"], f"{number}.json").write_text(json.dumps(result))


def _make(lowered, dumps: pathlib.Path) -> dict[str, Any]:
    """Compiles; all that `_read` needs of it, 'kernels' being each one's two dumps."""
    for path in dumps.iterdir():
        path.unlink()
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    hlo = program.as_text()
    ours = set(re.findall(r"%([\w.\-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", hlo))
    kernels: dict[str, dict[str, str]] = {}
    for path in dumps.iterdir():
        match = re.fullmatch(r"\d+-(.+)-\d+-(.+)\.txt", path.name)
        if match and match[1] in ours and match[2] in PASSES:
            kernels.setdefault(match[1], {})[PASSES[match[2]]] = path.read_text()
    return {
        "hlo": hlo,
        "kernels": kernels,
        "seconds": seconds,
    }


if __name__ == "__main__":
    _child()
