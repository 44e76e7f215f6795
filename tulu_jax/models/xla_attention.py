"""Attention in plain XLA, as `attention.attend` chooses among: dense, triangular, blockwise.

B, T, S, N, K, G and H, and what a query sees, are those of `models/attention.py`. q is
[B, T, N, H], k and v [B, S, K, H]; statistics are float32 and results have the dtype of q.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tulu_jax.parallel.sharding import num_devices

MASKED = -1e30  # finite, so that a fully masked row has no NaN; exp(MASKED - max) is exactly 0
BLOCK = 512  # query and key rows of one tile of the blockwise form
TRIANGLE_BLOCK = 128  # query rows of one step of the triangular form


def visible_pairs(query_index, key_index, segments, kv_segments, branches, kv_branches):
    """bool [B, T, S]: the key is not later than the query, in its segment and branch or in the
    prompt, and not padding."""
    visible = segments[:, :, None] == kv_segments[:, None, :]
    visible &= (key_index[None, :] <= query_index[:, None])[None]
    visible &= (segments != 0)[:, :, None]
    if branches is not None:
        kv_branches = kv_branches[:, None, :]
        visible &= (kv_branches == 0) | (kv_branches == branches[:, :, None])
    return visible


def dense(q, k, v, visible):
    """The reference: all [T, S] scores at once."""
    (B, T, N, H), K = q.shape, k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    visible = visible[:, None, None]  # [B, 1, 1, T, S]
    scores = jnp.where(visible, scores * H**-0.5, MASKED)
    exp = jnp.where(visible, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    probabilities = exp / jnp.maximum(exp.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", probabilities.astype(v.dtype), v)
    return out.reshape(B, T, N, H)


def _named(*kept):
    """q, k, v, the output and the log-sum-exp under the names that remat policies keep."""
    names = ("attention_q", "attention_k", "attention_v", "attention_out", "attention_lse")
    return [checkpoint_name(x, name) for x, name in zip(kept, names, strict=True)]


def _rows(function, arguments):
    """`function` on each row of the batch: one after the other on one device, which keeps a row's
    scores in cache; all at once on a mesh, whose devices hold different rows."""
    if num_devices() == 1:
        return jax.lax.map(lambda row: function(*row), arguments)
    return jax.vmap(function)(*arguments)


@jax.custom_vjp
def triangular(q, k, v, bias):
    """Query blocks against the keys up to their end, unrolled: half of the scores are never made.

    `bias` float32 [B, T, S] is 0 where a key is visible and MASKED elsewhere; T = S.
    """
    return _triangular_forward(q, k, v, bias)[0]


def _triangular_forward(q, k, v, bias):
    (B, T, N, H), K = q.shape, k.shape[2]
    q = (q * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, H]
    q, k, v, out, log_sum_exp = _named(q, k, v, *_rows(_triangle_row, (q, k, v, bias)))
    result = out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return result, (q, k, v, bias, out, log_sum_exp)


def _products(a, b, contract_a, contract_b):
    """Batched matrix products over the leading axis, accumulated in float32."""
    dimensions = (((contract_a,), (contract_b,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _triangle_scores(q, k, bias, start, stop):
    """float32 [K, G, n, stop] of queries start:stop, and those queries [K, G·n, H]."""
    K, G, _, H = q.shape
    block = q[:, :, start:stop].reshape(K, -1, H)
    scores = _products(block, k[:, :stop], 2, 2).reshape(K, G, stop - start, stop)
    return scores + bias[None, None, start:stop, :stop], block


def _starts(T):
    return ((i, min(i + TRIANGLE_BLOCK, T)) for i in range(0, T, TRIANGLE_BLOCK))


def _triangle_row(q, k, v, bias):
    K, G, T, H = q.shape
    outs, log_sum_exps = [], []
    for start, stop in _starts(T):
        scores, _ = _triangle_scores(q, k, bias, start, stop)
        largest = scores.max(-1, keepdims=True)
        exp = jnp.exp(scores - largest)
        total = exp.sum(-1, keepdims=True)
        flat = exp.astype(v.dtype).reshape(K, -1, stop)
        out = _products(flat, v[:, :stop], 2, 1).reshape(K, G, stop - start, H)
        outs.append((out / total).astype(q.dtype))
        log_sum_exps.append(largest + jnp.log(total))
    return jnp.concatenate(outs, axis=2), jnp.concatenate(log_sum_exps, axis=2)


def _triangle_row_backward(q, k, v, bias, out, log_sum_exp, d_out):
    K, G, T, H = q.shape
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1, keepdims=True)
    dq, dk, dv = [], jnp.zeros((K, H, T)), jnp.zeros((K, H, T))
    for start, stop in _starts(T):
        scores, q_block = _triangle_scores(q, k, bias, start, stop)
        p = jnp.exp(scores - log_sum_exp[:, :, start:stop])
        d_block = d_out[:, :, start:stop].reshape(K, -1, H)
        dp = _products(d_block, v[:, :stop], 2, 2).reshape(p.shape)
        ds = (p * (dp - delta[:, :, start:stop])).astype(q.dtype).reshape(K, -1, stop)
        p = p.astype(q.dtype).reshape(K, -1, stop)
        dq.append(_products(ds, k[:, :stop], 2, 1).reshape(K, G, stop - start, H))
        # The small operand on the left: XLA:CPU runs the other order several times slower.
        dk = dk.at[..., :stop].add(_products(q_block, ds, 1, 1))
        dv = dv.at[..., :stop].add(_products(d_block, p, 1, 1))
    dq = jnp.concatenate(dq, axis=2).astype(q.dtype)
    return dq, dk.swapaxes(1, 2).astype(k.dtype), dv.swapaxes(1, 2).astype(v.dtype)


def _triangular_backward(residuals, d_out):
    q, k, v, bias, out, log_sum_exp = residuals
    B, K, G, T, H = q.shape
    d_out = d_out.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    dq, dk, dv = _rows(_triangle_row_backward, (q, k, v, bias, out, log_sum_exp, d_out))
    dq = (dq * H**-0.5).transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
    return dq, dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3), jnp.zeros_like(bias)


triangular.defvjp(_triangular_forward, _triangular_backward)


def _pad(x, length):
    """Zeros appended to axis 1 up to `length`."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _in_blocks(x, block):
    """[blocks, B, block, ...] of [B, T, ...], with zeros appended."""
    block = min(block, x.shape[1])
    x = _pad(x, -(-x.shape[1] // block) * block)
    return x.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)


def list_tiles(places, block=None, **ids):
    """The ids in blocks of `block` (None: BLOCK), the `places` int32 [T] of the queries among the
    keys likewise, and which key blocks each query block has to look at: `order` int32 [query
    blocks, key blocks], of which the first `counts` [query blocks] hold a visible key."""
    ids = {name: None if x is None else _in_blocks(x, block or BLOCK) for name, x in ids.items()}
    places = _in_blocks(places[None], block or BLOCK)[:, 0]
    blocks_k = ids["kv_segments"].shape[0]

    def needed(i):
        def holds(j):
            return _tile_visible(i, j, ids, places).any()

        holding = jax.vmap(holds)(jnp.arange(blocks_k))
        return jnp.argsort(~holding), holding.sum()

    order, counts = jax.lax.map(needed, jnp.arange(ids["segments"].shape[0]))
    return {"ids": ids, "places": places, "order": order, "counts": counts}


def blockwise(q, k, v, tiles):
    """Tiles of BLOCK x BLOCK with a running maximum (Milakov & Gimelshein 2018; Dao et al. 2022).

    Memory is one tile of scores a head. Tiles without a visible key are not computed.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    block_q, block_k = (tiles["ids"][name].shape[2] for name in ("segments", "kv_segments"))
    q = _in_blocks(q.reshape(B, T, K, N // K, H), block_q).transpose(0, 1, 3, 4, 2, 5)
    k, v = (_in_blocks(x, block_k).swapaxes(2, 3) for x in (k, v))  # [blocks, B, K, block, H]
    out = _tiles(q, k, v, tiles)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, N, H)[:, :T]


@jax.custom_vjp
def _tiles(q, k, v, tiles):
    return _tiles_forward(q, k, v, tiles)[0]


def _tile_visible(i, j, ids, places):
    """`visible_pairs` [B, block_q, block_k] of query block `i` and key block `j`."""
    block_k = ids["kv_segments"].shape[2]
    return visible_pairs(
        places[i],
        j * block_k + jnp.arange(block_k),
        segments=ids["segments"][i],
        kv_segments=ids["kv_segments"][j],
        branches=None if ids["branches"] is None else ids["branches"][i],
        kv_branches=None if ids["kv_branches"] is None else ids["kv_branches"][j],
    )


def _tile_scores(i, j, q_i, k_j, tiles):
    """Masked float32 scores [B, K, G, block_q, block_k] of one tile, and the mask."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_i, k_j, preferred_element_type=jnp.float32)
    visible = _tile_visible(i, j, tiles["ids"], tiles["places"])[:, None, None]
    return jnp.where(visible, scores * q_i.shape[-1] ** -0.5, MASKED), visible


def _tiles_forward(q, k, v, tiles):
    def query_block(i):
        def key_block(n, carry):
            acc, largest, total = carry
            j = tiles["order"][i, n]
            scores, visible = _tile_scores(i, j, q[i], k[j], tiles)
            new_largest = jnp.maximum(largest, scores.max(-1, keepdims=True))
            exp = jnp.where(visible, jnp.exp(scores - new_largest), 0.0)
            decay = jnp.exp(largest - new_largest)
            acc = acc * decay + jnp.einsum(
                "BKGTS,BKSH->BKGTH", exp.astype(v.dtype), v[j], preferred_element_type=jnp.float32
            )
            return acc, new_largest, total * decay + exp.sum(-1, keepdims=True)

        shape = q.shape[1:]
        start = (
            jnp.zeros(shape, jnp.float32),
            jnp.full((*shape[:-1], 1), MASKED, jnp.float32),
            jnp.zeros((*shape[:-1], 1), jnp.float32),
        )
        acc, largest, total = jax.lax.fori_loop(0, tiles["counts"][i], key_block, start)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (acc / total).astype(q.dtype), largest + jnp.log(total)

    q, k, v, out, log_sum_exp = _named(q, k, v, *jax.lax.map(query_block, jnp.arange(q.shape[0])))
    return out, (q, k, v, tiles, out, log_sum_exp)


def _tiles_backward(residuals, d_out):
    q, k, v, tiles, out, log_sum_exp = residuals
    f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scale = q.shape[-1] ** -0.5

    def query_block(dk_dv, i):
        d_out_i = d_out[i].astype(q.dtype)
        # sum_s p·dp of softmax's backward, from the outputs alone
        delta = (d_out[i].astype(jnp.float32) * out[i].astype(jnp.float32)).sum(-1, keepdims=True)

        def key_block(n, carry):
            dq, dk, dv = carry
            j = tiles["order"][i, n]
            scores, visible = _tile_scores(i, j, q[i], k[j], tiles)
            p = jnp.where(visible, jnp.exp(scores - log_sum_exp[i]), 0.0)
            dp = f32("BKGTH,BKSH->BKGTS", d_out_i, v[j])
            ds = (p * (dp - delta) * scale).astype(q.dtype)
            dq = dq + f32("BKGTS,BKSH->BKGTH", ds, k[j])
            # The small operand on the left: XLA:CPU runs the other order several times slower.
            dk = dk.at[j].add(f32("BKGTH,BKGTS->BKHS", q[i], ds))
            dv = dv.at[j].add(f32("BKGTH,BKGTS->BKHS", d_out_i, p.astype(v.dtype)))
            return dq, dk, dv

        start = (jnp.zeros(q.shape[1:], jnp.float32), *dk_dv)
        dq, dk, dv = jax.lax.fori_loop(0, tiles["counts"][i], key_block, start)
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros((*k.shape[:-2], k.shape[-1], k.shape[-2]), jnp.float32)
    (dk, dv), dq = jax.lax.scan(query_block, (zeros, zeros), jnp.arange(q.shape[0]))
    dk, dv = dk.swapaxes(-1, -2), dv.swapaxes(-1, -2)
    integers = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), tiles)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), integers


_tiles.defvjp(_tiles_forward, _tiles_backward)
