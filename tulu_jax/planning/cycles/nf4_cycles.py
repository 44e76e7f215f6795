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
    """Scheduled cycles of a compiled product over the clock, all cores of a device at work."""
    hardware = chips.CHIPS[chip]
    return cycles(kernel, tile(chip, product), product, hardware.cores, first=1) / hardware.clock


def cycles(
    kernel: schedule.Kernel, tile: nf4_tiles.Tile, product: Product, cores: int, *, first: int
) -> float:
    """Cycles of a core. Of the kernel's blocks those with products run for every tile and block of
    rows, twice as many (even and odd tiles), and as many again where the last tile along the
    contraction is shorter; of the others one may decode the first tile (`first` tiles do nothing
    else), and the last stores the result."""
    along, across = (
        -(-product.contracted // tile.contracted),
        -(-product.out // tile.out) // tile.shares,
    )
    parts = tile.bands * tile.shares
    each = tile.blocks * (parts if kernel.primary_core_only else -(-parts // cores))
    count = along * across
    compute = [count / 2] * 2
    if len(kernel.branches["compute"]) == 4:  # the whole ones and the shorter, of each parity
        lengths = [across * (along - 1) / 2, across / 2]
        by_size = sorted(kernel.branches["compute"], key=lambda block: block.own)
        shorter = {id(block) for block in by_size[:2]}
        compute = [lengths[id(block) in shorter] for block in kernel.branches["compute"]]
    sides = len(kernel.branches["side"])
    side = ([first] * (sides == 2) + [across])[:sides]
    return kernel.cycles(
        steps=(count + first) * each,
        compute=[n * each for n in compute],
        side=[n * each for n in side],
    )
