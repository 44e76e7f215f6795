"""Chunked losses against full logits, and loss weights as tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_jax.objectives import losses, sft


def full_logps(hidden, kernel, targets):
    logps = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden, kernel), axis=-1)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]


def inputs(batch, length, embed=6, vocab=11):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(batch, length, embed)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(vocab, embed)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(batch, length)), jnp.float32)
    return hidden, kernel, targets, weights


@settings(max_examples=9, deadline=None)
@given(st.just(2), st.sampled_from([1, 6, 13]), st.sampled_from([1, 4, 16]))
def test_weighted_nll_equals_full_logits(batch, length, chunk):
    hidden, kernel, targets, weights = inputs(batch, length)

    def full(h, k):
        return -jnp.sum(weights * full_logps(h, k, targets)) * 1.7

    def chunked(h, k):
        return losses.weighted_nll(h, k, targets, weights, chunk) * 1.7

    expected, expected_grads = jax.jit(jax.value_and_grad(full, argnums=(0, 1)))(hidden, kernel)
    value, grads = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(chunked(hidden, kernel), expected, rtol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@settings(max_examples=9, deadline=None)
@given(st.just(2), st.sampled_from([1, 6, 13]), st.sampled_from([1, 4, 16]))
def test_token_logps_equal_full_logits(batch, length, chunk):
    hidden, kernel, targets, weights = inputs(batch, length)

    def scalar(logps):
        return jnp.sum(jnp.tanh(weights * logps))

    expected, expected_grads = jax.value_and_grad(
        lambda h, k: scalar(full_logps(h, k, targets)), argnums=(0, 1)
    )(hidden, kernel)
    value, grads = jax.value_and_grad(
        lambda h, k: scalar(losses.token_logps(h, k, targets, chunk)), argnums=(0, 1)
    )(hidden, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def as_the_original_reads(hidden, kernel, targets):
    """bfloat16 logits, log-softmax of them as they are, gather; run operation by operation."""
    with jax.disable_jit():
        hidden, kernel = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
        logits = jnp.einsum("BTD,VD->BTV", hidden, kernel)
        logps = jax.nn.log_softmax(logits, axis=-1)
        assert logps.dtype == jnp.bfloat16
        picked = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
    return picked.astype(jnp.float32)


@pytest.mark.parametrize("chunk", [4, 16])
def test_bfloat16_token_logps_round_where_the_original_does(chunk):
    """Values and gradients of the original's lines, in one piece and in chunks."""
    hidden, kernel, targets, weights = inputs(2, 13, embed=24, vocab=300)
    expected, pull = jax.vjp(lambda h, k: as_the_original_reads(h, k, targets), hidden, kernel)

    @jax.jit
    def ours(h, k):
        logps, pull = jax.vjp(lambda h, k: losses.bfloat16_token_logps(h, k, targets, chunk), h, k)
        return logps, pull(weights)

    logps, grads = ours(hidden, kernel)
    np.testing.assert_array_equal(logps, expected)
    exact = full_logps(hidden, kernel, targets)
    assert float(jnp.abs(logps - exact).mean()) > 5e-3  # not the float32 of the default
    for found, wanted, scale in zip(grads, pull(weights), (hidden, kernel), strict=True):
        # products of bfloat16 numbers, rounded to 8 bits once a chunk
        atol = 2**-7 * float(jnp.abs(wanted).max())
        np.testing.assert_allclose(found, wanted, atol=atol)
        assert found.dtype == scale.dtype


@pytest.mark.parametrize("loss", ["weighted_nll", "token_logps"])
def test_full_float32_logits_never_exist(loss):
    """No array of the compiled gradient holds B·T·V elements; one chunk's worth does."""
    batch, length, vocab, chunk = 2, 64, 512, 16
    hidden, kernel, targets, weights = inputs(batch, length, embed=8, vocab=vocab)

    def scalar(h, k):
        if loss == "weighted_nll":
            return losses.weighted_nll(h, k, targets, weights, chunk)
        return jnp.sum(weights * losses.token_logps(h, k, targets, chunk))

    jaxpr = jax.make_jaxpr(jax.grad(scalar, argnums=(0, 1)))(hidden, kernel)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
            for value in equation.params.values():
                for inner in jax.tree.leaves(
                    value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
                ):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from sizes(inner)

    largest = max(sizes(jaxpr.jaxpr))
    assert batch * chunk * vocab <= largest < batch * length * vocab


def test_token_norm_weighs_every_trained_token_alike():
    mask = jnp.asarray([[1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    weights = sft.token_weights(mask, norm="token", rows=2)
    np.testing.assert_allclose(weights, mask / 5, rtol=1e-6)


def test_paper_norm_is_the_mean_of_group_means():
    """Groups of two rows: 4 tokens in the first, 1 in the second; each group weighs a half."""
    mask = jnp.asarray([[1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    weights = sft.token_weights(mask, norm="paper", rows=2)
    expected = np.asarray(mask) * np.array([1 / 8, 1 / 8, 1 / 2, 1 / 2])[:, None]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
