"""What a study found: one object, as JSON, as Markdown, and as a self-contained HTML page."""

import base64
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

from tulu_jax import atomic, strict_json, validation
from tulu_jax.studies import estimates, origins, pictures, run_commands, run_states, stability
from tulu_jax.studies.declared import AS_FILE, Against, Design, Study
from tulu_jax.studies.run_states import Placed, State
from tulu_jax.training import metrics

NAMES = ("study.json", "study.md", "study.html")
_CELLS = ("cell", "score", "paper", "ours", "seeds", "difference", "verdict")
_STABILITY = (
    "run", "reward accuracy", "margin", "KL", "median gradient", "largest gradient",
    "spikes at", "diverged at",
)  # fmt: skip


def found(
    study: Study, scale: str, placed: Sequence[Placed], states: Mapping[str, State]
) -> dict[str, Any]:
    """Everything that the page says, in JSON's types; pictures are drawn from it and the curves."""
    design = study.design(scale)
    lines = [estimates.line(cell, design, states) for cell in design.cells]
    held = [estimates.held(one, design, states) for one in design.expected]
    return {
        "study": study.name,
        "title": study.title,
        "question": study.question,
        "scale": scale,
        "cells": [_cell(line) for line in lines],
        "expected": [_held(one) for one in held],
        "against": [_against(one, design, states) for one in design.against],
        "holes": list(dict.fromkeys(_holes(lines, held, placed, states, design))),
        "differences": list(origins.differences(placed, states, design)),
        "runs": [origins.row(one, states[one.name]) for one in placed],
        "varied": _varied(states),
        "stability": list(_stability(placed, states)) if design.stability else [],
    }


def write(
    study: Study, scale: str, placed: Sequence[Placed], states: Mapping[str, State],
    folder: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
    """Writes `NAMES` into `folder`; what `found` gave."""
    content = found(study, scale, placed, states)
    design = study.design(scale)
    lines = [estimates.line(cell, design, states) for cell in design.cells]
    drawn = {
        "Ours, and the paper's" if any(line.paper is not None for line in lines) else "Scores":
            pictures.cells(lines),
        "Curves of training; a band is the range over seeds":
            pictures.curves(_curves(placed, states), design.curves),
    }  # fmt: skip
    for one in design.against:
        points = _points(one, design, states)
        drawn[one.title] = pictures.against(points, str(one.x), [str(y) for y in one.ys])
    folder.mkdir(parents=True, exist_ok=True)
    json_name, markdown_name, html_name = NAMES
    atomic.write_text(folder / json_name, strict_json.dumps(content, indent=1) + "\n")
    atomic.write_text(folder / markdown_name, markdown(content))
    atomic.write_text(folder / html_name, html(content, drawn))
    return content


def markdown(content: Mapping[str, Any]) -> str:
    """The page as Markdown, without pictures."""
    out = [f"# {content['title']} ({content['scale']} scale)", "", content["question"]]
    for title, header, rows in _tables(content):
        out += ["", f"## {title}", ""]
        if header is None:
            out += [f"- {row}" for row in rows]
            continue
        out += [_row(header), _row(["---"] * len(header)), *map(_row, rows)]
    return "\n".join(out) + "\n"


def html(content: Mapping[str, Any], drawn: Mapping[str, bytes | None]) -> str:
    """The page as HTML, pictures inside; every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tulu_jax.studies", ""),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    inside = {name: base64.b64encode(png).decode() for name, png in drawn.items() if png}
    return environment.get_template("study.html").render(
        content=content, tables=list(_tables(content)), pictures=inside
    )


def _tables(content: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str] | None, list]]:
    """(title, header, rows) of each part that has something; a list has no header."""
    cells = [[cell[name] for name in _CELLS] for cell in content["cells"]]
    yield "The table", _CELLS, cells
    marks = dict.fromkeys(cell["mark"] for cell in content["cells"] if cell["mark"])
    if marks:
        yield "Where the paper contradicts itself", None, list(marks)
    for one in content["against"]:
        yield one["title"], one["header"], one["rows"]
    if content["expected"]:
        rows = [
            [one["says"], one["values"], f"{one['holds']} of {one['seeds']}"]
            for one in content["expected"]
        ]
        yield "Directions that were expected", ("expected", "value by seed", "holds in"), rows
    if content["holes"]:
        yield "Holes", None, content["holes"]
    if content["differences"]:
        yield "Differences beyond what the study varies", None, content["differences"]
    if content["stability"]:
        rows = [[one[name] for name in _STABILITY] for one in content["stability"]]
        yield "Stability", _STABILITY, rows
    if content["varied"]:
        names = list(dict.fromkeys(name for its in content["varied"].values() for name in its))
        rows = [[f, *(its.get(n, "") for n in names)] for f, its in content["varied"].items()]
        yield "What differs between the configs", ("field", *names), rows
    if content["runs"]:
        header = tuple(content["runs"][0])
        yield "Runs", header, [list(row.values()) for row in content["runs"]]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _number(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "—"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
    return f"{value:{'+' if signed else ''}.{digits}f}"


def _with(value: float | None, half: float | None, *, signed: bool = False) -> str:
    text = _number(value, signed=signed)
    return text if half is None or value is None else f"{text} ± {_number(half)}"


def _cell(line: estimates.Line) -> dict[str, Any]:
    """A line in words and as numbers."""
    ours, is_apart = line.ours, line.cell.minus is not None
    return {
        "cell": str(line.cell),
        "score": str(line.cell.score),
        "paper": _number(line.paper, signed=is_apart) + (" [!]" if line.mark else ""),
        "ours": "—" if ours is None else _with(ours.value, ours.half, signed=is_apart),
        "seeds": "0" if ours is None else str(len(ours.by_seed)),
        "difference": _with(line.difference, line.half, signed=True),
        "verdict": line.verdict or ("no value" if ours is None else "—"),
        "mark": line.mark,
        "numbers": {
            "paper": line.paper,
            "paper_cell": line.cell.paper and list(line.cell.paper),
            "ours": ours and ours.value,
            "half": ours and ours.half,
            "by_seed": ours and {_seed(seed): value for seed, value in ours.by_seed.items()},
            "difference": line.difference,
            "difference_half": line.half,
        },
    }


def _points(
    one: Against, design: Design, states: Mapping[str, State]
) -> dict[str, dict[str, estimates.Estimate | None]]:
    """The estimates of a picture, by run and score."""
    return {
        run: {str(score): estimates.point(run, score, design, states) for score in (one.x, *one.ys)}
        for run in one.runs
    }


def _against(one: Against, design: Design, states: Mapping[str, State]) -> dict[str, Any]:
    """The table of a picture."""
    points = _points(one, design, states)
    return {
        "title": one.title,
        "header": ["run", str(one.x), *map(str, one.ys)],
        "rows": [
            [run, *("—" if e is None else _with(e.value, e.half) for e in its.values())]
            for run, its in points.items()
        ],
    }


def _held(one: estimates.Held) -> dict[str, Any]:
    values = [f"{_seed(seed)}: {_number(v, signed=True)}" for seed, v in one.by_seed.items()]
    return {
        "says": one.expected.says,
        "values": ", ".join(values) or "—",
        "holds": len(one.seeds),
        "seeds": len(one.by_seed),
    }


def _seed(seed) -> str:
    return "as the file has it" if seed is AS_FILE else str(seed)


def _holes(lines, held, placed, states: Mapping[str, State], design: Design) -> Iterator[str]:
    for one in placed:
        state = states[one.name]
        if state.kind != run_states.DONE:
            yield state.says
        elif lack := run_commands.lacking(one, state, design):
            yield f"{one.name}: evaluation pending on {', '.join(lack)}"
    for line in lines:
        if line.hole and line.ours is None:
            yield f"{line.cell}, {line.cell.score} has no value: {line.hole}"
        elif line.hole:
            yield f"seeds unequal: {line.hole}"
    for one in held:
        if one.hole:
            yield f"“{one.expected.says}” cannot be told: {one.hole}"


def _varied(states: Mapping[str, State]) -> dict[str, dict[str, str]]:
    """The config diff: by field, the value of each run, its first seed standing for all."""
    first: dict[str, State] = {}
    for name, state in states.items():
        if state.config:
            first.setdefault(name.partition(", seed ")[0], state)
    return {
        field: {name: repr(value) for name, value in values.items()}
        for field, values in run_states.varied(first).items()
    }


def _lines(one: Placed, state: State) -> list[dict]:
    if state.kind in (run_states.MISSING, run_states.OTHER):
        return []
    try:
        return metrics.read(one.workdir)
    except validation.UsageError:
        return []


def _curves(placed: Sequence[Placed], states: Mapping[str, State]) -> dict[str, list]:
    runs: dict[str, list] = {}
    for one in placed:
        if lines := _lines(one, states[one.name]):
            runs.setdefault(one.run.name, []).append(lines)
    return runs


def _stability(placed: Sequence[Placed], states: Mapping[str, State]) -> Iterator[dict[str, str]]:
    for one in placed:
        if lines := _lines(one, states[one.name]):
            its = stability.report(lines)
            numbers = (
                its.accuracy, its.margin, its.kl, its.median_gradient, its.largest_gradient
            )  # fmt: skip
            spikes = ", ".join(map(str, its.spikes)) or "none"
            diverged = "never" if its.diverged is None else f"update {its.diverged}"
            yield dict(
                zip(_STABILITY, [one.name, *map(_number, numbers), spikes, diverged], strict=True)
            )
