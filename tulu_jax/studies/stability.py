"""Whether a run went wrong, and when: what its curves say of margins, KL, gradients and losses."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

WINDOW = 20  # updates before one, by which its loss is judged
SPIKE = 6.0  # median absolute deviations above the median of that window
LEAST = 0.02  # of the window's median, below which no deviation counts
DIVERGED = 1.5  # times the first loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Of one run: the last reward accuracy, margin and KL estimate (None where there is none), the
    median and the largest gradient norm, the updates with a spike of the loss, and the update from
    which the run had diverged: no finite loss, or until the end one over `DIVERGED` times the
    first."""

    accuracy: float | None
    margin: float | None
    kl: float | None
    median_gradient: float | None
    largest_gradient: float | None
    spikes: tuple[int, ...]
    diverged: int | None


def report(lines: Sequence[Mapping[str, float | None]]) -> Report:
    """The report of the lines of a run's metrics (`metrics.read`)."""
    losses = [
        (int(line["step"]), line["train/loss"]) for line in lines if "train/loss" in line
    ]  # None stands for what is not finite
    gradients = _finite(lines, "train/grad_norm")
    return Report(
        accuracy=_last(lines, "rewards/accuracies"),
        margin=_last(lines, "rewards/margins"),
        kl=_last(lines, "kl"),
        median_gradient=statistics.median(gradients) if gradients else None,
        largest_gradient=max(gradients) if gradients else None,
        spikes=spikes(losses),
        diverged=diverged(losses),
    )


def spikes(losses: Sequence[tuple[int, float | None]]) -> tuple[int, ...]:
    """The updates whose loss lies far above those of the `WINDOW` before it."""
    found = []
    for place in range(WINDOW, len(losses)):
        before = [loss for _, loss in losses[place - WINDOW : place] if loss is not None]
        step, loss = losses[place]
        if loss is None or not before:
            continue
        middle = statistics.median(before)
        deviation = statistics.median(abs(one - middle) for one in before)
        if loss > middle + SPIKE * max(deviation, LEAST * abs(middle)):
            found.append(step)
    return tuple(found)


def diverged(losses: Sequence[tuple[int, float | None]]) -> int | None:
    """The first update of those at the end that are all not finite or far above the first."""
    if not losses or losses[0][1] is None:
        return losses[0][0] if losses else None
    bound, since = DIVERGED * abs(losses[0][1]), None
    for step, loss in losses:
        if loss is not None and math.isfinite(loss) and loss <= bound:
            since = None
        elif since is None:
            since = step
    return since


def _finite(lines: Sequence[Mapping[str, float | None]], name: str) -> list[float]:
    return [line[name] for line in lines if line.get(name) is not None]


def _last(lines: Sequence[Mapping[str, float | None]], name: str) -> float | None:
    for split in ("eval", "train"):
        if found := _finite(lines, f"{split}/{name}"):
            return found[-1]
    return None
