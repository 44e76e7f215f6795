"""What a run does about an update that goes wrong: which ones those are, and the policy.

A loss is a spike if it is above the median of the `window` updates before the last one by more than
`mads` median absolute deviations. The last one is left out because it is still on the devices when
the next begins. So whether update k is one depends on the losses up to k - 2 alone. They are saved
with each checkpoint: a run that goes on judges, and skips, as it would have without the stop.
"""

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from tulu_jax import validation

FLOOR = 0.01  # the least deviation, as a part of the median: losses may be all but the same


class UnstableError(validation.UsageError):
    """An update went wrong, and the policy is to stop; the message names its rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """`not_finite`: about a loss, another metric or a gradient norm that is no number. "stop" ends
    the run, with the last checkpoint from before; "skip" leaves parameters and moments as they
    were, logs the rows and goes on.

    `spikes`: about a loss that is one, the same, or "log", which only tells. `most_skipped` in a
    row end the run in any case. `hung_after`: seconds without an update, a batch of an evaluation
    or a checkpoint coming to its end, after which the process says where it hangs and ends; None
    waits forever.
    """

    not_finite: str = "stop"
    spikes: str = "log"
    window: int = 100
    mads: float = 10.0
    most_skipped: int = 10
    hung_after: float | None = 1800.0

    def __post_init__(self):
        validation.check(self, self._rules)

    def _rules(self):
        yield validation.one_of("not_finite", self.not_finite, ("skip", "stop"))
        yield validation.one_of("spikes", self.spikes, ("log", "skip", "stop"))
        yield self.window >= 2, f"window = {self.window}: expected at least 2 updates"
        yield validation.at_most("window", self.window, 10_000)
        yield self.mads > 0, f"mads = {self.mads}: expected a positive number"
        yield (
            0 < self.most_skipped <= self.window,
            f"most_skipped = {self.most_skipped}: expected 1 to window = {self.window}",
        )
        yield (
            self.hung_after is None or self.hung_after > 0,
            f"hung_after = {self.hung_after}: expected a positive number of seconds, or None",
        )

    @property
    def skips(self) -> bool:
        """Whether there are updates that leave the state as it was."""
        return "skip" in (self.not_finite, self.spikes)


def to_skip(
    config: WatchConfig, scalars: dict[str, jax.Array], bound: jax.Array | float
) -> jax.Array:
    """Whether an update that measured `scalars` is to be skipped, bool []; inside the step. `bound`
    is that of its loss."""
    finite = jnp.isfinite(jnp.stack([jnp.asarray(v, jnp.float32) for v in scalars.values()])).all()
    spike = scalars["loss"] > bound
    return ((config.not_finite == "skip") & ~finite) | ((config.spikes == "skip") & spike)


def kept_if(skip: jax.Array, before: Any, after: Any) -> Any:
    """`before` if `skip`, but for whole numbers: these count updates, and the learning rate of an
    update must not depend on how many were skipped before it."""

    def leaf(old, new):
        counts = jnp.issubdtype(old.dtype, jnp.integer)
        return new if counts else jnp.where(skip, old, new)

    return jax.tree.map(leaf, before, after)


class History:
    """The losses of the last updates up to `step`, None for one that was skipped, and how many
    were skipped in all. `saved` is what `as_saved` gave at `step`; None begins anew."""

    def __init__(self, config: WatchConfig, step: int, saved: dict[str, Any] | None = None):
        self._config, self._step = config, step
        self._losses: list[float | None] = list(saved["losses"]) if saved else []
        self.skipped: int = saved["skipped"] if saved else 0

    def as_saved(self) -> dict[str, Any]:
        """A JSON object. Floats are written so that they are read back to the bit."""
        return {"losses": self._losses, "skipped": self.skipped}

    def bound(self, step: int) -> float:
        """Above which the loss of `step`, one of the two updates after the last known one, is a
        spike; infinite until `window` updates before the last one are known."""
        known = self._losses[: len(self._losses) - (self._step - (step - 2))]
        known = known[-self._config.window :]
        losses = [loss for loss in known if loss is not None]
        if len(known) < self._config.window or not losses:
            return float("inf")
        median = statistics.median(losses)
        deviation = statistics.median(abs(loss - median) for loss in losses)
        return median + self._config.mads * max(deviation, FLOOR * abs(median))

    def add(self, loss: float | None) -> None:
        """The loss of the next update; None if it was skipped."""
        self._losses = [*self._losses, loss][-(self._config.window + 1) :]
        self._step += 1
        self.skipped += loss is None

    def skipped_in_a_row(self) -> int:
        """How many of the last updates were skipped, without one between them that was not."""
        count = 0
        while count < len(self._losses) and self._losses[-1 - count] is None:
            count += 1
        return count
