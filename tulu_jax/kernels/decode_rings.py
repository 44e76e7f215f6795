"""How the weights of a kernel of `decode_products.py` stream: as they lie, in pieces, of which a
ring in VMEM holds a few."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from tulu_jax import chips

LANES, TILE, PACKED = 128, 8, 16  # columns and rows of a tile, rows of a register of bfloat16
PIECE_BYTES = {1: 3 * chips.MIB, 2: chips.MIB}  # of a piece of all weights, about, by cores
# The products of a last piece stand beside no copy. Those of few rows are far faster than HBM, so
# that small pieces, which multiply fewer weights in a cycle, cost nothing.
FEW_ROWS, FEW_BYTES, HALF = 16, chips.MIB, LANES // 2
LONGEST = 1024  # inputs or outputs of a piece, whose products are straight code
RING_BYTES = {1: 16 * chips.MIB, 2: 6 * chips.MIB}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A layer's part of a stacked weight as it lies in HBM: `shape`, cut in pieces along `axis`.

    `form` is what a piece is: 'rows' [in, out], 'turned' [out, in], 'heads' [heads, in, head] or
    'between' [in, heads, head].
    """

    form: str
    shape: tuple[int, ...]
    axis: int
    between: int = 1

    @property
    def length(self) -> int:
        return self.shape[self.axis] // self.between

    @property
    def bytes(self) -> int:
        """In bfloat16, with what fills up lanes."""
        *above, lanes = self.shape
        return 2 * math.prod(above) * -(-lanes // LANES) * LANES

    def piece(self, size: int) -> tuple[int, ...]:
        rows = size * self.between
        return (*self.shape[: self.axis], rows, *self.shape[self.axis + 1 :])

    def of(self, stacked: jax.Array) -> jax.Array:
        """[L, *shape] of the weight as parameters have it; it lies so already."""
        stacked = stacked.swapaxes(1, 2) if self.form in ("turned", "heads") else stacked
        return stacked.reshape(-1, *self.shape)


def weight(shape: tuple[int, ...], *, inputs: int, middle: bool) -> Weight:
    """How a device's [*inputs, *outputs] of a layer lies on TPUs, where XLA puts minor what fills
    whole lanes and keeps heads between rows where that fills whole tiles. With `middle` pieces are
    of outputs."""
    if inputs == 1 and len(shape) == 3:
        D, N, H = shape
        if N in (2, 4) or N % TILE == 0:
            return Weight(form="between", shape=(D * N, H), axis=0, between=N)
        return Weight(form="heads", shape=(N, D, H), axis=1)
    D, F = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    if F % LANES and D % LANES == 0:
        return Weight(form="turned", shape=(F, D), axis=0 if middle else 1)
    return Weight(form="rows", shape=(D, F), axis=1 if middle else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """What a kernel streams: `weights` of one length, of which a core has pieces of `size`, the
    last perhaps shorter, `slots` at a time."""

    weights: tuple[Weight, ...]
    cores: int
    size: int
    slots: int

    @property
    def length(self) -> int:
        return self.weights[0].length // self.cores

    @property
    def whole(self) -> int:
        return self.length // self.size

    @property
    def rest(self) -> int:
        return self.length % self.size

    @property
    def bytes(self) -> int:
        """Of all weights of a layer."""
        return sum(weight.bytes for weight in self.weights)

    def shapes(self) -> list:
        """Of its memory: a buffer for each weight, and semaphores."""
        buffers = [pltpu.VMEM((self.slots, *w.piece(self.size)), jnp.bfloat16)
                   for w in self.weights]  # fmt: skip
        return [*buffers, pltpu.SemaphoreType.DMA((len(self.weights), self.slots))]


def ring(weights: tuple[Weight, ...], *, rows: int, cores: int, divides: bool) -> Ring | None:
    """The ring of `weights` for so many `rows`, whose pieces have one size if it `divides`; None
    where a core's part cannot be cut."""
    length = weights[0].length // cores
    cut = LANES if cores > 1 or divides else PACKED
    if length % cut or any(w.length != cores * length for w in weights):
        return None
    each = sum(w.bytes for w in weights) // weights[0].length
    piece, unit = PIECE_BYTES[cores], LANES
    if rows <= FEW_ROWS:
        piece, unit = FEW_BYTES, HALF if weights[0].form == "turned" and not divides else LANES
    most = min(LONGEST, max(unit, piece // each // unit * unit))
    sizes = range(unit, min(most, length) + 1, unit)
    sizes = [size for size in sizes if length % size == 0 or not divides]
    if not sizes:
        return None
    size = sizes[-1]
    slots = min(max(2, RING_BYTES[cores] // (each * size)), -(-length // size))
    return Ring(weights=weights, cores=cores, size=size, slots=slots)
