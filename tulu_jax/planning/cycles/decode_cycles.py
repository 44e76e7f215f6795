"""How long attention of a decoding step takes: compiled for a chip, its cycles counted."""

import dataclasses

import jax
import jax.numpy as jnp

from tulu_jax import chips
from tulu_jax.kernels import decode_attention as kernel
from tulu_jax.planning import cost
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
    """Of a block of pages of the rows that go side by side and of each of its columns, of a page of
    one of them, of those rows besides, and of a whole call besides."""

    block: float
    column: float = 0.0
    page: float
    row: float
    call: float


# By `benchmarks/decode_attention.py`, by how many rows go side by side, with one product of heads
# each; 4 heads of 4 and 8 heads of 1 key/value heads differ by 2 %. A block is of 2,048 columns for
# one row and for two, and of these and of 1,280 for four.
COUNTED = {
    "v4": {
        1: Cycles(block=898.0, page=40.0, row=53.0, call=975.0),
        2: Cycles(block=1426.0, page=40.0, row=106.0, call=1735.0),
        4: Cycles(block=488.0, column=1.1, page=40.0, row=363.0, call=3177.0),
    },
    "v5e": {
        1: Cycles(block=892.0, page=62.0, row=62.0, call=992.0),
        2: Cycles(block=1275.0, page=61.0, row=125.0, call=1868.0),
        4: Cycles(block=718.0, column=0.77, page=61.0, row=391.0, call=3552.0),
    },
    "v5p": {
        1: Cycles(block=907.0, page=59.0, row=69.0, call=1177.0),
        2: Cycles(block=1308.0, page=59.0, row=136.0, call=2049.0),
        4: Cycles(block=723.0, column=0.77, page=60.0, row=411.0, call=3711.0),
    },
    "v6e": {
        1: Cycles(block=1077.0, page=55.0, row=64.0, call=722.0),
        2: Cycles(block=1461.0, page=55.0, row=129.0, call=1326.0),
        4: Cycles(block=1050.0, column=0.63, page=55.0, row=392.0, call=2458.0),
    },
}


def counted(program: schedule.Kernel) -> Cycles:
    """Scheduled cycles by what they are paid for.

    The innermost loop with products runs for every block. The loops in it start pages, and the
    branches in it that store registers put a row's own key and value. The others, most of which
    await pages, are counted as though all were taken.
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
        if role == "block" and block.kind == "if" and not loops and block.slots.get("VSTORE"):
            role = "row"
        found[role] += block.own
        for child in block.children:
            visit(child, role)

    copied: list[int] = []
    visit(program.whole, "call")
    whole = copied[::2]  # loops over four pages and over single ones, of every row
    found["page"] = sum(whole) / kernel.UNROLLED / max(1, len(whole))
    return Cycles(**found)


def traffic(chip: str, shape: Shape, *, seen: int) -> float:
    """Seconds in which HBM gives the pages of `seen` positions of every row."""
    moved = shape.rows * -(-seen // shape.page) * shape.page_bytes
    return moved / chips.CHIPS[chip].bandwidth


def _together(chip: str, shape: Shape) -> tuple[int, kernel.Block]:
    """Rows of a core of our kernel, and its block."""
    cores = chips.CHIPS[chip].cores
    rows = shape.rows // cores if shape.rows % cores == 0 else shape.rows
    return rows, kernel.fit(
        rows=rows, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=128, page=shape.page,
        table=shape.table, itemsize=2,
    )  # fmt: skip


def cycle_seconds(chip: str, shape: Shape, cycles: Cycles, *, seen: int, ours: bool) -> float:
    """Seconds of all rows with `seen` positions each by cycles alone, of our kernel or the public
    one, whose rows go one by one and whose blocks start all their pages."""
    hardware, live = chips.CHIPS[chip], -(-seen // shape.page)
    rows, block = _together(chip, shape) if ours else (shape.rows, None)
    together, pages = (block.rows, block.pages) if ours else (1, shape.public_pages)
    of_block = cycles.block
    if ours:
        of_block += cycles.column * block.pages * block.heads * shape.page
    each = of_block * -(-live // pages) + cycles.page * live * together + cycles.row
    return (each * rows / together + cycles.call) / hardware.clock


def call(chip: str, shape: Shape, *, used: int, seen: int) -> cost.Call | None:
    """What a dry run takes a call of our kernel for, in which `used` of the rows see `seen`
    positions each and the others none; None where nobody counted."""
    rows, block = _together(chip, shape)
    cycles = COUNTED.get(chip, {}).get(block.rows)
    if cycles is None:
        return None
    hardware, live = chips.CHIPS[chip], -(-seen // shape.page)
    own = -(-used * rows // shape.rows)  # of a core
    blocks = -(-own // block.rows)
    of_block = cycles.block + cycles.column * block.pages * block.heads * shape.page
    each = of_block * -(-live // block.pages) + cycles.row
    first = shape.page_bytes * min(live, block.pages) * min(own, block.rows)
    every = cycles.page * live * own + each * blocks + cycles.call
    first *= hardware.cores if rows < shape.rows else 1
    return cost.Call(
        kind="attention",
        first=first / hardware.bandwidth,
        compute=every / hardware.clock,
        last=of_block / hardware.clock,
        traffic=used * live * shape.page_bytes / hardware.bandwidth,
    )
