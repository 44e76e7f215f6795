"""Weights in four or eight bits: NF4 in blocks of 64 with nested scales (QLoRA, arXiv 2305.14314,
§3), as bitsandbytes computes them, and int8 by outputs.

A weight is W [K, N] = [in, out]; a block is 64 inputs of one output, which is 64 neighbours of the
row-major [out, in] weight that bitsandbytes cuts. Quantised it is a dict of arrays:

  codes    int32 [K/8, N]: bits 16h + 4q … + 3 of word (8b + r, n) are the code of row
           64b + 16q + 2r + h (q < 4, r < 8, h < 2), so that the words of a block decode to pairs of
           bfloat16 rows in their order; int8 [K, N] for int8
  absmax   float32 [K/64, N]; with nested scales their uint8 codes
  absmax2  float32 [G], with nested scales: of each 256 blocks in bitsandbytes' order, n K/64 + b
  offset   float32 [], with nested scales: the mean of the absolute maxima
  outmax   float32 [1, N], of int8 alone: the absolute maximum of each output

Whatever is rounded is rounded alike on every device and mesh: reciprocals and the mean are computed
in integers, and no product can be fused with the sum it goes into. A block below 2^-119 counts as
zeros.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tulu_jax import validation

BLOCK, GROUP = 64, 256  # weights that share a scale, and scales that share one
KINDS, MODES = ("nf4", "int8"), ("nearest", "bnb_cpu")
CODEBOOK = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
# The parameters that are quantised, by path.
LINEAR = re.compile(r"model/layers/(self_attn/[qkvo]|mlp/(gate|up|down))_proj/kernel")

_SHIFTS = np.array(  # [q, r, h]
    [[[16 * h + 4 * q for h in (0, 1)]] * 8 for q in range(4)], np.int32
)
_LIMBS = 6  # of 8 bits each: how precisely a mean is summed


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the weights of a frozen base are stored.

    `kind` is 'nf4' or 'int8'. `double` nests the scales of nf4; `mode` says how a scale gets its
    code: 'nearest' as bitsandbytes on CUDA, and so the paper, or 'bnb_cpu' by the table of its CPU
    library.
    """

    kind: str = "nf4"
    double: bool = True
    mode: str = "nearest"

    def __post_init__(self):
        validation.check(
            self,
            lambda: (
                validation.one_of("kind", self.kind, KINDS),
                validation.one_of("mode", self.mode, MODES),
            ),
        )


def quantise(weight: Float[Array, "K N"], config: QuantConfig) -> dict[str, Array]:
    """`weight`, float32 or bfloat16, as a dict of arrays.

    The absmax (nested: the offset; int8: the outmax) is not finite if the weight is not. Raises
    `UsageError` if K is no multiple of 64.
    """
    rows, outputs = weight.shape
    weight = weight.astype(jnp.float32)
    if config.kind == "int8":
        outmax = largest(weight, axis=0)[None]
        codes = jnp.round(weight * (127 * _reciprocal(outmax)))  # as torch divides a number
        return {"codes": codes.astype(jnp.int8), "outmax": outmax}
    if rows % BLOCK:
        raise validation.UsageError(
            f"a weight of {rows} inputs x {outputs} outputs cannot be cut into blocks of {BLOCK} "
            f"inputs; expected a multiple of {BLOCK}: use kind = 'int8', or train this base whole"
        )
    blocks = weight.reshape(rows // BLOCK, BLOCK, outputs)
    absmax = largest(blocks, axis=1)
    scaled = jnp.clip(blocks * _reciprocal(absmax)[:, None], -1, 1)
    thresholds = (CODEBOOK[:-1] + CODEBOOK[1:]) / 2
    codes = sum((scaled > threshold).astype(jnp.int32) for threshold in thresholds)
    kernel = {"codes": pack(codes.reshape(rows, outputs)), "absmax": absmax}
    return _nested(kernel, config.mode) if config.double else kernel


def pack(codes):
    """int32 codes [K, N], of JAX or NumPy, as words [K/8, N]."""
    rows, outputs = codes.shape
    words = codes.reshape(rows // BLOCK, *_SHIFTS.shape, outputs) << _SHIFTS[None, ..., None]
    return words.sum(axis=(1, 3), dtype="int32").reshape(rows // 8, outputs)


def unpack(words):
    """The codes [K, N] of words [K/8, N]."""
    rows, outputs = words.shape
    codes = words.reshape(rows // 8, 1, 8, 1, outputs) >> _SHIFTS[None, ..., None] & 15
    return codes.reshape(8 * rows, outputs)


def scales(
    kernel: dict[str, Array],
    *,
    rows: int | Array = 0,
    cols: int | Array = 0,
    blocks_per_output: int | None = None,
) -> Float[Array, "blocks N"]:
    """What the codes of each block are multiplied with, float32 [K/64, N] ([1, N] for int8).

    Of a shard `rows` is its first block, `cols` its first output and `blocks_per_output` K/64 of
    the whole weight; `absmax2` and `offset` are whole.
    """
    if "outmax" in kernel:
        return kernel["outmax"] * np.float32(1 / 127)
    absmax = kernel["absmax"]
    if "offset" not in kernel:
        return absmax
    blocks, outputs = absmax.shape
    per_output = blocks if blocks_per_output is None else blocks_per_output
    first = (cols + jnp.arange(outputs)) * per_output + rows  # of this shard, of each output
    groups = kernel["absmax2"].shape[0]
    nth = (first[None] % GROUP + jnp.arange(blocks)[:, None]) // GROUP  # of the groups met
    absmax2 = jnp.zeros(absmax.shape, jnp.float32)
    for group in range((GROUP + blocks - 2) // GROUP + 1):
        of_group = kernel["absmax2"][jnp.minimum(first // GROUP + group, groups - 1)]
        absmax2 = jnp.where(nth == group, of_group[None], absmax2)
    return _unfused(_dynamic(absmax) * absmax2, absmax2) + kernel["offset"]


def dequantise(kernel: dict[str, Array], scales: Array, dtype) -> Float[Array, "K N"]:
    """The weight in `dtype`: the float32 product of code value and scale, rounded once."""
    codes = kernel["codes"]
    if codes.dtype == jnp.int8:
        values = codes.astype(jnp.float32) * scales
    else:
        blocks = jnp.asarray(CODEBOOK)[unpack(codes)].reshape(-1, BLOCK, codes.shape[1])
        values = (blocks * scales[:, None]).reshape(-1, codes.shape[1])
    if dtype == jnp.bfloat16:  # XLA may drop a plain cast whose result is cast back
        values = jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return values.astype(dtype)


@jax.custom_vjp
def product(
    x: Float[Array, "*rows K"], codes: Array, scales: Float[Array, "blocks N"]
) -> Float[Array, "*rows N"]:
    """x · W by XLA, in the dtype of x; differentiable in x alone, and backward it decodes again."""
    return jnp.einsum("...K,KN->...N", x, dequantise({"codes": codes}, scales, x.dtype))


def _product_forward(x, codes, scales):
    return product(x, codes, scales), (codes, scales)


def _product_backward(kept, gradient):
    codes, scales = kept
    weight = dequantise({"codes": codes}, scales, gradient.dtype)
    return jnp.einsum("...N,KN->...K", gradient, weight), None, None


product.defvjp(_product_forward, _product_backward)


def quantise_params(params: dict, config: QuantConfig) -> dict:
    """`params` with every `LINEAR` kernel [L, …] quantised, layer by layer; the others as they are.

    Its shapes are those of `jax.eval_shape`. Raises `UsageError` as `quantise` does.
    """

    def leaf(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not LINEAR.fullmatch(name):
            return leaf
        return quantise_stack(name, leaf, config=config)

    return jax.tree.map_with_path(leaf, params)


def dequantise_params(params: dict, like: dict) -> dict:
    """`params` with every quantised kernel as an array again, of the shape and dtype it has in
    `like`, the abstract parameters of the model."""

    def walk(found, like):
        if not isinstance(like, dict):
            if not isinstance(found, dict):
                return found
            decode = jax.lax.map(lambda layer: dequantise(layer, scales(layer), like.dtype), found)
            return decode.reshape(like.shape)
        return {name: walk(found[name], like[name]) for name in like}

    return walk(params, like)


def quantise_stack(name: str, stack, *, config: QuantConfig) -> dict[str, Array]:
    """All layers of the kernel `name`, [L, ...]."""
    return jax.lax.map(lambda weight: quantise(matrix(name, weight), config), stack)


def divisible(sizes: dict[str, int], head_dim: int) -> dict[str, int]:
    """What may divide the logical axes of weights so that no block is cut: by `sizes` of the model,
    numbers whose divisors all may."""
    heads = math.gcd(sizes["heads"], sizes["heads"] * head_dim // BLOCK)
    return {"embed": sizes["embed"] // BLOCK, "mlp": sizes["mlp"] // BLOCK, "heads": heads}


def matrix(name: str, weight):
    """One layer of the parameter `name` as [in, out], with heads and their size as one axis."""
    if name.endswith("o_proj/kernel"):
        return weight.reshape(-1, weight.shape[-1])
    return weight.reshape(weight.shape[0], -1)


@functools.cache
def dynamic_map() -> np.ndarray:
    """What the 256 codes of a scale stand for, float32 [256]: bitsandbytes' `create_dynamic_map`.

    In order: 0, and on both sides of it seven decades, of 1, 2, 4, … 64 values; the last is 1.
    """
    with jax.ensure_compile_time_eval():
        return np.asarray(_dynamic(np.arange(256, dtype=np.uint8)))


def largest(x, axis: int):
    """Largest magnitude along `axis`; inf where something is not finite."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    found = jax.lax.bitcast_convert_type(bits.max(axis), jnp.float32)  # XLA's own drops NaN on CPUs
    found = jnp.where(found < 2.0**-119, 0, found)  # of these 127 / x would not be finite, and of
    return jnp.where(found < 2.0**126, found, jnp.inf)  # those from 2^126 1 / x not be normal


def _reciprocal(x):
    """float32 1 / x for x > 0, correctly rounded; 0 where x is 0 or inf.

    By long division: not every device divides exactly. There are no ties.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    below, exponent = bits & 0x7FFFFF | 0x800000, bits >> 23

    def digit(_, carry):
        quotient, rest = carry
        rest = 2 * rest
        one = rest >= below
        return 2 * quotient + one, jnp.where(one, rest - below, rest)

    start = jnp.zeros_like(bits), jnp.full_like(bits, 1 << 22)
    quotient, rest = jax.lax.fori_loop(0, 25, digit, start)  # 24 bits, or 25 of a power of two
    power = quotient >> 24
    quotient = (quotient >> power) + (2 * rest > below)
    result = ((252 - exponent + power) << 23) + quotient
    result = jax.lax.bitcast_convert_type(result, jnp.float32)
    return jnp.where((x > 0) & (x < jnp.inf), result, 0)


def _mean(x):
    """The mean of x ≥ 0, 48 bits below its largest value, as float32; not finite if x is not.

    Sums of integers do not depend on their order, so neither on how x lies on devices.
    """
    assert x.size <= 1 << 22, "sums of 8 bits each would not fit int32"
    most = x.max()
    bits = jax.lax.bitcast_convert_type(most, jnp.int32)
    up = jax.lax.bitcast_convert_type((253 << 23) - (bits & 0x7F800000), jnp.float32)
    rest, sums = x * up, []  # below 1
    for _ in range(_LIMBS):
        rest = 256 * rest
        limb = jnp.floor(rest)
        rest = rest - limb
        sums.append(limb.astype(jnp.int32).sum())
    for place in range(_LIMBS - 1, 0, -1):
        sums[place - 1] += sums[place] >> 8
        sums[place] &= 255
    left, limbs = 0, []
    for place in range(_LIMBS):
        left = 256 * left + sums[place]
        limbs.append(left // x.size)
        left %= x.size
    high, low = (
        (limbs[i] << 16 | limbs[i + 1] << 8 | limbs[i + 2]).astype(jnp.float32) for i in (0, 3)
    )
    down = jax.lax.bitcast_convert_type((bits & 0x7F800000) + (1 << 23), jnp.float32)
    mean = (high * 2.0**-24 + low * 2.0**-48) * down
    return jnp.where((most > 0) & (most < jnp.inf), mean, most)


def _nested(kernel: dict[str, Array], mode: str) -> dict[str, Array]:
    """`kernel` with its absmax as codes, groups of 256 and an offset."""
    blocks, outputs = kernel["absmax"].shape
    offset = _mean(kernel["absmax"])
    flat = (kernel["absmax"] - offset).T.reshape(-1)
    flat = jnp.pad(flat, (0, -flat.size % GROUP)).reshape(-1, GROUP)
    absmax2 = jnp.abs(flat).max(axis=1)
    scaled = jnp.clip(flat * _reciprocal(absmax2)[:, None], -1, 1)
    table = dynamic_map()
    thresholds = (table[:-1] + table[1:]) / 2
    if mode == "bnb_cpu":  # it looks up one of 65,536 equal steps
        steps = (-1 + 2 * np.arange(1 << 16) / 65535).astype(np.float32)
        thresholds = np.searchsorted(steps, thresholds, side="right").astype(np.float32) - 0.5
        scaled = jnp.where(absmax2[:, None] > 0, scaled, -1)  # of 0 / 0 it makes code 0
        step = (scaled + 1) * np.float32(0.5) * np.float32(65535)
        scaled = jnp.floor(_unfused(step, np.float32(65535)) + np.float32(0.5))
    codes = jnp.searchsorted(thresholds, scaled.reshape(-1), side="left").astype(jnp.uint8)
    codes = codes[: blocks * outputs].reshape(outputs, blocks).T
    return kernel | {"absmax": codes, "absmax2": absmax2, "offset": offset}


def _unfused(product, most):
    """`product`, which is at most `most`: a compiler cannot know that, nor fuse over it."""
    return jnp.minimum(product, most)


def _dynamic(codes):
    """The values of scale codes, bit for bit those of bitsandbytes, which takes from torch:
    means of neighbours of `linspace(0.1, 1)`. A table of 256 would be a gather, slow on a TPU."""
    signed = codes.astype(jnp.int32) - 127
    size = jnp.abs(signed)  # 2^d … 2^(d + 1) − 1 for decade d < 7
    bits = jax.lax.bitcast_convert_type(size.astype(jnp.float32), jnp.int32)
    place, width = bits >> 17 & 63, 64 >> jnp.clip((bits >> 23) - 127, 0, 6)

    def boundary(place):  # float32 of 0.1 + 0.9 place / 64, or from 1 downward as torch has it
        tenth, rise = 13421773 << 3, 15099494  # float32 of 0.1, and of 0.9 / 64, in 2^-30
        upward, downward = tenth + rise * place, (1 << 30) - rise * (64 - place)
        return jnp.where(place < 32, upward, downward).astype(jnp.float32) * 2.0**-31

    decade = jnp.full(codes.shape, np.float32(1e-6))
    for power in range(1, 7):
        decade = jnp.where(size >= 1 << power, np.float32(10.0 ** (power - 6)), decade)
    value = decade * (boundary(place) + boundary(place + width))
    value = jnp.where(size == 128, 1, jnp.where(size == 0, 0, value))
    return jnp.where(signed < 0, -value, value)
