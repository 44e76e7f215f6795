"""The tiles of `nf4_matmul` for a chip and shapes, and how long a product then takes.

Counted cycles of a few shapes give what a step costs besides its products; from that follow the
tiles that are best, and what a dry run expects of a product.
"""

import dataclasses
import functools
import itertools

from tulu_jax import chips

BLOCK = 64  # rows of a scale
LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """The grid: `parts` of the result × tiles of W × `blocks` of `rows` rows of x.

    A tile of W is `contracted` by `out`; the last along the contraction may be shorter. A part is
    one of `bands` of rows and of `shares` of the columns of the result; the cores of a device have
    as many of them. `decoder` is a name of `nf4_matmul.DECODERS`, `vmem` the bytes of a core that
    the kernel may use.
    """

    rows: int
    blocks: int
    bands: int
    shares: int
    contracted: int
    out: int
    decoder: str
    vmem: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Counted:
    """Of a core: how it decodes and how many weights a cycle that gives on its own; how wide its
    matrix units are; the cycles in which the product of a step fills and drains, and those of a
    step besides; the sums a cycle that it stores. `benchmarks/nf4_product.py` holds what follows
    from them against whole counts."""

    decoder: str
    decoded: int
    width: int
    ramp: int
    step: int
    stored: int


_V5 = _Counted(decoder="sublanes", decoded=580, width=128, ramp=180, step=175, stored=2048)
_V6 = _Counted(decoder="bytes", decoded=1310, width=256, ramp=290, step=160, stored=2680)
# A v3 takes no bfloat16 operands: there XLA multiplies.
_COUNTED = {
    "v4": _Counted(decoder="lanes", decoded=125, width=128, ramp=165, step=135, stored=1024),
    "v5e": _V5,
    "v5p": dataclasses.replace(_V5, decoded=570),
    "v6e": _V6,
    "tpu7x": _V6,
}
_SIZES = (512, 768, 1024, 1280, 1536, 2048)
_HEIGHTS = (512, 1024)  # rows of a block
_LARGEST = 2**30  # products of numbers in a step, straight code; of 2^31 it compiles thrice as long
_UNEVEN = 1.01  # a shorter last tile has straight code of its own
_BESIDE = 512  # rows from which on decoding hides behind the product
_MARGIN = chips.MIB  # of VMEM, for values in flight


@functools.lru_cache(maxsize=256)
def fit(chip: str, *, rows: int, contracted: int, out: int) -> Tile | None:
    """The tiles for x [rows, contracted] and a result [rows, out] that take the least time by count
    of products, decoding, steps and transfers; None where the kernel does not go: on v3, and where
    either dimension of W is no multiple of 128."""
    if chip not in _COUNTED or rows == 0 or contracted % LANES or out % LANES:
        return None

    def price(tile):
        seconds, moved = _seconds(chip, tile, contracted, out)
        return seconds * (_UNEVEN if contracted % tile.contracted else 1), moved

    return min(_tiles(chip, rows, contracted, out), key=price, default=None)


def seconds(chip: str, *, rows: int, contracted: int, out: int) -> float | None:
    """About how long the kernel takes for x [rows, contracted] and a result [rows, out], forward or
    backward: lower bound as all counts of cycles here. None where it does not go."""
    tile = fit(chip, rows=rows, contracted=contracted, out=out)
    return None if tile is None else _seconds(chip, tile, contracted, out)[0]


def _tiles(chip, rows, contracted, out):
    hardware, decoder = chips.CHIPS[chip], _COUNTED[chip].decoder
    lengths, widths = (
        [n for n in _SIZES if n < size] + [size] * (size <= _SIZES[-1])
        for size in (contracted, out)
    )
    grids = {
        (-(-rows // (bands * blocks) // 16) * 16, blocks, bands)
        for bands in (1, 2, 4, 8, 16, 32, 64)
        for height in _HEIGHTS
        for blocks in [-(-rows // bands // height)]
    }
    for (high, blocks, bands), length, width in itertools.product(sorted(grids), lengths, widths):
        if (bands * blocks - 1) * high >= rows:
            continue  # a block without rows
        across = -(-out // width)
        for shares in {1, hardware.cores}:
            parts = bands * shares
            if across % shares or (parts > 1 and parts % hardware.cores):
                continue
            tile = Tile(
                rows=high,
                blocks=blocks,
                bands=bands,
                shares=shares,
                contracted=length,
                out=width,
                decoder=decoder,
                vmem=hardware.vmem,
            )
            fits = _vmem(tile) <= hardware.vmem - _MARGIN
            if fits and high * length * width <= _LARGEST:
                yield tile


def _vmem(tile: Tile) -> int:
    """Bytes of sums, of two decoded tiles and of windows, each twice."""
    weights = tile.contracted * tile.out
    windows = 4 * tile.rows * (tile.contracted + tile.out) + weights + weights // 8
    return 4 * tile.blocks * tile.rows * tile.out + 4 * weights + windows


def _seconds(chip, tile: Tile, contracted: int, out: int) -> tuple[float, float]:
    """Seconds of a product, and bytes that it moves."""
    hardware, counted = chips.CHIPS[chip], _COUNTED[chip]
    along, across = -(-contracted // tile.contracted), -(-out // tile.out)
    parts = tile.bands * tile.shares
    steps = along * across // tile.shares * tile.blocks
    peak = hardware.peak / 2 / hardware.clock / hardware.cores  # products a cycle
    rows = tile.blocks * max(tile.rows, LANES)  # fewer do not pay for loading the weights

    def filled(size):  # a matrix unit multiplies nothing narrower than itself
        return -(-size // counted.width) * counted.width

    rest = contracted - (along - 1) * tile.contracted
    length = (along - 1) * filled(tile.contracted) + filled(rest)
    columns = across // tile.shares * tile.out
    multiplied = rows * length * (across // tile.shares) * filled(tile.out) / peak
    multiplied += counted.ramp * steps
    decoded = along * tile.contracted * columns / counted.decoded
    cycles = max(multiplied, decoded) if tile.rows >= _BESIDE else multiplied + decoded
    cycles += tile.contracted * tile.out / counted.decoded  # the first tile, beside nothing
    cycles += rows * columns / counted.stored + counted.step * (steps + tile.blocks)
    cycles *= -(-parts // hardware.cores)
    rows = tile.bands * tile.blocks * tile.rows
    moved = 2.0 * rows * (contracted * across + out)
    moved += (1 / 2 + 4 / BLOCK) * tile.bands * contracted * out
    return max(cycles / hardware.clock, moved / hardware.bandwidth), moved
