"""How long attention of a decoding step takes: compiled for a chip, its cycles counted."""

import dataclasses

import jax
import jax.numpy as jnp

from tulu_jax import chips
from tulu_jax.kernels import decode_attention as kernel
from tulu_jax.planning.cycles import schedule

TARGET = f"{__file__}:ours"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a device: rows, query heads and key/value heads, of 128 numbers; positions of a page, and
    pages of a table."""

    rows: int
    heads: int
    kv_heads: int
    page: int
    table: int

    @property
    def page_bytes(self) -> int:
        """Of keys and values in bfloat16."""
        return 2 * 2 * self.kv_heads * self.page * 128

    @property
    def public_pages(self) -> int:
        """Of a block of the public kernel: 1 MiB."""
        return min(2**20 // self.page_bytes, self.table)


def ours(rows: int, heads: int, kv_heads: int, page: int, table: int):
    """The jitted kernel and its abstract arguments."""

    def run(q, k, v, cache, layer, table, seen):
        return kernel.decode_attention(
            q, k, v, cache, layer, table=table, seen=seen, interpret=False
        )

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    cached = of(2, rows * table + 1, kv_heads, page, 128)
    new = of(rows, kv_heads, 128)
    ints = dict(dtype=jnp.int32)
    return jax.jit(run, donate_argnums=3), (
        of(rows, heads, 128), new, new, {"k": cached, "v": cached},
        of(**ints), of(rows, table, **ints), of(rows, **ints),
    )  # fmt: skip


def request(shape: Shape, target: str = TARGET) -> schedule.Request:
    return schedule.Request(target=target, arguments=dataclasses.asdict(shape), meshed=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycles:
    """Of a block of pages of the rows that go side by side, of a page of one of them, of those rows
    besides, and of a whole call besides."""

    block: float
    page: float
    row: float
    call: float


# By `benchmarks/decode_attention.py`, for four rows side by side with one product of heads each;
# 4 heads of 4 and 8 heads of 1 key/value heads differ by 2 %.
COUNTED = {
    "v4": Cycles(block=1841.0, page=46.0, row=137.0, call=2122.0),
    "v5e": Cycles(block=1829.0, page=69.0, row=125.0, call=2520.0),
    "v5p": Cycles(block=1850.0, page=67.0, row=136.0, call=2679.0),
    "v6e": Cycles(block=1992.0, page=63.0, row=122.0, call=1939.0),
}


def counted(program: schedule.Kernel) -> Cycles:
    """Scheduled cycles by what they are paid for.

    The innermost loop with products runs for every block; the loops in it start or await a page. A
    branch is counted whenever its loop runs, which is too often for what ends a row.
    """
    found = {"block": 0.0, "page": 0.0, "row": 0.0, "call": 0.0}

    def multiplies(block):
        return any(one.slots.get("MXU") for one in block.walk())

    def visit(block, role):
        loops = [one for one in block.walk() if one is not block and one.kind == "loop"]
        if block.kind == "loop":
            if role == "block":
                copied.append(sum(one.own for one in block.walk()))
                return
            deeper = sum(map(multiplies, loops))
            if multiplies(block):
                role = ("block", "row")[deeper] if deeper < 2 else "call"
        found[role] += block.own
        for child in block.children:
            visit(child, role)

    copied: list[int] = []
    visit(program.whole, "call")
    # Loops over four pages and over single ones, of every row; starting and awaiting.
    whole = copied[::2]
    rows = max(1, len(whole) // 2)
    found["page"] = sum(whole) / kernel.UNROLLED / rows
    return Cycles(**found)


def traffic(chip: str, shape: Shape, *, seen: int) -> float:
    """Seconds in which HBM gives the pages of `seen` positions of every row."""
    moved = shape.rows * -(-seen // shape.page) * shape.page_bytes
    return moved / chips.CHIPS[chip].bandwidth


def cycle_seconds(chip: str, shape: Shape, cycles: Cycles, *, seen: int, ours: bool) -> float:
    """Seconds of all rows with `seen` positions each by cycles alone, of our kernel or the public
    one, whose rows go one by one and whose blocks start all their pages."""
    hardware, live = chips.CHIPS[chip], -(-seen // shape.page)
    rows = -(-shape.rows // hardware.cores) if ours else shape.rows
    block = kernel.fit(
        rows=rows, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=128, page=shape.page,
        table=shape.table, itemsize=2,
    )  # fmt: skip
    together, pages = (block.rows, block.pages) if ours else (1, shape.public_pages)
    each = cycles.block * -(-live // pages) + cycles.page * live * together + cycles.row
    return (each * rows / together + cycles.call) / hardware.clock


def seconds(chip: str, shape: Shape, cycles: Cycles, *, seen: int) -> float:
    """Of our kernel, for all rows with `seen` positions each: the longer of cycles and traffic."""
    counted = cycle_seconds(chip, shape, cycles, seen=seen, ours=True)
    return max(counted, traffic(chip, shape, seen=seen))
