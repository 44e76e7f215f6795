"""Cycles of a decoding step's products: compiled for a chip, counted (`schedule.py`)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from tulu_jax import chips
from tulu_jax.kernels import decode_products as kernel
from tulu_jax.kernels import decode_rings
from tulu_jax.planning import cost
from tulu_jax.planning.cycles import schedule

TARGET = f"{__file__}:product"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a device: rows, the width of the residual, heads and key/value heads of 128 numbers, and
    the middle of the MLP."""

    rows: int
    embed: int
    heads: int
    kv_heads: int
    mlp: int

    def weights(self, which: str) -> tuple[decode_rings.Weight, ...]:
        D, H = self.embed, 128
        if which == "qkv":
            return tuple(decode_rings.weight((D, n, H), inputs=1, middle=False)
                         for n in (self.heads, self.kv_heads, self.kv_heads))  # fmt: skip
        if which == "o":
            return (decode_rings.weight((self.heads, H, D), inputs=2, middle=False),)
        across = decode_rings.weight((D, self.mlp), inputs=1, middle=True)
        return across, across, decode_rings.weight((self.mlp, D), inputs=1, middle=False)

    def ring(self, which: str, cores: int) -> decode_rings.Ring | None:
        return decode_rings.ring(
            self.weights(which), rows=self.rows, cores=cores, divides=which != "mlp"
        )


KINDS = ("qkv", "o", "mlp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycles:
    """Of a core: the weights that it multiplies in a cycle, at the least, and of a whole call
    besides; both for so many rows."""

    weights: float
    call: float


def _of_kinds(**counted: tuple[int, int]) -> dict[str, Cycles]:
    """Of each kind, from its weights a cycle and the cycles of a call besides."""
    return {
        kind: Cycles(weights=float(weights), call=float(call))
        for kind, (weights, call) in counted.items()
    }


# By `benchmarks/decode_step.py`, of the slowest of the shapes there, by rows; rows between are
# counted as the next.
COUNTED: dict[str, dict[int, dict[str, Cycles]]] = {
    "v5e": {
        16: _of_kinds(qkv=(975, 1547), o=(1273, 310), mlp=(755, 880)),
        64: _of_kinds(qkv=(762, 2346), o=(867, 996), mlp=(798, 2706)),
        256: _of_kinds(qkv=(238, 8056), o=(245, 3552), mlp=(243, 10470)),
    },
    "v5p": {
        16: _of_kinds(qkv=(978, 1239), o=(1273, 379), mlp=(1767, 847)),
        64: _of_kinds(qkv=(588, 3188), o=(757, 1041), mlp=(930, 2923)),
        256: _of_kinds(qkv=(216, 10001), o=(235, 3549), mlp=(251, 10747)),
    },
    "v6e": {
        16: _of_kinds(qkv=(834, 2088), o=(1116, 303), mlp=(744, 1166)),
        64: _of_kinds(qkv=(923, 2459), o=(1378, 720), mlp=(868, 2436)),
        256: _of_kinds(qkv=(426, 7891), o=(456, 2252), mlp=(444, 9188)),
    },
}


def of_rows(chip: str, rows: int) -> dict[str, Cycles] | None:
    """What is counted for at least so many rows; None where nobody counted."""
    return next((of for most, of in COUNTED.get(chip, {}).items() if rows <= most), None)


def call(chip: str, which: str, shape: Shape) -> cost.Call | None:
    """What a dry run takes a call for; None where nobody counted."""
    hardware, of_kinds = chips.CHIPS[chip], of_rows(chip, shape.rows)
    if of_kinds is None:
        return None
    counted, ring = of_kinds[which], shape.ring(which, hardware.cores)
    each = sum(math.prod(w.shape) for w in ring.weights) / hardware.cores / counted.weights
    piece = min(1.0, ring.size / ring.length)
    moved = ring.bytes + (_beside(shape, ring, which) if hardware.cores > 1 else 0)
    return cost.Call(
        kind="matrix",
        first=piece * ring.bytes / hardware.bandwidth,
        compute=(each + counted.call) / hardware.clock,
        last=piece * each / hardware.clock,
        traffic=moved / hardware.bandwidth,
    )


def product(which: str, shape: dict, cores: int):
    """The jitted product and its abstract arguments."""
    size = Shape(**shape)
    ring = size.ring(which, cores)
    run = kernel.mlp if which == "mlp" else kernel.multiply

    def product(x, scale, layer, *stacked):
        # As parameters have them; they lie as `ring` says.
        stacked = tuple(
            w.swapaxes(1, 2) if one.form in ("turned", "heads") else w
            for one, w in zip(ring.weights, stacked, strict=True)
        )
        normed = {} if which == "o" else dict(scale=scale, eps=1e-5)
        return run(x, stacked, layer, name=which, ring=ring, interpret=False, **normed)

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    D = size.heads * 128 if which == "o" else size.embed
    return jax.jit(product), (
        of(size.rows, D), of(D, dtype=jnp.float32), of(dtype=jnp.int32),
        *(of(2, *one.shape) for one in ring.weights),
    )  # fmt: skip


def request(which: str, shape: Shape, cores: int) -> schedule.Request:
    arguments = dict(which=which, shape=dataclasses.asdict(shape), cores=cores)
    return schedule.Request(target=TARGET, arguments=arguments, meshed=True)


def _beside(shape: Shape, ring: decode_rings.Ring, which: str) -> int:
    """Bytes of activations that two cores read and write in HBM; one has them in VMEM."""
    inputs = shape.heads * 128 if which == "o" else shape.embed
    outputs = {"qkv": (shape.heads + 2 * shape.kv_heads) * 128}.get(which, shape.embed)
    return 2 * ring.cores * shape.rows * (inputs + outputs)


def cycles(program: schedule.Kernel, ring: decode_rings.Ring) -> float:
    """Of a core, for a whole call."""

    def visit(block, times):
        if block.kind == "loop":
            times *= block.trips or ring.whole
        return block.own * times + sum(visit(child, times) for child in block.children)

    return float(visit(program.whole, 1))


def counted(program: schedule.Kernel, ring: decode_rings.Ring) -> Cycles:
    """What a kernel's loop over pieces multiplies in a cycle, and what all else takes but for a
    shorter last piece, whose products are counted as the others'."""
    loops = [block for block in program.whole.walk() if block.kind == "loop"]
    (pieces,) = (block for block in loops if any(one.slots.get("MXU") for one in block.walk()))
    of_piece = sum(block.own for block in pieces.walk())
    weights = sum(math.prod(w.piece(ring.size)) for w in ring.weights)
    if not ring.whole:
        weights = 0
    rest = of_piece * ring.rest / ring.size
    call = cycles(program, ring) - of_piece * ring.whole - rest
    return Cycles(weights=weights / of_piece, call=max(0.0, call))
