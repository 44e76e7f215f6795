"""The sums of `checkpoint_digests` and of `state`'s fingerprint, of arrays on the host.

XLA takes four times as long for them on a CPU, and compiles them for every shape. A block is worked
on in the caches of a core, and numpy lets other threads run.
"""

import dataclasses

import numpy as np

_BLOCK = 1 << 15  # values at a time
_U = np.uint32
_PLACE = np.arange(_BLOCK, dtype=_U)
_MIXED, _ODD = _PLACE * _U(0x9E3779B1), 2 * _PLACE + _U(1)
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
    limit = _INFINITE.get(array.dtype.name)
    totals, most = [0, 0, 0, 0], 0
    mixed, other, values = (np.empty(_BLOCK, _U) for _ in range(3))
    for begin in range(0, bits.size, _BLOCK):
        size = min(_BLOCK, bits.size - begin)
        m, t, b = mixed[:size], other[:size], values[:size]
        place = (first * bits.size + begin) % 2**32
        np.copyto(b, bits[begin : begin + size])
        np.add(_MIXED[:size], _U(place * 0x9E3779B1 % 2**32), out=m)
        np.bitwise_xor(m, b, out=m)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            np.right_shift(m, _U(shift), out=t)
            np.bitwise_xor(m, t, out=m)
            np.multiply(m, _U(factor), out=m)
        np.right_shift(m, _U(16), out=t)
        np.bitwise_xor(m, t, out=m)
        if limit is not None:
            np.bitwise_and(b, _U(limit), out=t)
            most = max(most, int(t.max()))
        np.add(_ODD[:size], _U(2 * place % 2**32), out=t)
        for index, summed in ((0, m), (2, b)):
            totals[index] += int(np.add.reduce(summed, dtype=_U))
            np.multiply(summed, t, out=summed)
            totals[index + 1] += int(np.add.reduce(summed, dtype=_U))
    a, b_, c, d = (total % 2**32 for total in totals)
    return Sums(digest=(a, b_), weights=(c, d), finite=limit is None or most != limit)
