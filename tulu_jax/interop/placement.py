"""One parameter between safetensors rows and the devices of a mesh.

In: each weight is cut by rows over all devices, so every process reads its own contiguous part of
every file once; the devices gather one weight at a time and each keeps its part of it, quantised
if that is asked for. Out: one layer at a time is brought into Hugging Face's axis order and
gathered to the host.
"""

import collections
import functools
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import Executor

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from tulu_jax.interop import bnb
from tulu_jax.interop.layout import Layout
from tulu_jax.interop.sources import Weights
from tulu_jax.quant import nf4
from tulu_jax.quant.nf4 import QuantConfig

READ_AHEAD = 4  # layers of one parameter on the host at a time


def read(
    files: Weights, layout: Layout, *, sharding: Sharding, pool: Executor
) -> Iterator[jax.Array]:
    """The weights of a parameter as they are in the files, in layer order, cut by rows."""
    shape = layout.hf_shape
    sharding = _row_sharding(sharding, shape[0])

    def rows(index) -> tuple[int, int]:
        return index[0].indices(shape[0])[:2]

    needed = set(map(rows, sharding.addressable_devices_indices_map(shape).values()))

    def blocks(name):
        return {block: files.rows(name, slice(*block)) for block in needed}

    def array(blocks):
        return jax.make_array_from_callback(shape, sharding, lambda index: blocks[rows(index)])

    return map(array, _ahead(pool, blocks, layout.names))


def _ahead(pool: Executor, read_one, names) -> Iterator:
    """`read_one` of each name, a few of them in advance."""
    names = iter(names)
    queue = collections.deque(
        pool.submit(read_one, name) for name in itertools.islice(names, READ_AHEAD)
    )
    while queue:
        yield queue.popleft().result()
        queue.extend(pool.submit(read_one, name) for name in itertools.islice(names, 1))


def load(
    files: Weights, layout: Layout, *, sharding: Sharding, dtype: str, pool: Executor
) -> jax.Array:
    """A parameter in our layout, `dtype` and `sharding`."""
    pieces = read(files, layout, sharding=sharding, pool=pool)
    if not layout.stacked:
        return _place(layout, sharding, dtype)(next(pieces))
    place = _place(layout, _of_one_layer(sharding), dtype)
    return _stack(map(place, pieces), len(layout.names), sharding)


def load_quantised(
    files: Weights,
    layout: Layout,
    *,
    shardings: dict[str, Sharding],
    dtype: str,
    quant: QuantConfig,
    pool: Executor,
) -> dict[str, jax.Array]:
    """The arrays of a parameter of all layers, which `shardings` places: each weight in `dtype`,
    quantised while it alone is whole."""
    pieces = read(files, layout, sharding=shardings["codes"], pool=pool)
    parts = {name: _of_one_layer(sharding) for name, sharding in shardings.items()}
    place = _place(layout, parts["codes"], dtype, flat=True)
    quantise = _quantise(quant, tuple(parts.items()))
    return _stack(map(lambda piece: quantise(place(piece)), pieces), len(layout.names), shardings)


def load_packed(
    files: Weights, layout: Layout, *, shardings: dict[str, Sharding], pool: Executor
) -> dict[str, jax.Array]:
    """The arrays of a parameter of all layers, of weights that the files have in 4 bits.

    Raises `UsageError` for a weight of another shape, and as `bnb.from_bnb`."""

    def kernel(weight):
        names = bnb.names(weight, double="offset" in shardings)
        tensors = {name: files.rows(name, slice(None)) for name in names if name in files.headers}
        return bnb.from_bnb(tensors, weight, shape=layout.hf_shape)

    def put(kernel):
        return {
            name: jax.make_array_from_callback(
                leaf.shape, _of_one_layer(shardings[name]), leaf.__getitem__
            )
            for name, leaf in kernel.items()
        }

    return _stack(map(put, _ahead(pool, kernel, layout.names)), len(layout.names), shardings)


def _stack(layers: Iterator, count: int, sharding):
    """`count` layers, arrays or dicts of them, one after the other on axis 0."""
    stack = None
    for number, layer in enumerate(layers):
        if stack is None:
            stack = jax.tree.map(
                lambda leaf, s: _zeros((count, *leaf.shape), leaf.dtype, s)(), layer, sharding
            )
        stack = jax.tree.map(
            lambda whole, leaf, s: _write(s)(whole, leaf, number),  # noqa: B023 -- used at once
            stack, layer, sharding,
        )  # fmt: skip
        jax.block_until_ready(stack)  # or pieces would queue up on the devices
    return stack


def gather(parameter, layout: Layout, *, layer: int, dtype: np.dtype) -> np.ndarray:
    """One Hugging Face weight of a parameter, on the host of every process.

    `parameter` is a `jax.Array`, or anything that is read by indexing and `numpy.asarray`, such as
    a memory map or a TensorStore handle of a checkpoint too large for this machine.
    """
    if not isinstance(parameter, jax.Array):
        weight = np.asarray(parameter[layer] if layout.stacked else parameter)
        return layout.host_to_hf(weight, dtype)
    weight = _take(layout, dtype)(parameter, layer)
    if not weight.is_fully_addressable:
        weight = multihost_utils.process_allgather(weight, tiled=True)
    return np.ascontiguousarray(weight)


def _row_sharding(sharding: Sharding, rows: int) -> Sharding:
    """Rows of a weight over as many devices of `sharding` as divide them."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    sizes, axes = sharding.mesh.shape, []
    for axis, size in sizes.items():
        if rows % math.prod([size, *(sizes[other] for other in axes)]) == 0:
            axes.append(axis)
    return NamedSharding(sharding.mesh, PartitionSpec(tuple(axes)))


def _of_one_layer(sharding: Sharding) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _whole(piece, sharding: Sharding):
    """`piece` on every device; the compiler does the same, with a warning, if it is left to it."""
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(piece, sharding)


# One small program a parameter, kept for the next call. All but `_quantise` only move data.


@functools.lru_cache(maxsize=64)
def _place(layout: Layout, sharding: Sharding, dtype: str, *, flat: bool = False):
    """A weight in our axis order; `flat`: as [in, out]."""

    def place(piece):
        weight = layout.to_ours(_whole(piece, sharding)).astype(dtype)
        return nf4.matrix(layout.path, weight) if flat else weight

    return jax.jit(place, out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _quantise(config: QuantConfig, shardings: tuple[tuple[str, Sharding], ...]):
    return jax.jit(lambda weight: nf4.quantise(weight, config), out_shardings=dict(shardings))


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype, sharding: Sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _write(sharding: Sharding):
    """Apart from `_place`: fused with a transpose, this is three times slower on CPU."""

    def write(stack, ours, layer):
        return jax.lax.dynamic_update_index_in_dim(stack, ours, layer, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _take(layout: Layout, dtype: np.dtype):
    def take(parameter, layer):
        if layout.stacked:
            parameter = jax.lax.dynamic_index_in_dim(parameter, layer, axis=0, keepdims=False)
        return layout.to_hf(parameter).astype(dtype)

    return jax.jit(take)
