"""The numbers of a study: over seeds and items against formulas, verdicts, directions."""

import math

import numpy as np
import pytest
import scipy.stats

from tulu_jax.evals import scores
from tulu_jax.evals.benchmark import Metric
from tulu_jax.studies import estimates, run_states, stability
from tulu_jax.studies.declared import Score
from tulu_jax.studies.estimates import Value


def value(right, *, items=True) -> Value:
    right = np.asarray(right, float)
    share = right.mean()
    error = math.sqrt(share * (1 - share) / len(right))
    metric = Metric(
        name="m", value=share, standard_error=error,
        items={str(n): v for n, v in enumerate(right)}, groups={},
    )  # fmt: skip
    group_of = dict.fromkeys(metric.items, "a")
    if not items:
        return Value(value=100 * share, error=100 * error)
    return Value(value=100 * share, error=100 * error, metric=metric, group_of=group_of)


def test_one_seed_has_the_interval_of_its_items():
    found = estimates.over_seeds({1: value([1, 0, 1, 1])})
    assert found.value == 75.0 and found.by_seed == {1: 75.0}
    assert found.half == pytest.approx(1.96 * 100 * math.sqrt(0.75 * 0.25 / 4))


def test_seeds_add_their_t_interval():
    numbers = [70.0, 74.0, 75.0]
    found = estimates.over_seeds({s: Value(value=v, error=2.0) for s, v in enumerate(numbers)})
    low, high = scipy.stats.t.interval(
        0.95, 2, loc=np.mean(numbers), scale=scipy.stats.sem(numbers)
    )
    assert found.value == pytest.approx(np.mean(numbers))
    assert found.half == pytest.approx(math.hypot((high - low) / 2, 1.96 * 2.0))


def test_a_difference_is_paired_where_items_are_the_same():
    rng = np.random.default_rng(0)
    first = (rng.random(300) < 0.5).astype(float)
    second = np.where(rng.random(300) < 0.1, 1.0, first)
    paired = estimates.difference(value(second), value(first))
    apart = estimates.difference(value(second, items=False), value(first, items=False))
    assert paired.value == pytest.approx(apart.value) == 100 * (second - first).mean()
    assert paired.error < 0.6 * apart.error
    expected = 100 * (second - first).std(ddof=1) / math.sqrt(300)
    assert paired.error == pytest.approx(expected, rel=0.01)


def test_a_bootstrap_error_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(size=400)
    found = estimates.bootstrap_error(values)
    assert found == pytest.approx(values.std() / 20, rel=0.1)
    assert found == estimates.bootstrap_error(values)


def test_items_that_are_all_wrong_are_not_certain():
    items = {str(n): 0.0 for n in range(30)}
    metric = Metric(name="m", value=0.0, standard_error=0.0, items=items, groups={"a": 0.0})
    scored = scores.Scored(
        benchmark="b", subset="paper", switches={}, requests=30, metrics=[metric],
        group_of=dict.fromkeys(items, "a"), ended={}, characters=None, group_characters={},
        notes=[],
    )  # fmt: skip
    state = run_states.State(kind=run_states.DONE, says="", scored=[scored])
    for group in (None, "a"):
        found = estimates.value_of(Score(benchmark="b", group=group), state)
        assert found.value == 0.0
        assert estimates.over_seeds({1: found}).half == pytest.approx(10.0)  # 3 of 30
    assert scipy.stats.binom.cdf(0, 30, 0.1) == pytest.approx(0.05, abs=0.01)


def losses(values):
    return [(step, value) for step, value in enumerate(values, 1)]


def test_spikes_and_divergence_are_told_with_their_updates():
    calm = [1.0 - 0.005 * n + 0.01 * (n % 3) for n in range(60)]
    assert stability.spikes(losses(calm)) == () and stability.diverged(losses(calm)) is None
    spiked = [*calm[:40], 3.0, *calm[41:]]
    assert stability.spikes(losses(spiked)) == (41,)
    assert stability.diverged(losses(spiked)) is None
    assert stability.diverged(losses([*calm[:50], *[4.0] * 10])) == 51
    assert stability.diverged(losses([*calm[:30], *[None] * 30])) == 31
    lines = [
        {"step": n, "train/loss": 1.0, "train/grad_norm": float(n), "train/kl": 0.5}
        for n in (1, 2, 9)
    ]
    found = stability.report([*lines, {"step": 9, "eval/kl": 0.7, "eval/rewards/margins": 2.0}])
    assert (found.kl, found.margin, found.accuracy) == (0.7, 2.0, None)
    assert (found.median_gradient, found.largest_gradient) == (2.0, 9.0)
