"""Vocabulary losses that never build [B, T, V] in float32.

The sequence is cut into chunks of positions and scanned; only one chunk's logits exist at a time.
On a mesh each device scores the positions it holds against the whole unembedding, gathered once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tulu_jax.models import llama
from tulu_jax.validation import Rule

Metrics = dict[str, jax.Array]


def rule(log_softmax_dtype: str, compute_dtype: str) -> Rule:
    """(holds, message if not): what `bfloat16_token_logps` asks of the model."""
    return (
        log_softmax_dtype != "bfloat16" or compute_dtype == "bfloat16",
        "log_softmax_dtype = 'bfloat16' takes the logits of a model that computes in bfloat16, "
        f"as the original's did; compute_dtype = {compute_dtype!r}. Set both, or neither",
    )


def _to_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [n, B, chunk, ...], zero-padded; chunk j has positions j, j + n, j + 2n..."""
    batch, length = x.shape[:2]
    chunk = min(chunk, length)
    n = -(-length // chunk)
    x = jnp.pad(x, [(0, 0), (0, n * chunk - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, chunk, n, *x.shape[2:]), 2, 0)


def _from_chunks(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_to_chunks`, cut to `length` positions."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _chunk_scores(hidden, unembedding, targets):
    """float32 of one chunk: exp(logits − max) [B, C, V], its sum, log-probs and targets' rows.

    The target's logit is a product with its own row of the unembedding: comparing every id with
    the target costs XLA:CPU as much as the softmax.
    """
    logits = jnp.einsum("BCD,VD->BCV", hidden, unembedding, preferred_element_type=jnp.float32)
    largest = logits.max(axis=-1, keepdims=True)
    exp = jnp.exp(logits - largest)
    total = exp.sum(axis=-1, keepdims=True)
    rows = unembedding[targets]  # [B, C, D]
    target = jnp.einsum("BCD,BCD->BC", hidden, rows, preferred_element_type=jnp.float32)
    return exp, total, target - (largest + jnp.log(total))[..., 0], rows


def _chunk_gradients(hidden, unembedding, exp, total, rows, d_logps):
    """Gradients of Σ d_logps · log p: of `hidden` [B, C, D], and of the unembedding's softmax part,
    transposed: float32 [D, V]. (`_target_gradient` adds the part of the targets' rows.)

    d logits = d_logps · (one_hot − softmax); the softmax's 1 / total goes into the small operands.
    """
    scale = d_logps[..., None] / total
    exp = exp.astype(hidden.dtype)
    spread = jnp.einsum("BCV,VD->BCD", exp, unembedding, preferred_element_type=jnp.float32)
    d_hidden = d_logps[..., None] * rows - scale * spread
    scaled = (hidden * scale).astype(hidden.dtype)
    d_kernel = jnp.einsum("BCD,BCV->DV", scaled, exp, preferred_element_type=jnp.float32)
    return d_hidden.astype(hidden.dtype), -d_kernel


def _target_gradient(d_kernel, hidden, targets, d_logps, dtype):
    """The unembedding's gradient [V, D]: the softmax part and each position's own row."""
    own = (hidden * d_logps[..., None]).astype(jnp.float32)
    return d_kernel.T.at[targets].add(own).astype(dtype)


def weighted_nll(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum of weight × −log p(target), float32; `weights` are constants.

    Under differentiation the forward pass already makes both gradients, chunk by chunk, because the
    weights are known: three vocabulary matrix multiplications in all and no recomputed logits.
    """
    score = functools.partial(_weighted_nll, chunk=chunk)
    return llama.over_positions(score, hidden, unembedding, targets, weights, add=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_nll(hidden, unembedding, targets, weights, chunk):
    kernel = unembedding.astype(hidden.dtype)

    def body(total, inputs):
        h, t, w = inputs
        _, _, logps, _ = _chunk_scores(h, kernel, t)
        return total - jnp.sum(w * logps), None

    chunks = tuple(_to_chunks(x, chunk) for x in (hidden, targets, weights))
    return jax.lax.scan(body, jnp.zeros(()), chunks)[0]


def _weighted_nll_forward(hidden, unembedding, targets, weights, chunk):
    kernel = unembedding.astype(hidden.dtype)

    def body(carry, inputs):
        loss, d_kernel = carry
        h, t, w = inputs
        exp, total, logps, rows = _chunk_scores(h, kernel, t)
        d_h, d_chunk = _chunk_gradients(h, kernel, exp, total, rows, -w)
        return (loss - jnp.sum(w * logps), d_kernel + d_chunk), d_h

    start = (jnp.zeros(()), jnp.zeros(kernel.shape[::-1], jnp.float32))
    chunks = tuple(_to_chunks(x, chunk) for x in (hidden, targets, weights))
    (loss, d_kernel), d_hidden = jax.lax.scan(body, start, chunks)
    d_unembedding = _target_gradient(d_kernel, hidden, targets, -weights, unembedding.dtype)
    return loss, (_from_chunks(d_hidden, hidden.shape[1]), d_unembedding, targets.shape)


def _weighted_nll_backward(chunk, residuals, d_loss):
    d_hidden, d_unembedding, shape = residuals
    return (
        (d_hidden * d_loss).astype(d_hidden.dtype),
        (d_unembedding * d_loss).astype(d_unembedding.dtype),
        np.zeros(shape, jax.dtypes.float0),
        jnp.zeros(shape),
    )


_weighted_nll.defvjp(_weighted_nll_forward, _weighted_nll_backward)


def token_logps(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    chunk: int,
) -> Float[Array, "B T"]:
    """log p(target) of every position, float32; the backward pass recomputes the logits."""
    score = functools.partial(_token_logps, chunk=chunk)
    return llama.over_positions(score, hidden, unembedding, targets, add=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_logps(hidden, unembedding, targets, chunk):
    kernel = unembedding.astype(hidden.dtype)

    def body(_, inputs):
        return None, _chunk_scores(inputs[0], kernel, inputs[1])[2]

    chunks = (_to_chunks(hidden, chunk), _to_chunks(targets, chunk))
    return _from_chunks(jax.lax.scan(body, None, chunks)[1], hidden.shape[1])


def _token_logps_forward(hidden, unembedding, targets, chunk):
    return _token_logps(hidden, unembedding, targets, chunk), (hidden, unembedding, targets)


def _token_logps_backward(chunk, residuals, d_logps):
    hidden, unembedding, targets = residuals
    kernel = unembedding.astype(hidden.dtype)

    def body(d_kernel, inputs):
        h, t, d = inputs
        exp, total, _, rows = _chunk_scores(h, kernel, t)
        d_h, d_chunk = _chunk_gradients(h, kernel, exp, total, rows, d)
        return d_kernel + d_chunk, d_h

    chunks = tuple(_to_chunks(x, chunk) for x in (hidden, targets, d_logps))
    start = jnp.zeros(kernel.shape[::-1], jnp.float32)
    d_kernel, d_hidden = jax.lax.scan(body, start, chunks)
    d_unembedding = _target_gradient(d_kernel, hidden, targets, d_logps, unembedding.dtype)
    d_hidden = _from_chunks(d_hidden, hidden.shape[1])
    return d_hidden, d_unembedding, np.zeros(targets.shape, jax.dtypes.float0)


_token_logps.defvjp(_token_logps_forward, _token_logps_backward)


def bfloat16_token_logps(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    chunk: int,
) -> Float[Array, "B T"]:
    """log p(target) as the original's DPO has it: logits in bfloat16, log-softmax in that dtype.

    Every operation rounds, as EasyLM's code reads (llama_train_dpo.py); sums over the vocabulary
    are float32, rounded once. What XLA kept in float32 between operations that it fused on their
    TPUs is unknown. The result is float32, for sums in float32.
    """
    score = functools.partial(_bfloat16_token_logps, chunk=chunk)
    return llama.over_positions(score, hidden, unembedding, targets, add=False)


def _bfloat16_token_logps(hidden, unembedding, targets, chunk):
    @jax.checkpoint
    def chunk_logps(h, t):
        # The cast inside: a gradient of the unembedding is added up over chunks in its own dtype.
        logits = jnp.einsum("BCD,VD->BCV", h, unembedding.astype(h.dtype))
        logits = _bfloat16(logits.astype(jnp.float32))
        largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        shifted = _bfloat16(logits - largest)
        total = _bfloat16(_bfloat16(jnp.exp(shifted)).sum(axis=-1))
        target = jnp.take_along_axis(shifted, t[..., None], axis=-1)[..., 0]
        return _bfloat16(target - _bfloat16(jnp.log(total)))

    chunks = (_to_chunks(hidden.astype(jnp.bfloat16), chunk), _to_chunks(targets, chunk))
    _, logps = jax.lax.scan(lambda _, inputs: (None, chunk_logps(*inputs)), None, chunks)
    return _from_chunks(logps, hidden.shape[1])


def _bfloat16(x: jax.Array) -> jax.Array:
    """float32 `x` rounded to bfloat16, and so its gradient. XLA drops casts there and back."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
