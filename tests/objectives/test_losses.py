"""Chunked losses against full logits, loss weights as tables, and the facts of DPO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_jax.objectives import dpo, losses, sft


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


def test_dpo_is_log_two_at_the_reference():
    logps = jnp.asarray([-3.0, -50.0])
    loss, metrics = losses.dpo_loss(logps, logps - 7, logps, logps - 7, beta=0.1)
    np.testing.assert_allclose(loss, np.log(2) * np.ones(2), rtol=1e-6)
    assert not metrics["rewards/accuracies"].any()  # a tie is not a win


def test_dpo_swapping_sides_negates_the_margin():
    rng = np.random.default_rng(0)
    a, b, ref_a, ref_b = (jnp.asarray(rng.normal(size=5), jnp.float32) for _ in range(4))
    _, one = losses.dpo_loss(a, b, ref_a, ref_b, beta=0.3)
    _, two = losses.dpo_loss(b, a, ref_b, ref_a, beta=0.3)
    np.testing.assert_allclose(one["rewards/margins"], -two["rewards/margins"], rtol=1e-6)


def test_dpo_agrees_with_a_numpy_twin():
    rng = np.random.default_rng(1)
    policy_c, policy_r, ref_c, ref_r = rng.normal(size=(4, 6)) * 20
    margin = 0.1 * ((policy_c - ref_c) - (policy_r - ref_r))
    arrays = (jnp.asarray(x, jnp.float32) for x in (policy_c, policy_r, ref_c, ref_r))
    loss, metrics = losses.dpo_loss(*arrays, beta=0.1)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-margin)), rtol=2e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], margin, rtol=1e-5, atol=1e-6)
    assert np.array_equal(metrics["rewards/accuracies"], margin > 0)


def test_masked_tokens_get_no_gradient_even_if_not_finite():
    logps = jnp.asarray([[-1.0, -jnp.inf, -2.0]])
    mask = jnp.asarray([[True, False, True]])
    value, grad = jax.value_and_grad(lambda x: losses.sum_logps(x, mask).sum())(logps)
    assert value == -3 and np.array_equal(grad, [[1, 0, 1]])


def test_padding_pairs_weigh_nothing():
    batch = dpo.add_weights({"example": jnp.asarray([4, -1, 0, -1])}, dpo.DPOConfig())
    np.testing.assert_allclose(batch["weights"], [0.5, 0, 0.5, 0])
