"""Batches of pairs for a reward model; what an evaluation of one tells: groups, and calibration.

A reward model says which answer of a pair wins, and how sure it is: σ(|margin|). It is calibrated
if, of the pairs of which it is 80 % sure, it is right in 80 %.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tulu_jax.data import loader
from tulu_jax.objectives import dpo_feed, loader_feed

BINS = 10  # of how sure it is, from one half to one


class RewardFeed:
    """The pairs of a run's mixture (`objective.Feed`), with `truncated` [*pairs]."""

    def __init__(self, run):
        self._pairs = loader_feed.LoaderFeed(
            run, lambda split, rows, batch: dpo_feed.attached(rows, batch, None)
        )

    @property
    def rows(self) -> loader.Rows:
        return self._pairs.rows

    def begin(self, initial, weights: str) -> None:
        """Nothing here depends on the parameters."""

    def __call__(self, step: int, params) -> loader_feed.Batch:
        return self._pairs(step, params)

    def evaluation(self) -> Iterator[loader_feed.Batch] | None:
        return self._pairs.evaluation()

    def groups(self, examples: list[Mapping[str, Any]]) -> dict[str, float]:
        """`by_source/*` and `by_length/*` as DPO has them, and `calibration/*`."""
        margins = [
            np.asarray(batch["rewards/margins"])[np.asarray(batch["example"]) >= 0]
            for batch in examples
        ]
        groups = dpo_feed.group_means(self._pairs.splits["eval"], examples)
        return groups | calibration(np.concatenate(margins))


def calibration(margins: np.ndarray) -> dict[str, float]:
    """Of the margins [pairs] of an evaluation, by bins of σ(|margin|): `calibration/N/pairs`, and
    of bins with any `calibration/N/sure`, the mean of σ(|margin|), and `calibration/N/won`, the
    share whose chosen answer has the higher score, a tie being half. `calibration/error` is the
    mean over pairs of |won − sure| of their bin (Naeini et al. 2015). Margins that are not finite
    are left out."""
    margins = margins[np.isfinite(margins)].astype(np.float64)
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    won = np.where(margins == 0, 0.5, margins > 0)
    bins = np.minimum(((2 * sure - 1) * BINS).astype(int), BINS - 1)
    found, error = {}, 0.0
    for number in range(BINS):
        here = bins == number
        found[f"calibration/{number}/pairs"] = float(here.sum())
        if here.any():
            means = {"sure": float(sure[here].mean()), "won": float(won[here].mean())}
            found |= {f"calibration/{number}/{name}": mean for name, mean in means.items()}
            error += here.mean() * abs(means["won"] - means["sure"])
    return found | {"calibration/error": float(error)}
