"""The dry run's table and picture."""

from etils import epath

from tulu_jax import atomic
from tulu_jax.planning import calibration, plan

GIB = 2**30


def table(results: list[plan.Result]) -> str:
    """One column a result: memory, time, the whole run, and what binds."""
    columns = [_column(result) for result in results]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    rows = [[label, *(column.get(label, "") for column in columns)] for label in labels]
    lines = aligned(rows)
    for result in results:
        if not result.fits:
            lines.append(f"{result.topology.name} does not fit: {result.refused or 'HBM is full'}")
            lines.append(f"  To change: {plan.advice(result)}")
        if result.step is None:
            continue
        if result.step.band.extrapolated:
            lines.append(beyond(result.topology.name, result.step.band))
        faults = result.step.faults
        lines += [f"{result.topology.name} loses to its layout: {fault}" for fault in faults]
    return "\n".join(lines)


def aligned(rows: list[list[str]]) -> list[str]:
    """A line for each row: the first column flush left, the others flush right."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]


def _column(result: plan.Result) -> dict[str, str]:
    head = {
        "slice": result.topology.name,
        "cloud name": result.topology.accelerator_type,
        "chips": f"{result.topology.num_chips}",
        "fits": "yes" if result.fits else "NO",
    }
    if result.step is None:
        return head
    step, memory, cost = result.step, result.step.memory, result.step.cost
    axes = " x ".join(f"{name} {size}" for name, size in step.mesh.items() if size > 1)
    wire = {
        f"GB sent, {kind} over {axes}": f"{size / 1e9:,.2f}"
        for (kind, axes), size in sorted(cost.wire.items(), key=lambda item: -item[1])
        if size > 1e7
    }
    return head | {
        "mesh": axes or "1 device",
        "micro-batch": f"{result.config.micro_batch_size or result.config.batch_size}",
        "remat": result.config.execution.remat_policy,
        "parts of rows": f"{result.config.execution.row_parts}",
        "gathered by pairs first": "yes" if result.config.mesh.pairs_first else "no",
        "products apart": "yes" if result.config.execution.products_apart else "no",
        "weights gathered in": result.config.execution.gather_dtype
        or result.config.execution.compute_dtype,
        "GiB a device: parameters": gib(memory.params),
        **({"  frozen": gib(memory.frozen)} if memory.frozen else {}),
        "  moments": gib(memory.moments),
        "  temporaries": gib(memory.temporaries),
        "    of them gradients": gib(memory.gradients),
        "    kept for backward": gib(memory.kept),
        "  code": gib(memory.code),
        "  peak / HBM": f"{gib(memory.peak)} / {gib(memory.hbm)}",
        "  to spare": f"{result.spare:.1%}",
        "model PFLOP an update": f"{step.model_flops / 1e15:,.2f}",
        "executed": f"{step.executed_flops / 1e15:,.2f}",
        "seconds an update": f"{cost.seconds:.3f}",
        "  between, by calibration": between(step.band, cost.seconds, 3),
        "  matrix units": f"{cost.matrix:.3f}",
        "  attention": f"{cost.attention:.3f}",
        "  HBM": f"{cost.memory:.3f}",
        "  interconnect, waited for": f"{cost.interconnect:.3f}",
        "  interconnect, hidden": f"{cost.hidden:.3f}",
        "binds": cost.binding,
        **({"kernels not counted": ", ".join(cost.unknown)} if cost.unknown else {}),
        **wire,
        "tokens/s": f"{step.tokens_per_second:,.0f}",
        "  a chip": f"{step.tokens_per_second / result.topology.num_chips:,.0f}",
        "MFU, visible attention counted": f"{step.mfu:.1%}",
        "  attention counted whole": f"{step.whole_mfu:.1%}",
        "examples/s": f"{step.examples / cost.seconds:,.1f}",
        "updates": f"{result.updates:,}",
        "hours": f"{result.hours:.2f}",
        "  between": between(step.band, result.hours, 2),
        "  reference pass": f"{result.first_seconds / 3600:.2f}",
        **_first(result),
        "chip-hours": f"{result.hours * result.topology.num_chips:,.0f}",
        "compiled in, s": f"{step.compile_seconds:.0f}",
        **{
            f"attention of a row in blocks of {block}, ms": f"{milliseconds:.3f}"
            for block, milliseconds in result.attention_milliseconds.items()
        },
    }


def _first(result: plan.Result) -> dict[str, str]:
    first = result.first_pass
    return (
        {} if first is None else {"    rows, s of each": f"{first.rows}, {first.cost.seconds:.3f}"}
    )


def between(band: calibration.Band, value: float, digits: int) -> str:
    """The least and the most of what is in proportion to a predicted time: '0.70 to 0.91'."""
    return " to ".join(f"{end:,.{digits}f}" for end in band.of(value))


def beyond(name: str, band: calibration.Band) -> str:
    """A line on a prediction that waits more than what was calibrated."""
    return (
        f"{name} waits for the interconnect during {band.share:.0%} of the time; the calibration "
        f"ends at {calibration.MOST:.0%}, so the range is extrapolated: take it as a ranking"
    )


def gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def draw(results: list[plan.Result], path: epath.Path) -> None:
    """A bar of memory and a bar of time for each result that compiled, as PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    compiled = [result for result in results if result.step]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.5 + 0.6 * max(1, len(compiled))))
    names = [_name(result) for result in compiled]
    memory = [result.step.memory for result in compiled]
    _bars(
        left,
        names,
        {
            "parameters": [m.params / GIB for m in memory],
            "frozen": [m.frozen / GIB for m in memory],
            "moments": [m.moments / GIB for m in memory],
            "kept for backward": [min(m.kept, m.temporaries) / GIB for m in memory],
            "other temporaries": [max(0, m.temporaries - m.kept) / GIB for m in memory],
            "code": [m.code / GIB for m in memory],
        },
        "GiB a device; the line is its HBM",
    )
    for n, m in enumerate(memory):
        left.plot([m.hbm / GIB] * 2, [n - 0.4, n + 0.4], color="black")
    costs = [result.step.cost for result in compiled]
    _bars(
        right,
        names,
        {
            "matrix units": [c.matrix for c in costs],
            "attention": [c.attention for c in costs],
            "HBM": [c.memory for c in costs],
            "interconnect": [c.interconnect for c in costs],
        },
        "predicted seconds an update",
    )
    figure.tight_layout()
    with atomic.writing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def _name(result: plan.Result) -> str:
    step = result.step
    rate = f"{step.tokens_per_second / result.topology.num_chips:,.0f} tokens/s a chip"
    mfu = f"MFU {step.mfu:.0%} visible, {step.whole_mfu:.0%} whole attention"
    return f"{result.topology.name}\n{rate}\n{mfu}"


def _bars(axes, names: list[str], parts: dict[str, list[float]], label: str) -> None:
    start = [0.0] * len(names)
    for part, sizes in parts.items():
        axes.barh(range(len(names)), sizes, left=start, label=part)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(fontsize="small")
