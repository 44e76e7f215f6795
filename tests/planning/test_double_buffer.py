"""Waits of a double buffer, against timelines worked by hand; 1 byte takes 1 second."""

import numpy as np
import pytest

from tulu_jax.planning.cycles import double_buffer


@pytest.mark.parametrize(
    "compute, loads, stores, latency, expected",
    [
        # Load 3, then 2 + 2 of work: nothing else moves.
        pytest.param([2, 2], [3, 0], [0, 0], 0, 7, id="only the first load is waited for"),
        # Loads 0-2 and, behind it, 2-6; work 2-7 and 7-12.
        pytest.param([5, 5], [2, 4], [0, 0], 0, 12, id="a load shorter than a step hides"),
        # 0-1 and 1-9 on the path; work 1-4, waits to 9, work 9-12.
        pytest.param([3, 3], [1, 8], [0, 0], 0, 12, id="a longer one is waited for"),
        # Sent at 1 and 3, landed at 1.5 and 3.5; work 1.5-2.5 and 3.5-4.5.
        pytest.param([1, 1], [1, 2], [0, 0], 0.5, 4.5, id="latency is not on the path"),
        # Work 1-3 and 3-5. Store 3-7: the last step's store starts when it has landed, 7-11.
        pytest.param([2, 2], [1, 0], [4, 4], 0, 11, id="a store waits for the one before"),
        # Store 2-6; the third step's load starts with the second step at 2, behind it: 6-7.
        pytest.param([1, 1, 1], [1, 0, 1], [4, 0, 0], 0, 8, id="one path for both ways"),
    ],
)
def test_by_hand(compute, loads, stores, latency, expected):
    steps = (np.array(x, float) for x in (compute, loads, stores))
    found = double_buffer.seconds(*steps, bandwidth=1.0, latency=float(latency))
    assert found == pytest.approx(expected)


def test_between_perfect_overlap_and_none():
    rng = np.random.default_rng(0)
    for _ in range(50):
        compute, loads, stores = rng.random((3, 20)) * (rng.random((3, 20)) < 0.7)
        bandwidth, latency = 0.3 + 3 * rng.random(), 0.2 * rng.random()
        found = double_buffer.seconds(compute, loads, stores, bandwidth=bandwidth, latency=latency)
        moved = (loads.sum() + stores.sum()) / bandwidth
        assert found >= max(compute.sum(), moved) - 1e-9
        transfers = (loads > 0).sum() + (stores > 0).sum()
        assert found <= compute.sum() + moved + transfers * latency + 1e-9
