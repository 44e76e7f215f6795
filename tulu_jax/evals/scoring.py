"""What scoring has in common: pairs of request and answer, means, and their standard errors."""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence

from tulu_jax import validation
from tulu_jax.evals import benchmark

SUBSETS = ("paper", "full")


def subset_rule(subset: str) -> validation.Rule:
    """The rule of the field `subset` of every benchmark."""
    return validation.one_of("subset", subset, SUBSETS)


def pairs(
    requests: Sequence[benchmark.Request], answers: Sequence[benchmark.Answer]
) -> Iterator[tuple[benchmark.Request, benchmark.Answer]]:
    """Each request with its answer. Raises `UsageError` that names requests without one, or without
    the texts or scores that were asked for."""
    by_id = {answer.id: answer for answer in answers}
    missing = [request.id for request in requests if not _is_whole(request, by_id.get(request.id))]
    if missing:
        some = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise validation.UsageError(
            f"found no whole answer to {len(missing):,} of {len(requests):,} requests ({some}); "
            "expected one to each; let the evaluation go on to its end"
        )
    return ((request, by_id[request.id]) for request in requests)


def _is_whole(request: benchmark.Request, answer: benchmark.Answer | None) -> bool:
    if answer is None:
        return False
    if request.sampling is None:
        return len(answer.choice_logps) == len(request.choices)
    return len(answer.texts) == (1 + len(request.then) if request.then else request.sampling.samples)


def mean_over_items(
    name: str, items: Mapping[str, float], requests: Sequence[benchmark.Request]
) -> benchmark.Metric:
    """The mean of all items, each of the same weight, in the unit of the items."""
    groups = _grouped(items, requests)
    variance = _variance_of_mean(list(items.values()))
    return benchmark.Metric(
        name=name,
        value=_mean(list(items.values())),
        standard_error=None if variance is None else math.sqrt(variance),
        items=dict(items),
        groups={group: _mean(values) for group, values in groups.items()},
    )


def mean_over_groups(
    name: str, items: Mapping[str, float], requests: Sequence[benchmark.Request]
) -> benchmark.Metric:
    """The mean of the groups' means, each group of the same weight.

    Groups are drawn apart from each other, so the variances of their means add up:
    se = sqrt(Σ_g var(mean_g)) / G.
    """
    groups = _grouped(items, requests)
    variances = [_variance_of_mean(values) for values in groups.values()]
    means = {group: _mean(values) for group, values in groups.items()}
    known = None not in variances
    return benchmark.Metric(
        name=name,
        value=_mean(list(means.values())),
        standard_error=math.sqrt(sum(variances)) / len(variances) if known else None,
        items=dict(items),
        groups=means,
    )


def pending(name: str) -> benchmark.Metric:
    """A metric whose judge has not answered."""
    return benchmark.Metric(name=name, value=None, standard_error=None, items={}, groups={})


def _grouped(
    items: Mapping[str, float], requests: Sequence[benchmark.Request]
) -> dict[str, list[float]]:
    groups = collections.defaultdict(list)
    for request in requests:
        if request.id in items:
            groups[request.group].append(items[request.id])
    if not groups:
        raise validation.UsageError(
            "found no request to score; expected at least one; look at the data of the benchmark"
        )
    return dict(groups)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance_of_mean(values: Sequence[float]) -> float | None:
    """p(1 - p)/n of zeros and ones, s²/n of others; None for one value that is neither."""
    n, mean = len(values), _mean(values)
    if all(value in (0, 1) for value in values):
        return mean * (1 - mean) / n
    if n == 1:
        return None
    return math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n
