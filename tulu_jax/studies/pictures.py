"""The pictures of a study, as PNG: the paper beside ours, and curves with seeds as bands."""

import io
from collections.abc import Mapping, Sequence

from tulu_jax.studies.estimates import Estimate, Line

MOST_LINES = 40  # of a picture of cells
_WIDTH = 9.0  # inches


def cells(lines: Sequence[Line]) -> bytes | None:
    """Ours with its interval, and the paper's, a row for each cell; None without any of ours."""
    shown = [line for line in lines if line.ours is not None][:MOST_LINES]
    if not shown:
        return None
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(_WIDTH, 1.2 + 0.32 * len(shown)))
    for place, line in enumerate(shown):
        half = line.ours.half
        axis.errorbar(
            line.ours.value, place, xerr=None if half is None else [[half], [half]], fmt="o",
            color="#1f5fa8", capsize=3, label="ours, 95 %" if place == 0 else None,
        )  # fmt: skip
        for value in line.ours.by_seed.values() if len(line.ours.by_seed) > 1 else ():
            axis.plot(value, place, "|", color="#1f5fa8", alpha=0.6)
        if line.paper is not None:
            label = None if any(one.paper is not None for one in shown[:place]) else "paper"
            axis.plot(line.paper, place, "D", color="#c4541a", markersize=5, label=label)
    axis.set_yticks(range(len(shown)), [f"{one.cell}: {one.cell.score}" for one in shown])
    axis.invert_yaxis()
    if any(one.cell.minus for one in shown):
        axis.axvline(0, color="#888888", linewidth=0.8)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="best")
    return _png(pyplot, figure)


def against(
    points: Mapping[str, Mapping[str, Estimate | None]], x: str, ys: Sequence[str]
) -> bytes | None:
    """A panel for each of `ys`, against `x`: of each run its estimates with their 95 % intervals,
    and its seeds as dots. `points` has the estimates by run and score; None without any."""
    shown = {
        run: its for run, its in points.items() if its[x] and any(its[y] for y in ys)
    }  # fmt: skip
    if not shown:
        return None
    pyplot = _pyplot()
    rows = -(-len(ys) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(_WIDTH, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(ys) :]:
        axis.remove()
    for axis, name in zip(axes.flat, ys, strict=False):
        for number, (run, its) in enumerate(shown.items()):
            if (y := its[name]) is None:
                continue
            color = f"C{number % 10}"
            axis.errorbar(
                its[x].value, y.value, xerr=its[x].half, yerr=y.half, fmt="o", color=color,
                capsize=2, label=run,
            )  # fmt: skip
            for seed in its[x].by_seed.keys() & y.by_seed.keys():
                axis.plot(its[x].by_seed[seed], y.by_seed[seed], ".", color=color, alpha=0.5)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(x, fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return _png(pyplot, figure)


def curves(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, float | None]]]], names: Sequence[str]
) -> bytes | None:
    """A panel for each metric that some run has: of each run the mean over its seeds, and their
    range as a band. `runs` has the lines of metrics of each seed, by run."""
    panels = [
        name for name in names
        if any(line.get(name) is not None for seeds in runs.values() for s in seeds for line in s)
    ]  # fmt: skip
    if not panels:
        return None
    pyplot = _pyplot()
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (_WIDTH if columns > 1 else _WIDTH / 1.5, 3.2 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, name in zip(axes.flat, panels, strict=False):
        for number, (run, seeds) in enumerate(runs.items()):
            band(axis, run, seeds, name, color=f"C{number % 10}")
        axis.set_title(name)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return _png(pyplot, figure)


def band(
    axis,
    label: str,
    seeds: Sequence[Sequence[Mapping[str, float | None]]],
    name: str,
    *,
    color: str,
) -> None:
    """One metric of one run: the mean of the seeds at each update that all have, their range
    around it. A run has the same colour in every panel, also where another has no such metric."""
    found = [
        {line["step"]: line[name] for line in lines if line.get(name) is not None}
        for lines in seeds
    ]
    found = [one for one in found if one]
    if not found:
        return
    steps = sorted(set.intersection(*(set(one) for one in found)))
    values = [[one[step] for one in found] for step in steps]
    means = [sum(at) / len(at) for at in values]
    axis.plot(steps, means, label=label, linewidth=1.3, color=color)
    if len(found) > 1:
        low, high = [min(at) for at in values], [max(at) for at in values]
        axis.fill_between(steps, low, high, alpha=0.2, color=color, linewidth=0)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _png(pyplot, figure) -> bytes:
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
