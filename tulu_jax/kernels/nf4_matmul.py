"""The product of activations with an NF4 weight, and the product of its gradient.

W is [K, N] = [in, out] in blocks of 64 along K. `codes` int32 [K/8, N] holds eight 4-bit codes a
word: bits 16h + 4q … + 3 of word (8b + r, n) are the code of row 64b + 16q + 2r + h, so a register
of words is one block of 64 rows by 128 columns and decodes to four registers of bfloat16 pairs in
the order of the rows. `scales` float32 [K/64, N] are the blocks' absolute maxima. A weight is
float32 codebook × float32 scale, rounded once to the dtype of the product.

On a TPU one kernel multiplies a tile of W by all rows while it decodes the next tile for the
matrix unit, so that decoding costs almost nothing beside many rows. The backward product is the
same kernel with the tile turned by the matrix unit. How a register is decoded depends on the chip
(`DECODERS`). Where the kernel does not go (`nf4_tiles.fit`), XLA decodes and multiplies.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from tulu_jax.kernels import nf4_tiles, target
from tulu_jax.quant.nf4 import CODEBOOK

BLOCK, LANES = nf4_tiles.BLOCK, nf4_tiles.LANES
SUBLANES = 8
PIECE = 256  # rows and columns of a product between which a part of the next tile is decoded


def matmul(
    x: Float[Array, "*rows K"], codes: Int32[Array, "K8 N"], scales: Float32[Array, "K64 N"]
) -> Float[Array, "*rows N"]:
    """x · W in the dtype of `x`, float32 sums; differentiable in `x` alone.

    The backward pass decodes again: no decoded weight is kept for it. Raises `ValueError` for
    shapes that do not belong together.
    """
    rows, columns = 8 * codes.shape[0], codes.shape[1]
    if x.shape[-1] != rows or scales.shape != (rows // BLOCK, columns) or rows % BLOCK:
        raise ValueError(
            f"x {x.shape}, codes {codes.shape} and scales {scales.shape} do not belong together: "
            f"expected [..., K], [K/8, N] and [K/{BLOCK}, N]"
        )
    return _matmul(x, codes, scales)


@jax.custom_vjp
def _matmul(x, codes, scales):
    return _product(x, codes, scales, backward=False)


def _matmul_forward(x, codes, scales):
    return _matmul(x, codes, scales), (codes, scales)


def _matmul_backward(residuals, gradient):
    return _product(gradient, *residuals, backward=True), None, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _product(x, codes, scales, *, backward):
    """x · W [..., N], or x · Wᵀ [..., K] backward."""
    chip, rows = target.chip(), math.prod(x.shape[:-1])
    out = 8 * codes.shape[0] if backward else codes.shape[1]
    tile = None
    if chip is not None and x.dtype == jnp.bfloat16:
        tile = nf4_tiles.fit(chip, rows=rows, contracted=x.shape[-1], out=out)
    if tile is None:
        return _by_xla(x, codes, scales, backward=backward)
    return run(x, codes, scales, tile=tile, backward=backward, interpret=False)


def _by_xla(x, codes, scales, *, backward):
    """Even and odd rows of W apart, as they lie in words; x is put in their order. On a CPU W is
    put in order instead, and the rows of x lie end to end, as `models/products.py` has them."""
    words = codes.reshape(1, -1, 1, SUBLANES, codes.shape[1])  # [h, K/64, q, r, N]
    shifts = (16 * np.arange(2)[:, None] + 4 * np.arange(4)).reshape(2, 1, 4, 1, 1)
    fields = lax.shift_right_logical(*jnp.broadcast_arrays(words, jnp.asarray(shifts, jnp.int32)))
    weights = (_looked_up(fields) * scales[None, :, None, None]).astype(x.dtype)
    weights = weights.reshape(2, -1, codes.shape[1])
    if target.platform() == "cpu":
        weights = weights.swapaxes(0, 1).reshape(-1, codes.shape[1])
        found = x.reshape(-1, x.shape[-1]) @ (weights.T if backward else weights)
        return found.reshape(*x.shape[:-1], -1)
    if backward:
        pairs = jnp.einsum("...N,HKN->...KH", x, weights)
        return pairs.reshape(*x.shape[:-1], -1)
    return jnp.einsum("...KH,HKN->...N", x.reshape(*x.shape[:-1], -1, 2), weights)


def _looked_up(fields):
    """float32 codebook values of int32 fields whose low four bits are codes, by a tree of choices:
    vector units have no cheap gather."""

    def choose(low, high, bit):
        if high - low == 1:
            return jnp.float32(CODEBOOK[low])
        middle = (low + high) // 2
        set_ = (fields >> bit) & 1 != 0
        return jnp.where(set_, choose(middle, high, bit - 1), choose(low, middle, bit - 1))

    return choose(0, 16, 3)


# ---- what a grid step does ----


def _words(low, high, dtype):
    """Two registers rounded to `dtype` as the low and high halves of one of int32 words."""
    return pltpu.bitcast(pltpu.pack_elementwise([low, high], packed_dtype=dtype), jnp.int32)


def _shifted(words, bits):
    return lax.shift_right_logical(words, jnp.int32(bits)) if bits else words


def _take(table, index, axis):
    """`jnp.take_along_axis` for an index in bounds, of any integer type: that of newer jax widens
    the index to int32, which a byte gather refuses, and spends cycles on negative ones."""
    along = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=(1 - axis,),
        start_indices_batching_dims=(1 - axis,),
    )
    return lax.gather(
        table,
        index.reshape(*index.shape, 1),
        along,
        slice_sizes=(1, 1),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def _decode_sublanes(words, scale, table):
    """v5e, v5p: a table of pairs of scaled weights (T[i], T[i + 8]) for each column, looked up by
    the low three bits of a code; the fourth chooses the half."""
    pairs = _words(table[0] * scale, table[1] * scale, jnp.bfloat16)

    def half(bits):
        high = bits + 3  # the bit that chooses, moved to 16
        amount = (words << (4 - high) if high < 4 else _shifted(words, high - 4)) & 16
        return lax.shift_right_logical(_take(pairs, _shifted(words, bits) & 7, 0), amount)

    return [_words(half(4 * q), half(16 + 4 * q), jnp.int16) for q in range(4)]


def _decode_bytes(words, scale, table):
    """v6e, tpu7x: a register holds the 16 scaled weights of a column as 32 bytes, and a byte gather
    takes both bytes of a weight at 2c and 2c + 1."""
    pairs = pltpu.bitcast(_words(table[0] * scale, table[1] * scale, jnp.bfloat16), jnp.int8)
    ones = np.array(0xFF00FF00, np.uint32).view(np.int32)
    odd = pltpu.bitcast(jnp.full((SUBLANES, LANES), ones, jnp.int32), jnp.int8) != jnp.int8(0)

    def looked_up(odd_bytes, even_bytes):
        index = jnp.where(
            odd, pltpu.bitcast(odd_bytes, jnp.int8), pltpu.bitcast(even_bytes, jnp.int8)
        )
        return pltpu.bitcast(_take(pairs, index, 0), jnp.int32)

    found = {}
    for q in range(2):
        low = (_shifted(words, 3) if q else words << 1) & 0x1E1E1E1E
        high = low | 0x01010101
        found[q] = looked_up(high << 8, low)
        found[q + 2] = looked_up(high, _shifted(low, 8))
    return [found[q] for q in range(4)]


def _decode_lanes(words, scale, table):
    """v4: the codebook along the lanes of a register, gathered, then scaled."""

    def half(bits):
        return _take(table[0], _shifted(words, bits) & 15, 1) * scale

    return [_words(half(4 * q), half(16 + 4 * q), jnp.bfloat16) for q in range(4)]


DECODERS = {"sublanes": _decode_sublanes, "bytes": _decode_bytes, "lanes": _decode_lanes}


def _table(decoder: str) -> np.ndarray:
    """float32 [2, 8, 128]: what a decoder looks up, before scaling."""
    values = CODEBOOK
    if decoder == "lanes":
        return np.broadcast_to(np.tile(values, LANES // 16), (2, SUBLANES, LANES))
    halves = [values[0::2], values[1::2]] if decoder == "bytes" else [values[:8], values[8:]]
    return np.broadcast_to(np.stack(halves)[:, :, None], (2, SUBLANES, LANES))


def accumulate(x, piece, acc, *, first, length, backward, beside=lambda n, of: None):
    """acc += x · W (or · Wᵀ) of one tile in pieces, of the first `length` of the contraction, from
    zero where `first`. `piece(rows, columns)` gives that part of W in bfloat16 for two pairs of
    bounds; `beside(n, of)` is called after product n."""
    rows, columns = acc.shape
    corners = [(h, g) for h in range(0, columns, PIECE) for g in range(0, rows, PIECE)]
    for n, (h, g) in enumerate(corners):
        wide, high = min(columns, h + PIECE), min(rows, g + PIECE)
        weights = piece((h, wide), (0, length)) if backward else piece((0, length), (h, wide))
        before = jnp.where(first, 0.0, acc[g:high, h:wide])
        acc[g:high, h:wide] = before + lax.dot_general(
            x[g:high, :length],
            weights,
            (((1,), (1 if backward else 0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        beside(n, len(corners))


def _kernel(x, codes, scales, table, out, acc, even, odd, *, tile, along, rest, backward):
    """Step (part, t, i): multiplies block i of rows by tile t - 1 while it decodes 1/`blocks` of
    tile t. There are `along` tiles along the contraction, the last `rest` long. The two buffers are
    named, not indexed, so that the compiler sees that they differ."""
    t, i = pl.program_id(1), pl.program_id(2)
    place = lax.rem(t + along - 1, along)  # of tile t - 1 along the contraction
    last = place == along - 1
    height, width = (tile.out, tile.contracted) if backward else (tile.contracted, tile.out)
    of_step = -(-height // BLOCK // tile.blocks)  # blocks of 64 rows that a step decodes
    work = [(b, c) for c in range(0, width, LANES) for b in range(of_step)]
    first = jnp.minimum(i * of_step, height // BLOCK - of_step)

    def decode(buffer, work):
        for b, c in work:
            lanes = slice(c, c + LANES)
            words = codes[pl.ds(pl.multiple_of(SUBLANES * (first + b), SUBLANES), SUBLANES), lanes]
            scale = jnp.broadcast_to(scales[first + b, :, lanes], (SUBLANES, LANES))
            decoded = DECODERS[tile.decoder](words, scale, table)
            for q in range(4):
                row = pl.multiple_of(32 * (first + b) + SUBLANES * q, SUBLANES)
                buffer[pl.ds(row, SUBLANES), lanes] = decoded[q]

    @pl.when(t == 0)
    def _():
        decode(even, work)

    lengths = {False: tile.contracted, True: rest} if rest != tile.contracted else {None: rest}
    for parity, read, write in ((1, even, odd), (0, odd, even)):
        for ends, length in lengths.items():
            here = (t > 0) & (lax.rem(t, 2) == parity)
            here = here if ends is None else here & (last == ends)

            @pl.when(here)
            def _(read=read, write=write, length=length):
                accumulate(
                    x,
                    lambda rows, columns: pltpu.bitcast(
                        read[rows[0] // 2 : rows[1] // 2, slice(*columns)], jnp.bfloat16
                    ),
                    acc.at[i],
                    first=place == 0,
                    length=length,
                    backward=backward,
                    beside=lambda n, of: decode(
                        write, work[n * len(work) // of : (n + 1) * len(work) // of]
                    ),
                )

    @pl.when(last & (t > 0))
    def _():
        out[...] = acc[i].astype(out.dtype)


def run(
    x: Float[Array, "*rows C"],
    codes: Int32[Array, "K8 N"],
    scales: Float32[Array, "K64 N"],
    *,
    tile: nf4_tiles.Tile,
    backward: bool,
    interpret: bool,
) -> Float[Array, "*rows O"]:
    """The kernel: x · W, or x · Wᵀ backward. `interpret` runs it as plain JAX, for tests."""
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    few = max(0, 2 * SUBLANES - x.shape[0])  # a register of bfloat16 has 16 rows
    x = jnp.pad(x, ((0, few), (0, 0)))
    contracted, out = shape[-1], (8 * codes.shape[0] if backward else codes.shape[1])
    along, across = pl.cdiv(contracted, tile.contracted), pl.cdiv(out, tile.out) // tile.shares
    count = along * across
    height, width = (tile.out, tile.contracted) if backward else (tile.contracted, tile.out)

    def of(p, t):
        """Tile t of part p: its place along the contraction, and across."""
        return lax.rem(t, along), lax.div(p, tile.bands) * across + lax.div(t, along)

    def at_weight(p, t, i):
        c, o = of(p, jnp.minimum(t, count - 1))
        return (o, c) if backward else (c, o)

    def at_scales(p, t, i):
        row, column = at_weight(p, t, i)
        return row, 0, column

    def at_rows(p, i):
        return lax.rem(p, tile.bands) * tile.blocks + i

    def at_x(p, t, i):
        return at_rows(p, i), of(p, jnp.maximum(t - 1, 0))[0]

    def at_out(p, t, i):  # stays until it is complete
        c, o = of(p, jnp.maximum(t - 1, 0))
        return at_rows(p, jnp.where((c == along - 1) & (t > 0), i, 0)), o

    result = pl.pallas_call(
        functools.partial(
            _kernel,
            tile=tile,
            along=along,
            rest=contracted - (along - 1) * tile.contracted,
            backward=backward,
        ),
        name="nf4_backward" if backward else "nf4_forward",
        out_shape=jax.ShapeDtypeStruct((x.shape[0], out), x.dtype),
        grid=(tile.bands * tile.shares, count + 1, tile.blocks),
        in_specs=[
            pl.BlockSpec((tile.rows, tile.contracted), at_x),
            pl.BlockSpec((height // 8, width), at_weight),
            pl.BlockSpec((height // BLOCK, 1, width), at_scales),
            pl.BlockSpec((2, SUBLANES, LANES), lambda p, t, i: (0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((tile.rows, tile.out), at_out),
        scratch_shapes=[
            pltpu.VMEM((tile.blocks, tile.rows, tile.out), jnp.float32),
            pltpu.VMEM((height // 2, width), jnp.int32),
            pltpu.VMEM((height // 2, width), jnp.int32),
        ],
        compiler_params=None
        if interpret
        else pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tile.vmem,
            disable_bounds_checks=True,
        ),
        interpret=interpret,
    )(x, codes, scales[:, None], jnp.asarray(_table(tile.decoder)))
    return result[: result.shape[0] - few].reshape(*shape[:-1], out)
