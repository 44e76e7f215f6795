"""Products of a decoding step's few rows with stacked weights, as Pallas kernels for TPUs.

A step reads every weight once and multiplies little, so what counts is that HBM never waits. The
weights of all layers [L, ...] stay in HBM. A kernel copies one layer's piece by piece into a ring
in VMEM, a few pieces ahead of the products, and awaits all that it started.

`multiply` is a product with weights of the same inputs, in pieces of the contraction; `mlp` is
silu(x · gate) * (x · up) · down, in pieces of its middle. Both may normalise x first. Sums are
float32. On chips of two cores each has half of the contraction, or of the middle, as two devices
would, and rounds its sum.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from tulu_jax import chips
from tulu_jax.kernels.decode_rings import LANES, PACKED, Ring, Weight

COMPILED = ("v5e", "v5p", "v6e")  # for which the compiler took them
MOST_ROWS = 256  # with which it did
VALUES = 4 * chips.MIB  # of VMEM, beside scratch


def multiply(x, weights, layer, *, name: str, **how) -> jax.Array:
    """x · w of all `weights`, side by side: [B, F], as `_run` has it; `name` is that of the
    kernel."""
    return _run(_multiply, name, x, weights, layer, **how)


def mlp(x, weights, layer, *, name: str, **how) -> jax.Array:
    """silu(x · gate) * (x · up) · down of the three `weights`: [B, D], as `_run` has it."""
    return _run(_mlp, name, x, weights, layer, **how)


def _in(space):
    return pl.BlockSpec(memory_space=space)


def _stacks(ring: Ring, weights, interpret: bool) -> tuple[jax.Array, ...]:
    """The weights as they lie, which stay in HBM."""
    found = tuple(w.of(one) for w, one in zip(ring.weights, weights, strict=True))
    if interpret:
        return found
    return tuple(pltpu.with_memory_space_constraint(one, pltpu.HBM) for one in found)


def _run(
    body,
    name: str,
    x: Float[Array, "B D"],
    weights: tuple[Array, ...],
    layer: Int[Array, ""],
    *,
    ring: Ring,
    scale: jax.Array | None = None,
    eps: float = 0.0,
    interpret: bool,
) -> Float[Array, "B F"]:
    """The product with the weights of `layer`, in the dtype of x, bfloat16. With `scale` [D] x is
    normalised first."""
    B, D = x.shape
    x = jnp.pad(x, ((0, -B % PACKED), (0, 0)))
    rows, alone = x.shape[0], ring.cores == 1
    columns = sum(math.prod(w.shape) // D for w in ring.weights) if body is _multiply else D
    scale = None if scale is None else scale.astype(jnp.float32)[None]
    *buffers, semaphores = ring.shapes()
    held = [
        pltpu.VMEM((ring.whole, rows, ring.size) if body is _multiply else (1, rows, D), x.dtype),
        pltpu.VMEM((rows, columns), jnp.float32),
        *buffers,
    ]

    def kernel(layer, x, scale, own, out, normed, sums, *memory):
        stream = _Stream(ring, own, memory, layer[0], 0 if alone else pl.program_id(0))
        stream.begin()
        body(stream, functools.partial(_put, x, scale, eps), normed, sums)
        out[...] = sums[...].astype(out.dtype).reshape(out.shape)

    def whole(one):  # an operand in VMEM
        return _in(pltpu.VMEM) if alone else pl.BlockSpec(one.shape, lambda *_: (0, 0))

    own = _stacks(ring, weights, interpret)
    of_core = pl.BlockSpec((1, rows, columns), lambda core, *_: (core, 0, 0))
    out = pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=() if alone else (ring.cores,),
            in_specs=[
                whole(x),
                None if scale is None else whole(scale),
                (_in(pltpu.HBM),) * len(own),
            ],
            out_specs=_in(pltpu.VMEM) if alone else of_core,
            scratch_shapes=[*held, semaphores],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, columns) if alone else (2, rows, columns), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=None if alone else ("parallel",),
            vmem_limit_bytes=sum(math.prod(one.shape) * one.dtype.itemsize for one in held)
            + 4 * rows * (2 * D + 4 * columns)
            + VALUES,
        ),
        interpret=interpret,
    )(layer.astype(jnp.int32)[None], x, scale, own)
    if not alone:
        out = out.astype(jnp.float32).sum(0).astype(x.dtype)
    return out[:B]


def _put(x, scale, eps: float, put):
    """`put(rows, x)` for every 16 rows of x [rows, D]: as they are, or with `scale` [1, D] as
    `RMSNorm` makes them. In a loop, so that few values are alive."""

    def one(block, _):
        rows = pl.ds(pl.multiple_of(block * PACKED, PACKED), PACKED)
        part = x[rows, :]
        if scale is not None:
            wide = part.astype(jnp.float32)
            wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
            part = (wide * scale[...]).astype(x.dtype)
        put(rows, part)

    jax.lax.fori_loop(0, x.shape[0] // PACKED, one, None)


@dataclasses.dataclass(frozen=True)
class _Stream:
    """A layer of weights `sources` on its way through the memory of a ring."""

    ring: Ring
    sources: tuple
    memory: tuple
    layer: jax.Array
    core: jax.Array | int

    def buffer(self, which: int, slot, size: int):
        """The piece of weight number `which` in `slot`, of which `size` are filled."""
        ref, weight = self.memory[which], self.ring.weights[which]
        if size == self.ring.size:
            return ref.at[slot]
        return ref.at[(slot, *[slice(None)] * weight.axis, slice(0, size * weight.between))]

    def copies(self, piece, slot, size: int):
        first = self.core * self.ring.length + piece * self.ring.size
        if not isinstance(first, int):
            first = pl.multiple_of(first, LANES)
        for which, weight in enumerate(self.ring.weights):
            rows = pl.ds(first * weight.between, size * weight.between)
            part = (self.layer, *[slice(None)] * weight.axis, rows)
            yield pltpu.make_async_copy(
                self.sources[which].at[part],
                self.buffer(which, slot, size),
                self.memory[-1].at[which, slot],
            )

    def start(self, piece, slot, size: int):
        for copy in self.copies(piece, slot, size):
            copy.start()

    def begin(self):
        """Starts what the ring holds."""
        ring = self.ring
        for piece in range(ring.slots):
            self.start(piece, piece, ring.size if piece < ring.whole else ring.rest)

    def run(self, process):
        """`process(piece, slot, size)` for every piece as it has come, once the ring has begun."""
        ring = self.ring

        def of(piece, slot, size):
            for copy in self.copies(piece, slot, size):
                copy.wait()
            process(piece, slot, size)

        def step(piece, _):
            slot = jax.lax.rem(piece, ring.slots)
            of(piece, slot, ring.size)
            following = piece + ring.slots

            @pl.when(following < ring.whole)
            def _():
                self.start(following, slot, ring.size)

            if ring.rest:

                @pl.when(following == ring.whole)
                def _():
                    self.start(following, slot, ring.rest)

        jax.lax.fori_loop(0, ring.whole, step, None)
        if ring.rest:
            of(ring.whole, ring.whole % ring.slots, ring.rest)


def _multiply(stream: _Stream, put, normed, sums):
    ring = stream.ring

    def cut(rows, x):
        for piece in range(ring.whole):
            of_cores = [
                x[:, first : first + ring.size]
                for first in range(piece * ring.size, x.shape[1], ring.length)
            ]
            found = of_cores[0]
            for core in range(1, ring.cores):
                found = jnp.where(stream.core == core, of_cores[core], found)
            normed[piece, rows] = found

    put(cut)
    sums[...] = jnp.zeros_like(sums)

    def process(piece, slot, size):
        first = 0
        for which, weight in enumerate(ring.weights):
            for matrix in _matrices(weight, stream.buffer(which, slot, size)):
                turned = weight.form == "turned"
                wide = matrix.shape[0 if turned else 1]
                sums[:, first : first + wide] += _dot(normed[piece], matrix, turned=turned)
                first += wide

    stream.run(process)


def _mlp(stream: _Stream, put, normed, sums):
    def whole(rows, x):
        normed[0, rows] = x

    put(whole)
    sums[...] = jnp.zeros_like(sums)

    def process(piece, slot, size):
        del piece
        gate, up, down = (stream.buffer(which, slot, size)[...] for which in range(3))
        turned = stream.ring.weights[0].form == "turned"
        gate, up = (_dot(normed[0], one, turned=turned) for one in (gate, up))
        middle = (jax.nn.silu(gate) * up).astype(normed.dtype)
        sums[...] += _dot(middle, down, turned=False)

    stream.run(process)


def _dot(x, w, *, turned: bool):
    dims = (((1,), (1 if turned else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def _matrices(weight: Weight, piece):
    """The matrices [in, out] side by side in a piece that lies in the ref `piece`; [out, in] where
    it is turned."""
    if weight.form in ("rows", "turned"):
        return [piece[...]]
    if weight.form == "heads":
        return [piece[n] for n in range(weight.shape[0])]
    pairs, found = piece.bitcast(jnp.int32), []  # of heads, in a word
    for n in range(weight.between // 2):
        words = pairs[pl.ds(n, pairs.shape[0] * 2 // weight.between, weight.between // 2), :]
        found += [words << 16, words & np.int32(-65536)]
    return [pltpu.bitcast(words, jnp.float32).astype(jnp.bfloat16) for words in found]
