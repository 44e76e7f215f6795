"""The sums of `checkpoint_digests` and of `state`'s fingerprint, of arrays on the host.

A loop over rows that fit in the caches of a core: of an array in one piece XLA takes four times as
long on a CPU. Threads run beside each other, which numpy's do not: in blocks that fit in the caches
they wait for the interpreter, and two are slower than one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

_LANES = 1024  # values of a row
_ROWS = 16, 4096  # of a block
_U = jnp.uint32
_INFINITE = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}  # bits of an exponent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """`digest` is `checkpoint_digests.sums`, `weights` is `state.leaf_sums`, each two numbers below
    2**32; `finite` tells whether every value is."""

    digest: tuple[int, int]
    weights: tuple[int, int]
    finite: bool


def of(array: np.ndarray, first: int = 0) -> Sums:
    """The sums of an array of 2 or 4 bytes a value, which is layer number `first` of a stacked one;
    integers are finite."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    return _of_blocks(array.dtype, bits.size, first, lambda begin, end: bits[begin:end])


@functools.lru_cache(maxsize=4096)
def of_constant(dtype: np.dtype, value: float | int, size: int, first: int = 0) -> Sums:
    """The sums of an array of `size` times the same value."""
    block = np.full(min(size, _ROWS[-1] * _LANES), value, dtype).view(f"u{dtype.itemsize}")
    return _of_blocks(dtype, size, first, lambda begin, end: block[: end - begin])


def _of_blocks(dtype: np.dtype, size: int, first: int, get) -> Sums:
    """Of `get(begin, end)`, block by block; few shapes of blocks are compiled."""
    limit = _INFINITE.get(dtype.name, 0)
    host = jax.sharding.Mesh(jax.local_devices(backend="cpu")[:1], ("host",))  # no run's
    found = []

    def add(bits: np.ndarray, begin: int, lanes: int, rows: tuple[int, ...]) -> None:
        count = np.int32(bits.size // lanes)
        room = next(room for room in rows if room >= count)
        if room > count:
            bits = np.concatenate([bits, np.zeros((room - count) * lanes, bits.dtype)])
        place = np.uint32((first * size + begin) % 2**32)
        found.append(_of_rows(bits.reshape(-1, lanes), count, place, limit=limit))

    step = _ROWS[-1] * _LANES
    with jax.set_mesh(host):
        for begin in range(0, size, step):
            end = min(begin + step, size)
            bits, rest = get(begin, end), end - (end - begin) % _LANES
            if rest > begin:
                add(bits[: rest - begin], begin, _LANES, _ROWS)
            if end > rest:
                add(bits[rest - begin :], rest, 1, (_LANES,))
    a, b, c, d = sum((np.asarray(sums) for sums, _ in found), np.zeros(4, np.uint32)).tolist()
    most = max((int(largest) for _, largest in found), default=0)
    return Sums(digest=(a, b), weights=(c, d), finite=not limit or most != limit)


@functools.partial(jax.jit, static_argnames="limit")
def _of_rows(rows: jax.Array, count: jax.Array, place: jax.Array, *, limit: int):
    """The four sums of the first `count` rows, whose first value has this place, and the largest of
    their bits in `limit`."""
    lanes = rows.shape[1]
    lane = jax.lax.iota(_U, lanes)

    def add(row, found):
        bits = rows[row].astype(_U)
        at = place + row.astype(_U) * _U(lanes) + lane
        mixed = bits ^ (at * _U(0x9E3779B1))
        mixed = (mixed ^ (mixed >> 16)) * _U(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * _U(0xC2B2AE35)
        mixed = mixed ^ (mixed >> 16)
        odd = 2 * at + 1
        sums, most = found
        more = mixed, mixed * odd, bits, bits * odd
        sums = tuple(total + one for total, one in zip(sums, more, strict=True))
        return sums, jnp.maximum(most, bits & _U(limit))

    none = jnp.zeros(lanes, _U)
    sums, most = jax.lax.fori_loop(0, count, add, ((none,) * 4, none))
    return jnp.stack([jnp.sum(total, dtype=_U) for total in sums]), jnp.max(most)
