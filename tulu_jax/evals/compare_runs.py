"""Two evaluations of the same questions, item by item: is one model better, or is it chance?

Where items are right or wrong and weigh the same, the exact test of McNemar (1947) counts only
those on which the two differ. Else the paired t test of the items' differences; where the benchmark
averages over groups first, that of the mean of the groups' means, whose variance adds up over them.
Intervals are those of the t distribution, of all metrics.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import scipy.special

from tulu_jax import atomic, strict_json, validation
from tulu_jax.evals import predictions, scores
from tulu_jax.evals.benchmark import Metric
from tulu_jax.evals.scores import Scored

FILE = "differences.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How a metric of B differs from that of A, in the unit of the metric: B - A, its 95 %
    interval, and the p value of 'no difference' by `test`."""

    value: float
    low: float
    high: float
    p: float
    test: str
    better: int  # items on which B is above A
    worse: int


def compare(folders: Sequence[pathlib.Path]) -> tuple[list[tuple[Scored, Scored]], list[str]]:
    """The benchmarks that both folders have, and a word on those that one alone has. Raises
    `UsageError` with all that keeps the two from being compared."""
    (_, a), (_, b) = (scores.load(folder) for folder in folders)
    ours = ({one.key: one for one in a}, {one.key: one for one in b})
    both = [key for key in ours[0] if key in ours[1]]
    if not both:
        raise validation.UsageError(
            f"{folders[0]} has scores of {', '.join(ours[0])}, and {folders[1]} of "
            f"{', '.join(ours[1])}; expected a benchmark that both have"
        )
    validation.raise_if(problem for key in both for problem in _problems(folders, key))
    alone = [
        f"{key} is in {folder} alone"
        for folder, mine, other in zip(folders, ours, ours[::-1], strict=True)
        for key in mine
        if key not in other
    ]
    return [(ours[0][key], ours[1][key]) for key in both], alone


def _problems(folders: Sequence[pathlib.Path], key: str) -> Iterator[str]:
    """Why predictions of one benchmark are of different questions, one line each."""
    hashes = [
        {row.id: row.prompt_hash for row in predictions.read(folder / f"{key}.jsonl")}
        for folder in folders
    ]
    for mine, other, folder in zip(hashes, hashes[::-1], folders, strict=True):
        alone = [id_ for id_ in mine if id_ not in other]
        if alone:
            yield f"{key}: {len(alone):,} items are in {folder} alone ({predictions.shown(alone)})"
    differ = [id_ for id_, found in hashes[0].items() if hashes[1].get(id_, found) != found]
    if differ:
        yield (
            f"{key}: {len(differ):,} of {len(hashes[0]):,} prompts differ "
            f"({predictions.shown(differ)}); expected the same ids in both: the same data, "
            "tokenizer, --chat and switches"
        )


def difference(a: Metric, b: Metric, group_of: Mapping[str, str]) -> Difference:
    """B - A over items that both have. Raises `UsageError` if their items are not the same."""
    if a.items.keys() != b.items.keys() or len(a.items) < 2:
        raise validation.UsageError(
            f"{a.name}: found values of {len(a.items)} and {len(b.items)} items; expected the same "
            "items in both, two at least; evaluate both again"
        )
    ids = list(a.items)
    first, second = (np.array([metric.items[id_] for id_ in ids]) for metric in (a, b))
    found = second - first
    groups = _strata(a, ids, group_of)
    value = float(np.mean([found[places].mean() for places in groups]))
    # Of a group of one item nothing is known of its variance; it is left out of the sum.
    variances = [found[p].var(ddof=1) / len(p) if len(p) > 1 else 0.0 for p in groups]
    error = math.sqrt(sum(variances)) / len(groups)
    freedom = max(1, len(ids) - len(groups))
    half = float(scipy.special.stdtrit(freedom, 0.975)) * error
    better, worse = int((found > 0).sum()), int((found < 0).sum())
    same_weights = len({len(places) for places in groups}) == 1
    if same_weights and np.isin([first, second], (0.0, 1.0)).all():
        p, test = mcnemar(better, worse), "McNemar, exact"
    else:
        p = 1.0 if value == 0 else 0.0 if error == 0 else (
            2 * float(scipy.special.stdtr(freedom, -abs(value) / error))
        )  # fmt: skip
        test = "paired t" if len(groups) == 1 else "paired t over groups"
    return Difference(
        value=value, low=value - half, high=value + half, p=p, test=test, better=better, worse=worse
    )


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p value of so many items won and lost."""
    count, least = better + worse, min(better, worse)
    tail = sum(math.comb(count, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**count)


def _strata(metric: Metric, ids: Sequence[str], group_of: Mapping[str, str]) -> list[np.ndarray]:
    """Places of the items of each group, if the metric is the mean of the groups' means and no
    plain mean; else of all."""
    every, by_group = np.arange(len(ids)), {}
    for place, id_ in enumerate(ids):
        by_group.setdefault(group_of[id_], []).append(place)
    values = np.array([metric.items[id_] for id_ in ids])
    groups = [np.array(places) for places in by_group.values()]
    means = {"all": values.mean(), "groups": np.mean([values[p].mean() for p in groups])}
    is_macro = abs(means["groups"] - metric.value) < abs(means["all"] - metric.value) - 1e-12
    return groups if is_macro else [every]


def lines(pairs: Sequence[tuple[Scored, Scored]]) -> Iterator[str]:
    """The table of all metrics of both, with what is different."""
    rows = [["benchmark", "metric", "A", "B", "B - A, 95 %", "p", "up", "down", "test"]]
    for a, b in pairs:
        others = {metric.name: metric for metric in b.metrics}
        for place, metric in enumerate(a.metrics):
            other = others.get(metric.name)
            cells = [a.key if place == 0 else "", metric.name, scores.interval(metric)]
            if other is None or None in (metric.value, other.value):
                cells += ["" if other is None else scores.interval(other), "", "", "", "", ""]
            else:
                found = difference(metric, other, a.group_of)
                shown = [scores.in_percent(metric, v) for v in (found.value, found.low, found.high)]
                digits = 1 if metric.is_percent else 2
                value, low, high = (f"{one:+.{digits}f}" for one in shown)
                cells += [
                    scores.interval(other), f"{value} [{low}, {high}]", f"{found.p:.3g}",
                    str(found.better), str(found.worse), found.test,
                ]  # fmt: skip
            rows.append(cells)
    lengths = [(a, b) for a, b in pairs if a.characters is not None and b.characters is not None]
    for a, b in lengths:
        cells = [f"{one.characters:,.0f}" for one in (a, b)]
        change = f"{b.characters - a.characters:+,.0f}"
        rows.append([a.key, "characters", *cells, change, "", "", "", ""])
    yield from scores.columns(rows)


def write_differences(
    pairs: Sequence[tuple[Scored, Scored]], folders: Sequence[pathlib.Path], file: pathlib.Path
) -> int:
    """Writes a line for every item whose value differs, with what both said; how many."""
    found = []
    for a, b in pairs:
        said = [
            {row.id: row.texts for row in predictions.read(folder / f"{a.key}.jsonl")}
            for folder in folders
        ]
        others = {metric.name: metric for metric in b.metrics}
        for metric in a.metrics:
            other = others.get(metric.name)
            for id_, value in metric.items.items() if other else ():
                if id_ in other.items and other.items[id_] != value:
                    found.append({
                        "benchmark": a.key, "metric": metric.name, "id": id_,
                        "group": a.group_of[id_], "a": value, "b": other.items[id_],
                        "texts_a": said[0].get(id_, []), "texts_b": said[1].get(id_, []),
                    })  # fmt: skip
    atomic.write_text(file, "".join(strict_json.dumps(line) + "\n" for line in found))
    return len(found)
