"""Products of a decoding step's few rows with stacked weights, as Pallas kernels for TPUs.

A step reads every weight once and multiplies little, so what counts is that HBM never waits. The
weights of all layers [L, ...] stay in HBM. A kernel copies one layer's piece by piece into rings in
VMEM, a few pieces ahead of the products. When it has started the last of its own, it starts the
first pieces of the next kernel's weights, in rings which that takes over while they are on their
way: sums over devices go on meanwhile.

`multiply` is a product with weights of the same inputs, in pieces of the contraction; `mlp` is
silu(x · gate) * (x · up) · down, in pieces of its middle. Both may normalise x first. Sums are
float32. On chips of two cores each has half of the contraction, or of the middle, as two devices
would, and rounds its sum; no ring is handed over, because each core has a memory of its own.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ahead:
    """What a kernel starts for the next one: its ring, its weights and its layer."""

    ring: Ring
    weights: tuple[jax.Array, ...]
    layer: jax.Array


def multiply(x, weights, layer, *, name: str, **how) -> tuple[jax.Array, tuple | None]:
    """x · w of all `weights`, side by side: [B, F], and the rest as `_run` has it; `name` is that
    of the kernel."""
    return _run(_multiply, name, x, weights, layer, **how)


def mlp(x, weights, layer, *, name: str, **how) -> tuple[jax.Array, tuple | None]:
    """silu(x · gate) * (x · up) · down of the three `weights`: [B, D], and the rest as `_run` has
    it."""
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
    begun: tuple | None = None,
    ahead: Ahead | None = None,
    scale: jax.Array | None = None,
    eps: float = 0.0,
    interpret: bool,
) -> tuple[Float[Array, "B F"], tuple | None]:
    """The product in the dtype of x, bfloat16, and what has begun of the ring `ahead`.

    With `scale` [D] x is normalised first. `begun` is what the kernel before gave for this ring.
    Of a layer behind the last nothing is started or multiplied, and the result is anything.
    """
    B, D = x.shape
    x = jnp.pad(x, ((0, -B % PACKED), (0, 0)))
    rows, alone = x.shape[0], ring.cores == 1
    columns = sum(math.prod(w.shape) // D for w in ring.weights) if body is _multiply else D
    scale = None if scale is None else scale.astype(jnp.float32)[None]
    scratch = [
        pltpu.VMEM((ring.whole, rows, ring.size) if body is _multiply else (1, rows, D), x.dtype),
        pltpu.VMEM((rows, columns), jnp.float32),
    ]
    held = sum(math.prod(one.shape) * one.dtype.itemsize for one in scratch)
    if begun is None:
        *buffers, semaphores = ring.shapes()
        held += sum(math.prod(one.shape) * one.dtype.itemsize for one in buffers)
        scratch += [*buffers, semaphores]

    def kernel(layers, x, scale, own, memory, others, out, buffers, following, normed, sums, *new):
        """`buffers` are the same as those of `memory`."""
        stream = _Stream(
            ring,
            own,
            new if begun is None else (*buffers, memory[-1]),
            layers[0],
            0 if alone else pl.program_id(0),
        )
        next_ = ahead and _Stream(ahead.ring, others, following, layers[1], 0)

        @pl.when(layers[0] < own[0].shape[0])
        def _():
            if begun is None:
                stream.begin()
            body(stream, next_, functools.partial(_put, x, scale, eps), normed, sums)
            out[...] = sums[...].astype(out.dtype).reshape(out.shape)

    def whole(one):  # an operand in VMEM
        return _in(pltpu.VMEM) if alone else pl.BlockSpec(one.shape, lambda *_: (0, 0))

    hbm, vmem, semaphore = _in(pltpu.HBM), _in(pltpu.VMEM), _in(pltpu.SEMAPHORE)
    own, memory, others, following = _stacks(ring, weights, interpret), begun or (), (), ()
    if ahead is not None:
        others = _stacks(ahead.ring, ahead.weights, interpret)
        following = tuple(ahead.ring.shapes())
    kept, first = memory[:-1], 2 + (scale is not None) + len(own)  # of the operands
    result = jax.ShapeDtypeStruct((rows, columns) if alone else (2, rows, columns), x.dtype)
    of_core = vmem if alone else pl.BlockSpec((1, rows, columns), lambda core, *_: (core, 0, 0))
    layers = [layer] if ahead is None else [layer, ahead.layer]
    out, _, started = pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=() if alone else (ring.cores,),
            in_specs=[
                whole(x),
                None if scale is None else whole(scale),
                (hbm,) * len(own),
                (*[vmem] * len(kept), semaphore) if memory else (),
                (hbm,) * len(others),
            ],
            out_specs=[
                of_core,
                (vmem,) * len(kept),
                (*[vmem] * (len(following) - 1), semaphore) if following else (),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[result, tuple(ring.shapes()[:-1]) if memory else (), following],
        input_output_aliases={first + n: 1 + n for n in range(len(kept))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=None if alone else ("parallel",),
            has_side_effects=bool(memory or following),
            vmem_limit_bytes=held + 4 * rows * (2 * D + 4 * columns) + VALUES,
        ),
        interpret=interpret,
    )(jnp.stack(layers).astype(jnp.int32), x, scale, own, memory, others)
    if not alone:
        out = out.astype(jnp.float32).sum(0).astype(x.dtype)
    return out[:B], started or None


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
        """Starts what a ring holds, of a layer that there is."""
        ring = self.ring

        @pl.when(self.layer < self.sources[0].shape[0])
        def _():
            for piece in range(ring.slots):
                self.start(piece, piece, ring.size if piece < ring.whole else ring.rest)

    def run(self, ahead: "_Stream | None", process):
        """`process(piece, slot, size)` for every piece as it has come, of a ring that has begun."""
        ring = self.ring
        count = ring.whole + (ring.rest > 0)
        if ahead and count <= ring.slots:
            ahead.begin()

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

            if ahead and count > ring.slots:

                @pl.when(following == count - 1)
                def _():
                    ahead.begin()

        jax.lax.fori_loop(0, ring.whole, step, None)
        if ring.rest:
            of(ring.whole, ring.whole % ring.slots, ring.rest)


def _multiply(stream: _Stream, ahead: _Stream | None, put, normed, sums):
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

    stream.run(ahead, process)


def _mlp(stream: _Stream, ahead: _Stream | None, put, normed, sums):
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

    stream.run(ahead, process)


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
