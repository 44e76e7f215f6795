"""Two chunks of a row for each device along `context`, so that causal attention is even.

A device with an equal run of a row's positions sees the more keys the later its run is. Here a row
is cut in 2C chunks, and device c of C computes chunks c and 2C - 1 - c: what one sees less the
other sees more (as in zig-zag ring attention). Only what runs between `inputs` and hidden states
knows: rows come as they are, hidden states leave as they came, and keys are put in order where they
are gathered. Documents stay exact, as every query keeps its place in the row.
"""

import jax
import jax.numpy as jnp

from tulu_jax.parallel import sharding

LEAST = 128  # positions of a chunk: a block of a kernel's queries lies within one


def divides(length: int, context: int) -> bool:
    """Whether rows of `length` have two chunks of whole blocks for each of two devices or more."""
    return context > 1 and length % (2 * context * LEAST) == 0


def suits(length: int) -> bool:
    """Whether rows of `length` can be balanced inside `per_device`: chunks divide, and `tensor` is
    1 or even, so that it halves with them."""
    tensor = sharding.axis_size("tensor")
    return divides(length, sharding.axis_size("length")) and (tensor == 1 or tensor % 2 == 0)


def own(whole: jax.Array) -> jax.Array:
    """This device's chunks of a field [B, T, ...] of whole rows, [B, T / C, ...]."""
    context, index = sharding.axis_size("length"), sharding.axis_index("length")
    size = whole.shape[1] // (2 * context)
    starts = (index * size, (2 * context - 1 - index) * size)
    chunks = [jax.lax.dynamic_slice_in_dim(whole, start, size, axis=1) for start in starts]
    return jnp.concatenate(chunks, axis=1)


def offsets(length: int) -> jax.Array:
    """int32 [T / C]: the place in its row of each of this device's positions, less its index."""
    context, index = sharding.axis_size("length"), sharding.axis_index("length")
    size = length // (2 * context)
    late = jnp.arange(2 * size, dtype=jnp.int32) >= size
    return jnp.where(late, 2 * context - 2 - index, index).astype(jnp.int32) * size


def in_order(gathered: jax.Array) -> jax.Array:
    """[B, T, ...] of all devices' positions, a device after the other, in the order of the row."""
    context = sharding.axis_size("length")
    B, T, *rest = gathered.shape
    chunks = gathered.reshape(B, context, 2, -1, *rest)
    ordered = jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1)
    return ordered.reshape(B, T, *rest)


def back(x: jax.Array) -> jax.Array:
    """[B, T / (C · M), ...] of this device's positions between blocks, moved to the device along
    `context` and `tensor` (M) that has their equal run of the row."""
    context, tensor = sharding.axis_size("length"), sharding.axis_size("tensor")
    names = tuple(sharding.rule("positions", jax.sharding.get_abstract_mesh().axis_names))
    owners = [(k, 0) if k < context else (2 * context - 1 - k, 1) for k in range(2 * context)]
    if tensor > 1:  # a device has a part of one chunk
        half = tensor // 2
        moves = [
            (device * tensor + slot * half + n, k * half + n)
            for k, (device, slot) in enumerate(owners)
            for n in range(half)
        ]
        return jax.lax.ppermute(x, names, moves)
    even = sharding.axis_index("length") % 2 == 0
    early, late = jnp.split(x, 2, axis=1)
    sent = (
        jnp.where(even, early, late),
        jnp.where(even, late, early),
    )  # chunks of even number first
    came = [
        jax.lax.ppermute(
            chunk, names[0], [(owners[k][0], k // 2) for k in range(n, 2 * context, 2)]
        )
        for n, chunk in enumerate(sent)
    ]
    return jnp.concatenate(came, axis=1)
