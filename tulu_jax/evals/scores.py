"""Scores of an evaluation: kept in its folder, and shown beside the paper's.

`scores.json` has of each benchmark its metrics with the values of single items, the group of every
item, and how the answers ended. A metric that waits for a judge is there without a number.
"""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tulu_jax import atomic, strict_json, validation
from tulu_jax.evals import catalogue, paper_tables
from tulu_jax.evals.benchmark import Answer, Metric, Request

FILE = "scores.json"
PENDING = "pending"
Z95 = 1.96  # standard errors to each side of a 95 % interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """A benchmark's metrics. `ended` counts how its answers ended ('stop' or 'length'),
    `characters` is their mean length and that of each group; `notes` say what is special, such as
    altered data."""

    benchmark: str
    subset: str
    switches: dict[str, Any]
    requests: int
    metrics: list[Metric]
    group_of: dict[str, str]  # by request id
    ended: dict[str, int]
    characters: float | None
    group_characters: dict[str, float]
    notes: list[str]

    @property
    def key(self) -> str:
        """What its files are called."""
        return f"{self.benchmark}.{self.subset}"


def scored(
    name: str,
    switches: Mapping[str, Any],
    requests: Sequence[Request],
    answers: Sequence[Answer],
    metrics: list[Metric],
    *,
    notes: Sequence[str],
) -> Scored:
    """The scores of `answers`, with what can be counted of these alone."""
    ended = [why for answer in answers for why in answer.ended]
    lengths: dict[str, list[int]] = {}
    for request, answer in zip(requests, answers, strict=True):
        lengths.setdefault(request.group, []).extend(map(len, answer.texts))
    every = [length for group in lengths.values() for length in group]
    return Scored(
        benchmark=name,
        subset=switches["subset"],
        switches=dict(switches),
        requests=len(requests),
        metrics=metrics,
        group_of={request.id: request.group for request in requests},
        ended={why: ended.count(why) for why in ("stop", "length") if why in ended},
        characters=statistics.fmean(every) if every else None,
        group_characters={g: statistics.fmean(found) for g, found in lengths.items() if found},
        notes=list(notes),
    )


def save(folder: pathlib.Path, model: str, new: Sequence[Scored]) -> list[Scored]:
    """Writes `new` into the scores of `folder`, in place of older ones of the same benchmark; all
    that are there then. Raises `UsageError` if these are of another model."""
    kept = []
    if (folder / FILE).exists():
        before, kept = load(folder)
        if before != model:
            raise validation.UsageError(
                f"{folder / FILE} has scores of {before}; these are of {model}; give another --out"
            )
    by_key = {one.key: one for one in [*kept, *new]}
    order = list(catalogue.KNOWN)
    found = sorted(by_key.values(), key=lambda one: (order.index(one.benchmark), one.subset))
    content = {"model": model, "scores": [dataclasses.asdict(one) for one in found]}
    atomic.write_text(folder / FILE, strict_json.dumps(content, indent=1) + "\n")
    return found


def load(folder: pathlib.Path) -> tuple[str, list[Scored]]:
    """The model and the scores in a folder. Raises `UsageError` if there are none."""
    file = folder / FILE
    if not file.exists():
        raise validation.UsageError(
            f"{file} does not exist; expected the folder of an evaluation, such as "
            "runs/NAME/evals/step_N; evaluate first"
        )
    try:
        content = strict_json.loads(file.read_bytes())
        found = [
            Scored(**one | {"metrics": [Metric(**metric) for metric in one["metrics"]]})
            for one in content["scores"]
        ]
        return content["model"], found
    except (ValueError, TypeError, KeyError) as error:
        raise validation.UsageError(
            f"{file} holds no scores ({error}); evaluate again, with another --out"
        ) from error


def in_percent(metric: Metric, value: float) -> float:
    """A value or an error of a metric in its shown unit."""
    return 100 * value if metric.is_percent else value


def interval(metric: Metric) -> str:
    """A metric with its 95 % interval, or that it is pending."""
    if metric.value is None:
        return PENDING
    digits = 1 if metric.is_percent else 2
    text = f"{in_percent(metric, metric.value):.{digits}f}"
    if metric.standard_error is None:
        return text
    return f"{text} ± {Z95 * in_percent(metric, metric.standard_error):.{digits}f}"


def averages(found: Sequence[Scored], subset: str) -> dict[str, tuple[float, float] | list[str]]:
    """The paper's averages over 7 and 8 columns: (value, standard error) in percent, or the columns
    that are missing or pending."""
    first = {one.benchmark: one.metrics[0] for one in found if one.subset == subset}
    averaged = {}
    for name, columns in paper_tables.AVERAGES.items():
        lack = [c for c in columns if c not in first or first[c].value is None]
        if lack:
            averaged[name] = lack
            continue
        value = paper_tables.average({c: 100 * first[c].value for c in columns}, columns)
        errors = [100 * (first[c].standard_error or 0.0) for c in columns]
        averaged[name] = (value, math.hypot(*errors) / len(columns))
    return averaged


def lines(found: Sequence[Scored], *, paper_row: str | None) -> Iterator[str]:
    """The table of all scores, the paper's of `paper_row` beside them, and what is to be said of
    single ones."""
    paper = paper_tables.scores(paper_row) if paper_row else {}
    marks: list[str] = []

    def printed(column: str, digits: int) -> str:
        if column not in paper:
            return ""
        there = paper[column]
        if there.inconsistent is None:
            return f"{there.value:.{digits}f}"
        if there.inconsistent.why not in marks:
            marks.append(there.inconsistent.why)
        return f"{there.value:.{digits}f} [{marks.index(there.inconsistent.why) + 1}]"

    rows = [["benchmark", "metric", "score, 95 %", paper_row or "", "items", "cut", "characters"]]
    for one in found:
        for place, metric in enumerate(one.metrics):
            is_first = place == 0
            name = one.benchmark if one.subset == "paper" else f"{one.benchmark} ({one.subset})"
            rows.append([
                name if is_first else "",
                metric.name,
                interval(metric),
                printed(one.benchmark, 1 if metric.is_percent else 2) if is_first else "",
                f"{one.requests:,}" if is_first else "",
                f"{one.ended.get('length', 0):,}" if is_first and one.ended else "",
                f"{one.characters:,.0f}" if is_first and one.characters is not None else "",
            ])  # fmt: skip
        if one.benchmark == "alpaca_eval" and "output_length" in paper:
            rows[-len(one.metrics)][-1] += f" (paper {printed('output_length', 0)})"
    for subset in dict.fromkeys(one.subset for one in found):
        if not any(one.benchmark in paper_tables.SEVEN and one.subset == subset for one in found):
            continue
        for name, value in averages(found, subset).items():
            label = f"average of {name.rpartition('_')[2]}"
            ours = PENDING if isinstance(value, list) else f"{value[0]:.1f} ± {Z95 * value[1]:.1f}"
            rows.append([label, "", ours, printed(name, 1), "", "", ""])
    yield from columns(rows)
    for number, why in enumerate(marks, 1):
        yield f"[{number}] the paper contradicts itself: {why}"
    for source, values in (paper_tables.later(paper_row) if paper_row else {}).items():
        said = ", ".join(f"{column} {value:g}" for column, value in values.items())
        yield f"{source} has of {paper_row}: {said}"
    yield from _remarks(found)


def _remarks(found: Sequence[Scored]) -> Iterator[str]:
    for one in found:
        for note in one.notes:
            yield f"{one.key}: {note}"
        cut, count = one.ended.get("length", 0), sum(one.ended.values())
        if count and cut == count:
            yield f"{one.key}: no answer came to an end by itself; all {count:,} were cut off"
        if any(metric.value is None for metric in one.metrics):
            yield f"{one.key}: {PENDING} until a judge has said its word"


def group_lines(found: Sequence[Scored], headings: Sequence[str] = ()) -> Iterator[str]:
    """Tables of the groups of each benchmark: their scores and mean lengths. With `headings`, one
    for each of `found`, these are the same benchmark of several models, side by side."""
    if not headings:
        for one in found:
            yield from group_lines([one], [""])
        return
    first = found[0]
    tables = [_groups(one) for one in found]
    names = dict.fromkeys(group for table in tables for group in table)
    if len(names) < 2:
        return
    yield ""
    columns_ = [f"{heading} {what}".strip() for heading in headings for what in ("score", "chars")]
    rows = [[f"{first.benchmark}: {first.metrics[0].name}", *columns_]]
    for group in names:
        rows.append([group, *(cell for table in tables for cell in table.get(group, ("", "")))])
    yield from columns(rows)


def _groups(one: Scored) -> dict[str, tuple[str, str]]:
    metric = one.metrics[0]
    digits = 1 if metric.is_percent else 2
    found = {}
    for group in dict.fromkeys((*metric.groups, *one.group_characters)):
        value, length = metric.groups.get(group), one.group_characters.get(group)
        score = PENDING if metric.value is None else ""
        if value is not None:
            score = f"{in_percent(metric, value):.{digits}f}"
        found[group] = (score, "" if length is None else f"{length:,.0f}")
    return found


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells as lines, the first two columns to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if place < 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
