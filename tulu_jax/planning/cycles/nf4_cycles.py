"""How long the NF4 product takes: compiled for a chip, its cycles counted (`schedule.py`)."""

import dataclasses

import jax
import jax.numpy as jnp

from tulu_jax import chips
from tulu_jax.kernels import nf4_matmul as nf4
from tulu_jax.kernels import nf4_tiles
from tulu_jax.planning.cycles import schedule

TARGET = f"{__file__}:product"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """x [rows, contracted] and a result [rows, out]; `backward` is the product with Wᵀ."""

    rows: int
    contracted: int
    out: int
    backward: bool

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.contracted * self.out


def tile(chip: str, product: Product) -> nf4_tiles.Tile | None:
    return nf4_tiles.fit(chip, rows=product.rows, contracted=product.contracted, out=product.out)


def request(chip: str, product: Product) -> schedule.Request:
    """What `schedule.compile_for` compiles: `product` with the tiles that are best."""
    fitted = dataclasses.asdict(tile(chip, product))
    return schedule.Request(
        target=TARGET, arguments=dict(tile=fitted, product=dataclasses.asdict(product))
    )


def product(tile: dict, product: dict):
    """The jitted product with these tiles, and its abstract arguments."""
    size, fitted = Product(**product), nf4_tiles.Tile(**tile)
    K, N = size.contracted, size.out
    if size.backward:
        K, N = N, K

    def run(x, codes, scales):
        return nf4.run(x, codes, scales, tile=fitted, backward=size.backward, interpret=False)

    return jax.jit(run), (
        jax.ShapeDtypeStruct((size.rows, size.contracted), jnp.bfloat16),
        jax.ShapeDtypeStruct((K // 8, N), jnp.int32),
        jax.ShapeDtypeStruct((K // nf4.BLOCK, N), jnp.float32),
    )


def seconds(chip: str, product: Product, kernel: schedule.Kernel) -> float:
    """Scheduled cycles of a compiled product over the clock."""
    hardware = chips.CHIPS[chip]
    fitted = tile(chip, product)
    return cycles(kernel, fitted, product, cores=hardware.cores, ahead=1) / hardware.clock


def cycles(
    kernel: schedule.Kernel, tile: nf4_tiles.Tile, product: Product, *, cores: int, ahead: int
) -> float:
    """Cycles of a core.

    Before the products `ahead` tiles, 1 or 0, are decoded beside nothing. Blocks with products run
    for every block of rows and tile; with `ahead` there are two, for even and odd tiles, and where
    the last tile along the contraction is shorter one or two for it. After them the result is
    stored.
    """
    along = -(-product.contracted // tile.contracted)
    across = -(-product.out // tile.out) // tile.shares
    parts, branches = tile.bands * tile.shares, kernel.branches
    each = tile.blocks * (parts if kernel.primary_core_only else -(-parts // cores))
    steps = along * across + ahead
    by_size = sorted(branches["compute"], key=lambda block: block.own)
    ends = {id(block) for block in by_size[: len(by_size) - 1 - ahead]}
    whole = along - bool(ends)
    runs = across / (1 + ahead)
    compute = [runs * (1 if id(b) in ends else whole) for b in branches["compute"]]
    first_product = branches["compute"][0].start
    side = [
        across if b.start > first_product else ahead if b.slots["VALU"] else steps  # or a transfer
        for b in branches["side"]
    ]
    return kernel.cycles(
        steps=steps * each,
        compute=[n * each for n in compute],
        side=[n * each for n in side],
    )
