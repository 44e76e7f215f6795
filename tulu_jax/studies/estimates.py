"""The numbers of a study's table: a score or a difference over seeds, its interval, the verdict.

Of one seed, the interval is that of the items: the benchmark's standard error (binomial where items
are right or wrong), paired item by item for a difference of two runs, and by bootstrap where there
is no formula. Of several seeds, the spread of their values is added: the t interval of their mean,
and the items' part beside it, which seeds do not take away as they answer the same items. The
paper's number has an error too, of which nothing is printed: it is taken to be that of our items.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.special

from tulu_jax import validation
from tulu_jax.evals import compare_runs, paper_tables, predictions, scores
from tulu_jax.evals.benchmark import Metric
from tulu_jax.evals.scores import Z95, Scored
from tulu_jax.studies import run_states
from tulu_jax.studies.declared import (
    AS_FILE,
    CHANGE,
    CHARACTERS,
    DATA,
    TRAINING,
    Cell,
    Design,
    Expected,
    Score,
)
from tulu_jax.studies.run_states import State
from tulu_jax.training import metrics

WITHIN, DIFFERS = "within noise", "differs"
DRAWS = 1000  # of a bootstrap
NONE_SEEN = 3.0  # over the items: the 95 % bound of a share of which none was seen (rule of three)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Value:
    """A score of one run, or a difference of two, in the unit that is shown: its standard error
    over items (None: not known). Of a score `metric` has the single items, of several groups if
    these are averaged first (`group_of`)."""

    value: float
    error: float | None
    metric: Metric | None = None
    group_of: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value over seeds: `by_seed`, their mean, and half its 95 % interval, of which `item_error`
    is what the items give (a standard error); None where neither is known."""

    value: float
    half: float | None
    item_error: float | None
    by_seed: Mapping[int | None, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table: a cell, ours (None: a hole, and `hole` says why), the paper's number and
    what contradicts it, our difference from it with half its interval, and the verdict."""

    cell: Cell
    ours: Estimate | None
    hole: str
    paper: float | None = None
    mark: str = ""
    difference: float | None = None
    half: float | None = None
    verdict: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """An expected direction, the values by seed, and the seeds in which it holds."""

    expected: Expected
    by_seed: Mapping[int | None, float]
    seeds: Sequence[int | None]
    hole: str


class Hole(Exception):
    """Why a cell cannot be filled."""


def line(cell: Cell, design: Design, states: Mapping[str, State]) -> Line:
    """A line of the table. `states` are by run and seed, as `run_states.Placed.name` has them."""
    printed = paper_tables.cell(*cell.paper) if cell.paper else None
    paper = printed.value if printed else cell.printed
    mark = printed.inconsistent.why if printed and printed.inconsistent else ""
    try:
        ours = estimate(cell, design, states)
    except Hole as hole:
        return Line(cell=cell, ours=None, hole=str(hole), paper=paper, mark=mark)
    note = _unequal(cell, design, ours)
    if paper is None:
        verdict = ""
        if cell.minus and ours.half is not None:
            verdict = WITHIN if abs(ours.value) <= ours.half else DIFFERS
        return Line(cell=cell, ours=ours, hole=note, half=ours.half, verdict=verdict)
    difference, half, verdict = ours.value - paper, None, "no interval"
    if ours.half is not None:
        half = math.hypot(ours.half, Z95 * (ours.item_error or 0.0))
        verdict = WITHIN if abs(difference) <= half else DIFFERS
    return Line(
        cell=cell, ours=ours, hole=note, paper=paper, mark=mark, difference=difference, half=half,
        verdict=verdict,
    )  # fmt: skip


def point(run: str, score: Score, design: Design, states: Mapping[str, State]) -> Estimate | None:
    """A score of a run over seeds; None where there is none."""
    try:
        return estimate(Cell(run=run, score=score), design, states)
    except Hole:
        return None


def held(expected: Expected, design: Design, states: Mapping[str, State]) -> Held:
    """In which seeds an expected direction holds."""
    try:
        found = estimate(expected.cell, design, states).by_seed
    except Hole as hole:
        return Held(expected=expected, by_seed={}, seeds=[], hole=str(hole))
    seeds = [s for s, value in found.items() if expected.above < value < expected.below]
    return Held(expected=expected, by_seed=found, seeds=seeds, hole="")


def estimate(cell: Cell, design: Design, states: Mapping[str, State]) -> Estimate:
    """Ours of a cell, over all seeds that there are. Raises `Hole`."""
    values, holes = {}, []
    for seed in design.run(cell.run).tries:
        try:
            values[seed] = _of_seed(cell, design, states, seed)
        except Hole as hole:
            holes.append(str(hole))
    if not values:
        raise Hole("; ".join(dict.fromkeys(holes)))
    return over_seeds(values)


def over_seeds(values: Mapping[int | None, Value]) -> Estimate:
    """The mean of values over seeds."""
    numbers = [one.value for one in values.values()]
    errors = [one.error for one in values.values() if one.error is not None]
    item_error = math.sqrt(statistics.fmean(e * e for e in errors)) if errors else None
    half = None if item_error is None else Z95 * item_error
    if len(numbers) > 1:
        t = float(scipy.special.stdtrit(len(numbers) - 1, 0.975))
        half = math.hypot(half or 0.0, t * statistics.stdev(numbers) / math.sqrt(len(numbers)))
    return Estimate(
        value=statistics.fmean(numbers), half=half, item_error=item_error,
        by_seed={seed: one.value for seed, one in values.items()},
    )  # fmt: skip


def difference(a: Value, b: Value) -> Value:
    """`b` from `a`: paired where both have the same items, else of two independent values."""
    value, pair = a.value - b.value, (b.metric, a.metric)
    if None not in pair and len(pair[0].items) > 1 and pair[0].items.keys() == pair[1].items.keys():
        found = compare_runs.difference(*pair, a.group_of)
        error = scores.in_percent(pair[0], (found.high - found.low) / 2 / Z95)
        return Value(value=value, error=error)
    if a.error is None or b.error is None:
        return Value(value=value, error=None)
    return Value(value=value, error=math.hypot(a.error, b.error))


def bootstrap_error(values: Sequence[float]) -> float:
    """The standard error of a mean, from `DRAWS` resamples (Efron 1979), always the same ones."""
    found = np.asarray(values, float)
    places = np.random.default_rng(0).integers(len(found), size=(DRAWS, len(found)))
    return float(found[places].mean(axis=1).std(ddof=1))


def value_of(score: Score, state: State) -> Value:
    """A score of an evaluated run, in percent where its metric is. Raises `Hole`."""
    if score.benchmark in paper_tables.AVERAGES:
        found = scores.averages(state.scored, "paper")[score.benchmark]
        if isinstance(found, list):
            raise Hole(f"{score.benchmark} lacks {', '.join(found)}")
        return Value(value=found[0], error=found[1])
    if score.benchmark == TRAINING:
        return _of_training(score, state)
    if score.benchmark == DATA:
        return _of_card(score, state)
    scored = next((one for one in state.scored if one.benchmark == score.benchmark), None)
    if scored is None:
        raise Hole(f"not evaluated on {score.benchmark} yet")
    if score.metric == CHARACTERS:
        return _lengths(score, scored, state)
    metric = next((one for one in scored.metrics if score.metric in (None, one.name)), None)
    if metric is None:
        raise Hole(f"{score.benchmark} has no metric {score.metric}")
    if metric.value is None:
        raise Hole(f"{score.benchmark} waits for a judge")
    return _of_metric(score, scored, metric)


def _of_training(score: Score, state: State) -> Value:
    """The last value of a metric of training, or its change; nothing is known of its error."""
    try:
        lines = metrics.read(state.workdir)
    except validation.UsageError as error:  # as of one that is evaluated alone
        raise Hole(str(error)) from None
    found = [line[score.metric] for line in lines if line.get(score.metric) is not None]
    if not found:
        raise Hole(f"it has no {score.metric} in {metrics.FILE}")
    return Value(value=found[-1] - (found[0] if score.group == CHANGE else 0.0), error=None)


def _of_card(score: Score, state: State) -> Value:
    """A number of the lengths of a data card."""
    found = (state.card or {}).get("lengths", {}).get(score.metric)
    if found is None:
        raise Hole(f"its data card has no {score.metric}")
    return Value(value=float(found), error=None)


def _of_metric(score: Score, scored: Scored, metric: Metric) -> Value:
    if score.group is not None:
        if score.group not in metric.groups:
            raise Hole(f"{score.benchmark} has no group {score.group}")
        ids = [id_ for id_ in metric.items if scored.group_of[id_] == score.group]
        metric = dataclasses.replace(
            metric, value=metric.groups[score.group], standard_error=None,
            items={id_: metric.items[id_] for id_ in ids},
        )  # fmt: skip
    error = metric.standard_error
    alike = metric.is_percent and set(metric.items.values()) in ({0.0}, {1.0})
    if len(metric.items) > 1 and alike:
        error = NONE_SEEN / len(metric.items) / Z95
    elif error is None and len(metric.items) > 1:
        error = bootstrap_error(list(metric.items.values()))
    return Value(
        value=scores.in_percent(metric, metric.value),
        error=None if error is None else scores.in_percent(metric, error),
        metric=metric,
        group_of=scored.group_of,
    )


def _lengths(score: Score, scored: Scored, state: State) -> Value:
    try:
        rows = predictions.read(state.folder / f"{scored.key}.jsonl")
    except validation.UsageError as error:
        raise Hole(f"its answers are gone: {error}") from error
    items = {
        row.id: statistics.fmean(map(len, row.texts))
        for row in rows
        if row.texts and score.group in (None, scored.group_of.get(row.id))
    }
    if not items:
        raise Hole(f"{score.benchmark} has no answers")
    mean, error = statistics.fmean(items.values()), bootstrap_error(list(items.values()))
    metric = Metric(
        name=CHARACTERS, value=mean, standard_error=error, items=items, groups={}, is_percent=False
    )
    return Value(value=mean, error=error, metric=metric, group_of=scored.group_of)


def _of_seed(cell: Cell, design: Design, states: Mapping[str, State], seed) -> Value:
    value = _of_run(cell.run, cell, states, seed)
    if cell.minus is None:
        return value
    tries = design.run(cell.minus).tries
    other = _of_run(cell.minus, cell, states, seed if seed in tries else tries[0])
    return difference(value, other)


def _of_run(name: str, cell: Cell, states: Mapping[str, State], seed) -> Value:
    shown = _name(name, seed)
    state = states.get(shown)
    if state is None:
        raise Hole(f"{shown}: left out by --only")
    if state.kind != run_states.DONE:
        raise Hole(state.says)
    try:
        return value_of(cell.score, state)
    except Hole as hole:
        raise Hole(f"{shown}: {hole}") from hole


def _name(run: str, seed) -> str:
    return run if seed is AS_FILE else f"{run}, seed {seed}"


def _unequal(cell: Cell, design: Design, ours: Estimate) -> str:
    """That a mean is over fewer seeds than declared."""
    declared = design.run(cell.run).tries
    if len(ours.by_seed) == len(declared):
        return ""
    there = ", ".join(map(str, ours.by_seed))
    return f"{cell}, {cell.score}: of seeds {', '.join(map(str, declared))} only {there}"
