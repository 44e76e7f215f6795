"""What is left to draw from, what is drawn, and settings that contradict each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax import validation
from tulu_jax.decode import continuation, sampling
from tulu_jax.decode.sampling import Sampling


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 0.4, [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (0, 0.6, [[0, 1, 0, 1], [1, 0, 0, 0]]),
        (0, 0.8, [[0, 1, 1, 1], [1, 0, 0, 0]]),
        (0, 1.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (1, 1.0, [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (3, 1.0, [[0, 1, 1, 1], [1, 1, 1, 1]]),  # as likely as the last of them
        (2, 0.7, [[0, 1, 0, 1], [1, 0, 0, 0]]),  # 0.5 of 0.75 does not reach it
        (9, 0.4, [[0, 1, 0, 0], [1, 0, 0, 0]]),
    ],
)
def test_what_is_kept(top_k, top_p, kept):
    logits = jnp.log(jnp.asarray([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])) + 3
    found = sampling.kept(logits, top_k=jnp.full(2, top_k), top_p=jnp.full(2, top_p))
    np.testing.assert_array_equal(found, np.asarray(kept, bool))


def test_draws_follow_the_tempered_distribution():
    """4,096 first tokens against the exact probabilities: within 5 standard errors."""
    logits = np.random.default_rng(2).normal(size=16).astype(np.float32) * 2
    rows = 4096
    draws, logps = sampling.choose(
        jnp.tile(jnp.asarray(logits)[None], (rows, 1)),
        temperature=jnp.full(rows, 0.7),
        top_p=jnp.full(rows, 0.9),
        top_k=jnp.zeros(rows, jnp.int32),
        keys=jax.random.key_data(jax.random.split(jax.random.key(3), rows)),
        count=jnp.zeros(rows, jnp.int32),
        min_new_tokens=jnp.zeros(rows, jnp.int32),
        stop_ids=jnp.full((rows, 1), -1),
        key_impl=jax.random.key_impl(jax.random.key(3)),
    )
    exact = np.exp(logits.astype(np.float64) / 0.7)
    exact /= exact.sum()
    order = np.argsort(-exact)
    kept = order[: np.searchsorted(np.cumsum(exact[order]), 0.9) + 1]
    expected = np.zeros(16)
    expected[kept] = exact[kept] / exact[kept].sum()
    found = np.bincount(np.asarray(draws), minlength=16) / rows
    assert found[expected == 0].sum() == 0
    error = np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(found - expected) <= 5 * error).all()
    # the model's own, at temperature 1 and over all tokens
    np.testing.assert_allclose(logps, jax.nn.log_softmax(logits)[draws], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(max_new_tokens=0), "max_new_tokens = 0"),
        (dict(min_new_tokens=9), "min_new_tokens = 9: expected 0 to max_new_tokens = 8"),
        (dict(temperature=-1.0), "temperature = -1.0"),
        (dict(temperature=1.0, top_p=0.0), "top_p = 0.0"),
        (dict(temperature=1.0, top_k=-1), "top_k = -1"),
        (dict(top_p=0.9), "top_p = 0.9 at temperature 0"),
        (dict(top_k=5), "top_k = 5 at temperature 0"),
        (dict(samples=2), "samples = 2 at temperature 0"),
        (dict(stop=("a", "")), "is empty"),
        (dict(stop=("x" * 300,)), "has 300 characters"),
        (dict(stop=("\ufffd",)), "would never be found"),
        (dict(stop_ids=(-1,)), "stop_ids"),
        (dict(temperature=float("nan")), "temperature"),
    ],
)
def test_settings_that_cannot_be(fields, said):
    with pytest.raises(validation.UsageError, match="1 problem") as refusal:
        Sampling(**dict(max_new_tokens=8) | fields)
    assert said in str(refusal.value)


def test_a_string_ends_a_text_where_it_is_first_complete():
    def spelled(ids):
        return "".join(["ab", "c", "de", "\ufffd", "\n\nU"][i] for i in ids)

    def stopped(ids, stop, fresh=2, least=0):
        return continuation.stopped(ids, fresh, stop, least, spelled)

    assert stopped([0, 1, 2], ["x"]) is None
    assert stopped([0, 1, 2, 0], ["bcd"], fresh=4) == (3, "a")
    assert stopped([0, 1, 2, 0], ["e", "bc"], fresh=4) == (2, "a")
    assert stopped([0, 1], ["b"], fresh=2, least=2) == (2, "a")
    assert stopped([0, 4], ["\n\n"]) == (2, "ab")


def test_what_may_still_change_is_held_back():
    assert continuation.settled("Hello\ufffd", []) == "Hello"
    assert continuation.settled("Hello\n", ["\n\nUser", "lox"]) == "Hello"
    assert continuation.settled("Hello lo", ["\n\nUser", "lox"]) == "Hello "
    assert continuation.settled("Hello", ["x"]) == "Hello"
