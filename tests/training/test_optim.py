"""Runs whose updates would train nothing are told apart from those that do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.training import optim


def config(ratio, **values):
    return optim.OptimizerConfig(warmup_ratio=ratio, **({"learning_rate": 5e-7} | values))


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.1, 0.5, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 100])
def test_refused_is_what_never_reaches_its_rate(ratio, num_steps):
    schedule = optim.schedule(config(ratio), num_steps)
    highest = max(float(schedule(i)) for i in range(num_steps))
    refused = list(optim.problems(config(ratio), num_steps))
    assert bool(refused) == (highest < 5e-7 * 0.999)


def test_one_update_says_what_was_found_and_what_to_change():
    (said,) = optim.problems(config(0.03), 1)
    assert "found 1 update, 1 of them warm-up (warmup_ratio = 0.03, rounded up)" in said
    assert "the only update has rate 0" in said and "NUM_STEPS" in said and "0.0 for none" in said


@pytest.mark.parametrize("rate", [0.0, -1e-5, 1e-60, float("nan"), float("inf")])
def test_a_rate_that_trains_nothing_is_no_rate(rate):
    with pytest.raises(ValueError, match="learning_rate"):
        config(0.1, learning_rate=rate)


@pytest.mark.parametrize(
    ("dtype", "rate"), [("bfloat16", 5e-7), ("bfloat16", 1e-3), ("float32", 1e-9)]
)
def test_the_share_below_rounding_is_what_numpy_counts(dtype, rate):
    rng = np.random.default_rng(0)
    params = {
        "model/layers/a": jnp.asarray(rng.normal(0, 0.02, (2, 40, 50)), dtype),
        "model/norm": jnp.ones(300, dtype),
        "zeros": jnp.zeros(40, dtype),
    }
    unchanged = total = 0
    for leaf in map(np.asarray, jax.tree.leaves(params)):
        exact, step = leaf.astype(np.float32), np.float32(rate)
        up, down = (exact + step).astype(leaf.dtype), (exact - step).astype(leaf.dtype)
        unchanged += int(((up == leaf) & (down == leaf)).sum())
        total += leaf.size
    share = optim.share_below_rounding(params, rate)
    assert 0 < share < 1
    assert share == pytest.approx(unchanged / total, abs=1e-6)


def test_the_rate_falls_to_its_end():
    """1e-5 to 1e-6 over 100 updates, 3 of them warm-up; by default to 0."""
    made = optim.schedule(config(0.03, learning_rate=1e-5, end_learning_rate=1e-6), 100)
    steps = np.arange(101)
    expected = np.where(steps < 3, 1e-5 * steps / 3, 1e-5 - 9e-6 * (steps - 3) / 97)
    np.testing.assert_allclose([float(made(i)) for i in steps], expected, rtol=1e-5)
    assert float(optim.schedule(config(0.03), 100)(100)) == 0
    with pytest.raises(ValueError, match="end_learning_rate = 1e-06: expected 0 to learning_rate"):
        config(0.03, end_learning_rate=1e-6)
