"""What is measured of answers beside what their benchmark asks: a reward, a KL divergence.

A measure is a number for each answer, from the ids of its prompt and its own; its mean over a
benchmark's requests is one more metric of that, shown as it is.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

from tulu_jax.evals import run
from tulu_jax.evals.benchmark import Answer, Metric
from tulu_jax.serving.engine import Engine

Rows = Sequence[tuple[list[int], list[int]]]  # (prompt, answer)
Measure = Callable[[Rows], list[float]]
REWARD, KL = "reward", "kl"


def log_ratio(policy: Engine, reference: Engine) -> Measure:
    """log π − log π_ref of each answer, in nats, at temperature 1: of answers that `policy` drew so
    an estimate of its KL divergence from `reference`, without bias and of either sign."""

    def measure(rows: Rows) -> list[float]:
        said = [place for place, (_, answer) in enumerate(rows) if answer]
        found = [0.0] * len(rows)
        if said:
            asked = [rows[place][0] for place in said], [rows[place][1] for place in said]
            both = zip(policy.score(*asked), reference.score(*asked), strict=True)
            for place, (ours, theirs) in zip(said, both, strict=True):
                found[place] = ours.logps - theirs.logps
        return found

    return measure


def metrics(
    measures: Mapping[str, Measure], of: run.Prompts, answers: Sequence[Answer]
) -> list[Metric]:
    """A metric for each of `measures`, over the generated answers of one turn; none where there are
    no such. Of several samples of a request it is their mean."""
    pairs = [
        (asked, answer)
        for asked, answer in zip(of.asked, answers, strict=True)
        if asked.request.sampling is not None and not asked.request.then and answer.texts
    ]
    if not pairs:
        return []
    rows = [run.in_ids(of, asked, answer) for asked, answer in pairs]
    found = []
    for name, measure in measures.items():
        values = iter(measure([row for samples in rows for row in samples]))
        items, groups = {}, {}
        for (asked, _), samples in zip(pairs, rows, strict=True):
            value = statistics.fmean(next(values) for _ in samples)
            items[asked.request.id] = value
            groups.setdefault(asked.request.group, []).append(value)
        error = statistics.stdev(items.values()) / len(items) ** 0.5 if len(items) > 1 else None
        found.append(
            Metric(
                name=name,
                value=statistics.fmean(items.values()),
                standard_error=error,
                items=items,
                groups={g: statistics.fmean(its) for g, its in groups.items()},
                is_percent=False,
            )
        )
    return found
