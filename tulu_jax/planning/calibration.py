"""How far an estimate may be off: the rule, and the published speeds that it comes from.

A point is a step of MaxText that its authors ran on a real slice. It was compiled for that slice
without one and priced by `cost.py` as every other program (`benchmarks/pods.py --calibrate` prints
the points again). Its `share` is the part of the predicted time that waits for the interconnect,
its `error` what the measured time is more or less than the predicted, as a part of that. Steps of
which the compiler cut products over `tensor` into rings of permutes are no points: ours have none,
and the one that was compiled is priced at twice its published time (docs/pods.md).

Nothing says which part of a step is to blame for an error. Were it what is computed, errors would
be `COMPUTE * (1 - share)` in the root mean square; were it the waits, `WAITS * share`. A step is
taken to be off by twice the larger of the two. Where products bind that is about what the points
show; where the interconnect binds it is as much as the points allow, which is wide, since they wait
little. Waits cannot be shorter than nothing, so the low end never takes away more than all of them.
"""

import dataclasses
import math

from tulu_jax.planning.cost import Cost


@dataclasses.dataclass(frozen=True)
class Point:
    """Seconds of a step of one run: `measured` as published, `predicted`, and of these those that
    wait for the interconnect, `waits`."""

    name: str
    measured: float
    predicted: float
    waits: float

    @property
    def error(self) -> float:
        """The measured time over the predicted, less one."""
        return self.measured / self.predicted - 1

    @property
    def share(self) -> float:
        """The part of the predicted time that waits."""
        return self.waits / self.predicted


POINTS = (
    Point("llama2_70b_v5p_512", 23.68, 24.69, 1.05),
    Point("llama2_70b_v5e_256", 15.63, 15.64, 1.74),
    Point("llama2_70b_v4_128", 11.20, 10.33, 1.03),
    Point("own_64b_v5e_256", 13.36, 14.26, 1.61),
    Point("own_128b_v5p_512-without_rings", 4.98, 5.57, 1.11),
)


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def explained_by(shares: list[float], errors: list[float]) -> float:
    """The relative error of a part of the time that would leave `errors` in the root mean square,
    were no other part to blame: the part is `shares` of the time of each point."""
    return _rms(errors) / _rms(shares)


_ERRORS = [point.error for point in POINTS]
COMPUTE = explained_by([1 - point.share for point in POINTS], _ERRORS)
WAITS = explained_by([point.share for point in POINTS], _ERRORS)
MOST = max(point.share for point in POINTS)  # what is waited for in a point


@dataclasses.dataclass(frozen=True)
class Band:
    """What a predicted time may be multiplied with, from `low` to `high`. `share` of it waits for
    the interconnect; beyond `MOST` no point says anything, and the band is `extrapolated`."""

    low: float
    high: float
    share: float

    @property
    def extrapolated(self) -> bool:
        return self.share > MOST

    def of(self, value: float) -> tuple[float, float]:
        """The least and the most of what is in proportion to the time, such as hours."""
        return self.low * value, self.high * value

    def as_dict(self) -> dict[str, float | bool]:
        """JSON."""
        return dataclasses.asdict(self) | {"extrapolated": self.extrapolated}


def band(of: Cost) -> Band:
    """How far the seconds of `of` may be off. Those of no time are exact."""
    share = of.interconnect / of.seconds if of.seconds else 0.0
    compute, waits = 2 * COMPUTE * (1 - share), 2 * WAITS * share
    return Band(
        low=1 - max(compute, min(waits, share)),
        high=1 + max(compute, waits),
        share=share,
    )
