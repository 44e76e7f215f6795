"""Causal attention over packed rows on NVIDIA GPUs: what `flash_attention` is on TPU, in Triton.

B batch, T queries, S keys, N query heads, K key/value heads, G = N/K, H head size; the same rule of
what is visible, and the same results for queries that see nothing.

`prepare` lists, once for a batch, the blocks of keys that each block of queries needs and the other
way round: first those in which everything is visible, which are worked without a mask, then the
rest. A program owns one block (of queries forward and for dQ, of keys for dK and dV) and walks its
list, so what nobody needs is neither read nor computed. The backward pass is two kernels (Dao 2023,
FlashAttention-2): nothing is summed by atomics, so gradients are the same bits every time, and the
program of a key block walks all G query heads that read it, so keys are never repeated.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from tulu_jax.kernels.flash_attention import (
    LARGEST_HEAD,
    LOG2E,
    MASKED,
    NN,
    NT,
    UNSEEING,
    codes,
    count_visible,
)

WHOLE, ACTIVE, FIRST = 0, 1, 2  # of a list: whole blocks, all blocks, where their numbers begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """A program owns `queries` rows forward and for dQ, `keys` rows for dK and dV, and walks the
    others `step` at a time, with so many warps and `stages` of loads in flight."""

    queries: int
    keys: int
    step: int
    warps: int
    stages: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["own", "prompt", "key", "position", "keys_of", "queries_of"],
    meta_fields=["tile", "queries", "keys"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What every layer needs to know of a batch, int32.

    Codes [B, T'] and [B, S'] (of `flash_attention.codes`), the place of each query among the keys
    [T'], and the lists: `keys_of` [B, blocks of queries, 2 + S'/step], `queries_of` [B, blocks of
    keys, 2 + T'/step]. (Fields are `Any`, because transformations put their own leaves here.)
    """

    own: Any
    prompt: Any
    key: Any
    position: Any
    keys_of: Any
    queries_of: Any
    tile: Tile
    queries: int
    keys: int


def tile_of(head_dim: int, dtype: jnp.dtype) -> Tile:
    """Blocks for this head size. Raises `ValueError` for a head or dtype that is not taken."""
    if not 0 < head_dim <= LARGEST_HEAD:
        raise ValueError(f"head size {head_dim}: expected 1 to {LARGEST_HEAD}")
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"attention operands are {dtype}; expected bfloat16, float16 or float32")
    if dtype == jnp.float32:  # without tensor cores: what registers hold
        return Tile(queries=32, keys=32, step=32, warps=4, stages=2)
    if head_dim > 128:
        return Tile(queries=64, keys=32, step=32, warps=8, stages=2)
    return Tile(queries=128, keys=64, step=64, warps=8, stages=2)


def _list(seen, whole):
    """int32 [B, i, 2 + j] from the counts `seen` [B, i, j], `whole` being that of a whole block."""
    kind = jnp.where(seen == whole, 0, jnp.where(seen > 0, 1, 2))
    order = jnp.argsort(kind, axis=2, stable=True)
    counts = [(kind <= n).sum(axis=2, keepdims=True) for n in (0, 1)]
    return jnp.concatenate([*counts, order], axis=2).astype(jnp.int32)


def prepare(
    *,
    segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    branches: Int[Array, "B T"] | None,
    kv_branches: Int[Array, "B S"] | None,
    query_offset: Int[Array, ""] | int,
    tile: Tile,
) -> Plan:
    """Lists the blocks of a batch for `tile`; query t is at position t + query_offset.

    Raises `ValueError` for segments or branches that are not integers or do not match in shape.
    """
    own, prompt, key = codes(
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        branches=branches,
        kv_branches=kv_branches,
        multiples=(math.lcm(tile.queries, tile.step), math.lcm(tile.keys, tile.step)),
    )
    position = query_offset + jnp.arange(own.shape[1], dtype=jnp.int32)
    small = math.gcd(tile.queries, tile.keys, tile.step)
    seen = count_visible(own, prompt, key, position=position, block_q=small, block_k=small)

    def counts(block_q, block_k):
        B, i, j = seen.shape
        q, k = block_q // small, block_k // small
        return seen.reshape(B, i // q, q, j // k, k).sum(axis=(2, 4))

    return Plan(
        own=own,
        prompt=prompt,
        key=key,
        position=position,
        keys_of=_list(counts(tile.queries, tile.step), tile.queries * tile.step),
        queries_of=_list(counts(tile.step, tile.keys).swapaxes(1, 2), tile.keys * tile.step),
        tile=tile,
        queries=segment_ids.shape[1],
        keys=kv_segment_ids.shape[1],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    """What the kernels are specialised on; `scale` is that of the logits."""

    tile: Tile
    branched: bool
    scale: float
    precision: lax.Precision
    interpret: bool


def _dot(a, b, dims, static):
    return lax.dot_general(a, b, dims, static.precision, preferred_element_type=jnp.float32)


def _walk(blocks, body, carry):
    """`body(masked, number, carry)` for every block of a list: the whole ones, then the others."""
    for masked, start, stop in ((False, 0, blocks[WHOLE]), (True, blocks[WHOLE], blocks[ACTIVE])):
        carry = lax.fori_loop(
            start, stop, lambda t, c, masked=masked: body(masked, blocks[FIRST + t], c), carry
        )
    return carry


def _rows(static, number):
    """The slice of block `number` of those that are walked."""
    return pl.ds(number * static.tile.step, static.tile.step)


def _seen(own, prompt, position, key, first_key, *, by_key):
    """bool [queries, keys] (or [keys, queries]) from codes and positions of both."""
    index = first_key + jnp.arange(key.shape[0], dtype=jnp.int32)

    def compare(query, key, relation):
        return (
            relation(query[None], key[:, None]) if by_key else relation(query[:, None], key[None])
        )

    seen = compare(own, key, jnp.equal)
    if prompt is not None:
        seen |= compare(prompt, key, jnp.equal)
    return seen & compare(position, index, jnp.greater_equal)


def _forward_kernel(blocks, own, position, key, *refs, static):
    """One block of queries of one head."""
    prompt, *refs = refs if static.branched else (None, *refs)
    q, k, v, out, lse = refs
    queries = q[...]
    codes_of = own[...], prompt[...] if static.branched else None, position[...]

    def step(masked, number, carry):
        acc, largest, total = carry
        keys = _rows(static, number)
        s = _dot(queries, k[keys], NT, static) * (LOG2E * static.scale)  # [block, step]
        if masked:
            seen = _seen(*codes_of, key[keys], number * static.tile.step, by_key=False)
            s = jnp.where(seen, s, MASKED)
        new = jnp.maximum(largest, s.max(axis=1))
        # A row that has seen nothing yet has MASKED for its largest; exp2(MASKED - 0) is 0.
        shift = jnp.where(new == MASKED, 0.0, new)
        p = jnp.exp2(s - shift[:, None])
        decay = jnp.exp2(largest - shift)
        acc = acc * decay[:, None] + _dot(p.astype(v.dtype), v[keys], NN, static)
        return acc, new, total * decay + p.sum(axis=1)

    rows = queries.shape[0]
    start = (
        jnp.zeros(queries.shape, jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    acc, largest, total = _walk(blocks, step, start)
    seeing = total > 0
    total = jnp.where(seeing, total, 1.0)
    out[...] = (acc / total[:, None]).astype(out.dtype)
    lse[...] = jnp.where(seeing, largest + jnp.log2(total), UNSEEING)


def _dq_kernel(blocks, own, position, key, *refs, static):
    """The gradient of one block of queries of one head."""
    prompt, *refs = refs if static.branched else (None, *refs)
    q, k, v, d_out, lse, delta, dq = refs
    queries, d_rows = q[...], d_out[...]
    lse_rows, delta_rows = lse[...][:, None], delta[...][:, None]
    codes_of = own[...], prompt[...] if static.branched else None, position[...]

    def step(masked, number, dq):
        keys = _rows(static, number)
        s = _dot(queries, k[keys], NT, static) * (LOG2E * static.scale)
        if masked:
            seen = _seen(*codes_of, key[keys], number * static.tile.step, by_key=False)
            s = jnp.where(seen, s, MASKED)
        p = jnp.exp2(s - lse_rows)
        ds = p * (_dot(d_rows, v[keys], NT, static) - delta_rows)
        return dq + _dot(ds.astype(k.dtype), k[keys], NN, static)

    found = _walk(blocks, step, jnp.zeros(queries.shape, jnp.float32))
    dq[...] = (found * static.scale).astype(dq.dtype)


def _dkv_kernel(blocks, own, position, key, *refs, static):
    """The gradients of one block of keys and values, from all query heads that read it."""
    prompt, *refs = refs if static.branched else (None, *refs)
    q, k, v, d_out, lse, delta, dk, dv = refs
    keys, values, key_codes = k[...], v[...], key[...]
    first_key = pl.program_id(0) * static.tile.keys

    def head(g, carry):
        def step(masked, number, carry):
            dk, dv = carry
            rows = _rows(static, number)
            q_rows, d_rows = q[rows, g], d_out[rows, g]
            s = _dot(keys, q_rows, NT, static) * (LOG2E * static.scale)  # [block, step]
            if masked:
                prompts = prompt[rows] if static.branched else None
                at = own[rows], prompts, position[rows]
                s = jnp.where(_seen(*at, key_codes, first_key, by_key=True), s, MASKED)
            p = jnp.exp2(s - lse[g, rows][None])
            dv = dv + _dot(p.astype(d_rows.dtype), d_rows, NN, static)
            ds = p * (_dot(values, d_rows, NT, static) - delta[g, rows][None])
            return dk + _dot(ds.astype(q_rows.dtype), q_rows, NN, static), dv

        return _walk(blocks, step, carry)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    dk_sum, dv_sum = lax.fori_loop(0, q.shape[1], head, (zeros, zeros))
    dk[...] = (dk_sum * static.scale).astype(dk.dtype)
    dv[...] = dv_sum.astype(dv.dtype)


def _call(kernel, name, static, *, grid, in_specs, out_specs, out_shape):
    return pl.pallas_call(
        functools.partial(kernel, static=static),
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=None
        if static.interpret
        else plgpu.CompilerParams(num_warps=static.tile.warps, num_stages=static.tile.stages),
        interpret=static.interpret,
    )


def _codes_of(plan, by_key):
    """The lists, codes and positions with their windows: one block's where it is owned."""
    block = plan.tile.keys if by_key else plan.tile.queries
    lists = plan.queries_of if by_key else plan.keys_of
    prompts = () if plan.prompt is None else (plan.prompt,)
    last = 0 if by_key else lists.shape[1] - 1

    def place(i):  # long blocks first: the last queries have most keys, the first keys most queries
        return i if by_key else last - i

    def window(length, owned):
        if owned:
            return pl.BlockSpec((None, block), lambda i, n, b: (b, place(i)))
        return pl.BlockSpec((None, length), lambda i, n, b: (b, 0))

    T, S = plan.own.shape[1], plan.key.shape[1]
    positions = (
        pl.BlockSpec((T,), lambda i, n, b: (0,))
        if by_key
        else pl.BlockSpec((block,), lambda i, n, b: (place(i),))
    )
    arrays = (lists, plan.own, plan.position, plan.key, *prompts)
    specs = [
        pl.BlockSpec((None, None, lists.shape[2]), lambda i, n, b: (b, place(i), 0)),
        window(T, not by_key),
        positions,
        window(S, by_key),
        *[window(T, not by_key) for _ in prompts],
    ]
    return arrays, specs, place


def _query_specs(plan, H, group):
    """Windows of a program that owns queries: its rows, its keys and values, its statistics."""
    block, S = plan.tile.queries, plan.key.shape[1]
    arrays, specs, place = _codes_of(plan, by_key=False)
    row = pl.BlockSpec((None, block, None, H), lambda i, n, b: (b, place(i), n, 0))
    keys = pl.BlockSpec((None, S, None, H), lambda i, n, b: (b, 0, n // group, 0))
    statistic = pl.BlockSpec((None, None, block), lambda i, n, b: (b, n, place(i)))
    return arrays, specs, row, keys, statistic


def _forward(q, k, v, plan, static):
    """out [B, T', N, H] and log2-sum-exp2 float32 [B, N, T']."""
    (B, T, N, H), K = q.shape, k.shape[2]
    arrays, specs, row, keys, statistic = _query_specs(plan, H, N // K)
    return _call(
        _forward_kernel,
        "flash_forward_gpu",
        static,
        grid=(T // plan.tile.queries, N, B),
        in_specs=[*specs, row, keys, keys],
        out_specs=(row, statistic),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ),
    )(*arrays, q, k, v)


def _backward(q, k, v, lse, delta, d_out, plan, static):
    """dq [B, T', N, H], dk and dv [B, S', K, H]."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    block, group = plan.tile.keys, N // K
    arrays, specs, row, keys, statistic = _query_specs(plan, H, group)
    dq = _call(
        _dq_kernel,
        "flash_dq_gpu",
        static,
        grid=(T // plan.tile.queries, N, B),
        in_specs=[*specs, row, keys, keys, row, statistic, statistic],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(*arrays, q, k, v, d_out, lse, delta)
    arrays, specs, _ = _codes_of(plan, by_key=True)
    row = pl.BlockSpec((None, block, None, H), lambda j, n, b: (b, j, n, 0))
    queries = pl.BlockSpec((None, T, group, H), lambda j, n, b: (b, 0, n, 0))
    statistics = pl.BlockSpec((None, group, T), lambda j, n, b: (b, n, 0))
    dk, dv = _call(
        _dkv_kernel,
        "flash_dkv_gpu",
        static,
        grid=(S // block, K, B),
        in_specs=[*specs, queries, row, row, queries, statistics, statistics],
        out_specs=(row, row),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
    )(*arrays, q, k, v, d_out, lse, delta)
    return dq, dk, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, plan, static):
    return _attention_forward(q, k, v, plan, static)[0]


def _attention_forward(q, k, v, plan, static):
    out, lse = _forward(q, k, v, plan, static)
    names = ("attention_q", "attention_k", "attention_v", "attention_out", "attention_lse")
    kept = (checkpoint_name(x, n) for x, n in zip((q, k, v, out, lse), names, strict=True))
    q, k, v, out, lse = kept
    return (out, lse), (q, k, v, plan, out, lse)


def _attention_backward(static, residuals, cotangents):
    q, k, v, plan, out, lse = residuals
    d_out, d_lse = cotangents
    # sum_s p·dp of softmax's backward, from the outputs alone
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    delta -= d_lse * LOG2E
    grads = _backward(q, k, v, lse, delta, d_out.astype(q.dtype), plan, static)
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), plan)
    return (*grads, nothing)


_attention.defvjp(_attention_forward, _attention_backward)


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    plan: Plan,
    *,
    interpret: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention in the dtype of `q`, and the float32 log-sum-exp of each query's logits.

    Logits are q·k / sqrt(H). A query that sees nothing gives zeros and a log-sum-exp of -inf.
    float32 inputs are multiplied in float32, 16-bit ones with float32 sums. Both results are
    differentiable. `interpret` runs the kernels as plain JAX, for tests. Raises `ValueError` for
    shapes that do not belong together.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} axes, shape {x.shape}; expected 4")
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape != (B, S, K, H) or N % K:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not belong together: expected "
            "[B, T, N, H] and twice [B, S, K, H] with N a multiple of K"
        )
    if (plan.own.shape[0], plan.queries, plan.keys) != (B, T, S):
        raise ValueError(
            f"the plan is for {plan.own.shape[0]} rows of {plan.queries} queries and {plan.keys} "
            f"keys; found {B} rows of {T} and {S}"
        )
    static = _Static(
        tile=plan.tile,
        branched=plan.prompt is not None,
        scale=H**-0.5,
        precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT,
        interpret=interpret,
    )
    pad_H = max(16, pl.next_power_of_2(H)) - H  # what Triton's products take
    pad_T, pad_S = plan.own.shape[1] - T, plan.key.shape[1] - S
    q = jnp.pad(q, ((0, 0), (0, pad_T), (0, 0), (0, pad_H)))
    k, v = (jnp.pad(x, ((0, 0), (0, pad_S), (0, 0), (0, pad_H))) for x in (k, v))
    out, lse = _attention(q, k, v, plan, static)
    out, lse = out[:, :T, :, :H], lse[:, :, :T]
    return out, jnp.where(lse < UNSEEING, lse / LOG2E, -jnp.inf)
