"""Vocabulary losses that never build [B, T, V] in float32, and the DPO loss.

The sequence is cut into chunks of positions and scanned; only one chunk's logits exist at a time.
A chunk takes every n-th position, not a run of neighbours, so that a sequence sharded over the
`context` axis stays where it is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Metrics = dict[str, jax.Array]


def _to_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [n, B, chunk, ...], zero-padded; chunk j has positions j, j + n, j + 2n..."""
    batch, length = x.shape[:2]
    n = -(-length // chunk)
    x = jnp.pad(x, [(0, 0), (0, n * chunk - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, chunk, n, *x.shape[2:]), 2, 0)


def _from_chunks(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_to_chunks`, cut to `length` positions."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _chunk_scores(hidden, unembedding, targets):
    """float32 logits [B, C, V], where the target is, log-sum-exp [B, C] and log-probs [B, C]."""
    logits = jnp.einsum("BCD,DV->BCV", hidden, unembedding, preferred_element_type=jnp.float32)
    vocabulary = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    is_target = targets[..., None] == vocabulary[None, None, :]
    log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
    logps = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - log_sum_exp
    return logits, is_target, log_sum_exp, logps


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_nll(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum of weight × −log p(target), float32; `weights` are constants.

    Under differentiation the forward pass already makes both gradients, chunk by chunk, because the
    weights are known: three vocabulary matrix multiplications in all and no recomputed logits.
    """
    unembedding = unembedding.astype(hidden.dtype)

    def body(total, inputs):
        h, t, w = inputs
        *_, logps = _chunk_scores(h, unembedding, t)
        return total - jnp.sum(w * logps), None

    chunks = tuple(_to_chunks(x, chunk) for x in (hidden, targets, weights))
    return jax.lax.scan(body, jnp.zeros(()), chunks)[0]


def _weighted_nll_forward(hidden, unembedding, targets, weights, chunk):
    kernel = unembedding.astype(hidden.dtype)

    def body(carry, inputs):
        total, d_kernel = carry
        h, t, w = inputs
        logits, is_target, log_sum_exp, logps = _chunk_scores(h, kernel, t)
        p = jnp.exp(logits - log_sum_exp[..., None])
        d_logits = ((p - is_target) * w[..., None]).astype(h.dtype)
        d_h = jnp.einsum("BCV,DV->BCD", d_logits, kernel)
        d_kernel += jnp.einsum("BCD,BCV->DV", h, d_logits, preferred_element_type=jnp.float32)
        return (total - jnp.sum(w * logps), d_kernel), d_h

    start = (jnp.zeros(()), jnp.zeros(unembedding.shape, jnp.float32))
    chunks = tuple(_to_chunks(x, chunk) for x in (hidden, targets, weights))
    (total, d_kernel), d_hidden = jax.lax.scan(body, start, chunks)
    d_hidden = _from_chunks(d_hidden, hidden.shape[1])
    return total, (d_hidden, d_kernel.astype(unembedding.dtype), targets.shape)


def _weighted_nll_backward(chunk, residuals, d_total):
    d_hidden, d_kernel, shape = residuals
    return (
        (d_hidden * d_total).astype(d_hidden.dtype),
        (d_kernel * d_total).astype(d_kernel.dtype),
        np.zeros(shape, jax.dtypes.float0),
        jnp.zeros(shape),
    )


weighted_nll.defvjp(_weighted_nll_forward, _weighted_nll_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logps(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    chunk: int,
) -> Float[Array, "B T"]:
    """log p(target) of every position, float32; the backward pass recomputes the logits."""
    return _token_logps_forward(hidden, unembedding, targets, chunk)[0]


def _token_logps_forward(hidden, unembedding, targets, chunk):
    kernel = unembedding.astype(hidden.dtype)

    def body(_, inputs):
        _, _, log_sum_exp, logps = _chunk_scores(inputs[0], kernel, inputs[1])
        return None, (logps, log_sum_exp)

    chunks = (_to_chunks(hidden, chunk), _to_chunks(targets, chunk))
    _, (logps, log_sum_exp) = jax.lax.scan(body, None, chunks)
    residuals = (hidden, unembedding, targets, log_sum_exp)
    return _from_chunks(logps, hidden.shape[1]), residuals


def _token_logps_backward(chunk, residuals, d_logps):
    hidden, unembedding, targets, log_sum_exp = residuals
    kernel = unembedding.astype(hidden.dtype)

    def body(d_kernel, inputs):
        h, t, lse, d = inputs
        logits, is_target, _, _ = _chunk_scores(h, kernel, t)
        p = jnp.exp(logits - lse[..., None])
        d_logits = ((is_target - p) * d[..., None]).astype(h.dtype)
        d_h = jnp.einsum("BCV,DV->BCD", d_logits, kernel)
        d_kernel += jnp.einsum("BCD,BCV->DV", h, d_logits, preferred_element_type=jnp.float32)
        return d_kernel, d_h

    chunks = tuple(_to_chunks(x, chunk) for x in (hidden, targets))
    chunks = (*chunks, log_sum_exp, _to_chunks(d_logps, chunk))
    d_kernel, d_hidden = jax.lax.scan(body, jnp.zeros(kernel.shape, jnp.float32), chunks)
    d_hidden = _from_chunks(d_hidden, hidden.shape[1])
    return d_hidden, d_kernel.astype(unembedding.dtype), np.zeros(targets.shape, jax.dtypes.float0)


token_logps.defvjp(_token_logps_forward, _token_logps_backward)


def sum_logps(logps: Float[Array, "B T"], loss_mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """Summed log-probability of the trained tokens of each row; masked ones get no gradient."""
    return jnp.sum(jnp.where(loss_mask, logps, 0.0), axis=-1)


def dpo_loss(
    chosen_logps: Float[Array, "B"],
    rejected_logps: Float[Array, "B"],
    ref_chosen_logps: Float[Array, "B"],
    ref_rejected_logps: Float[Array, "B"],
    *,
    beta: float,
) -> tuple[Float[Array, "B"], Metrics]:
    """Sigmoid DPO loss of each pair (Rafailov et al. 2023, eq. 7) over summed log-probabilities.

    The metrics, [B] each, are the implicit rewards β(log π − log π_ref), their margin, and whether
    the margin is positive (a tie is not a win).
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    return -jax.nn.log_sigmoid(margins), {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).astype(jnp.float32),
    }
