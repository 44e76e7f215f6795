"""One page about one or more runs: their curves, their scores, and what they say.

Of the run of a reward model it also leaves `calibration.json` and `calibration.png` in the workdir.

Examples:
  python -m tulu_jax.report --workdirs=runs/tulu_tiny_sft,runs/tulu_tiny_dpo
  python -m tulu_jax.report --workdirs=runs/stories260k_sft --out=/tmp/page.html
"""

import base64
import fnmatch
import io
import json
from collections.abc import Iterable, Iterator

import jinja2
from absl import app, flags
from etils import epath

from tulu_jax import atomic, cli, validation
from tulu_jax.evals import held_out_prompts
from tulu_jax.objectives import reward_feed
from tulu_jax.studies import side_by_side
from tulu_jax.training import metrics

_WORKDIRS = flags.DEFINE_list("workdirs", None, "Workdirs of runs, in order.", required=True)
_OUT = flags.DEFINE_string("out", "report.html", "Self-contained HTML page to write.")

# (title, patterns of metrics drawn together), one panel for each that a run has
PANELS = (
    ("loss", ("train/loss", "eval/loss")),
    ("rewards", ("train/rewards/chosen", "train/rewards/rejected", "eval/rewards/margins")),
    ("reward accuracy", ("train/rewards/accuracies", "eval/rewards/accuracies")),
    ("gradient norm", ("train/grad_norm",)),
    ("log-probability of an answer", ("train/logps/*",)),
    ("log π − log π_ref (KL estimate)", ("train/kl", "eval/kl")),
    ("tokens of an answer", ("train/lengths/*", "train/rollout/length")),
    ("reward of an answer", ("train/rollout/score", "train/rollout/reward")),
    ("KL from the reference, nats an answer", ("train/rollout/kl",)),
    ("share of answers", ("train/rollout/ended", "train/rollout/empty")),
    ("losses of PPO", ("train/policy/loss", "train/value/loss")),
    ("share that was clipped", ("train/policy/clipped", "train/value/clipped")),
    ("variance of returns explained", ("train/value/explained",)),
    ("share of pairs that were cut", ("train/truncated", "eval/truncated")),
    ("accuracy by source", ("eval/by_source/*/rewards/accuracies",)),
    ("accuracy by length", ("eval/by_length/*/rewards/accuracies",)),
    ("useful tokens/s", ("perf/nonpadding_tokens_per_second",)),
)
COLUMNS = 5
PROMPTS_SHOWN = 12
CALIBRATION = "eval/calibration/"


def series(lines: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was written and finite."""
    written = [line for line in lines if line.get(name) is not None]
    return [float(line["step"]) for line in written], [float(line[name]) for line in written]


def matching(lines: list[dict], patterns: Iterable[str]) -> list[str]:
    """The metrics that were written and match one of the patterns, in the order of these."""
    names = sorted({name for line in lines for name in line if line[name] is not None})
    return [name for pattern in patterns for name in fnmatch.filter(names, pattern)]


def draw(lines: list[dict], title: str) -> bytes:
    """A PNG of the panels this run has metrics for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(t, found) for t, patterns in PANELS if (found := matching(lines, patterns))]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, metric_names) in zip(axes.flat, panels, strict=False):
        for metric in metric_names:
            steps, values = series(lines, metric)
            marker = "o" if metric.startswith("eval") else None
            axis.plot(steps, values, label=metric, marker=marker, linewidth=1.2)
        axis.set_title(name)
        axis.set_xlabel("update")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def calibration(lines: list[dict]) -> dict | None:
    """Of the last evaluation of a reward model its `step`, calibration `error`, and `bins`, each
    with its number of `pairs`, how `sure` the model was of them, the mean of σ(|margin|), and the
    share it has `won`; None of another run."""
    found = [line for line in lines if line.get(f"{CALIBRATION}error") is not None]
    if not found:
        return None
    last, bins = found[-1], []
    names = ("pairs", "sure", "won")
    for number in range(reward_feed.BINS):
        values = [last.get(f"{CALIBRATION}{number}/{name}") for name in names]
        if None not in values:
            bins.append(dict(zip(names, values, strict=True)))
    return {"step": last["step"], "error": last[f"{CALIBRATION}error"], "bins": bins}


def draw_calibration(found: dict, title: str) -> bytes:
    """A PNG of what `calibration` found: the share won against how sure the model was."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sure, won, pairs = ([b[name] for b in found["bins"]] for name in ("sure", "won", "pairs"))
    figure, axis = pyplot.subplots(figsize=(4.5, 4))
    axis.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1)
    axis.scatter(sure, won, s=[20 + 200 * n / max(1, sum(pairs)) for n in pairs])
    axis.set_xlabel("σ(|margin|)")
    axis.set_ylabel("share of pairs won")
    axis.set_title(f"{title}, update {found['step']}: error {found['error']:.3f}", fontsize=9)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def keep_calibration(workdir: str) -> None:
    """Writes `calibration.json` and `calibration.png` of the run of a reward model."""
    folder, found = epath.Path(workdir), calibration(metrics.read(workdir))
    if found is not None:
        atomic.write_text(folder / "calibration.json", json.dumps(found, indent=2) + "\n")
        atomic.write_bytes(folder / "calibration.png", draw_calibration(found, folder.name))


def summary(lines: list[dict]) -> list[tuple[str, float, float]]:
    """(metric, first, last) of the evaluations, of the training loss, and of rollouts."""
    bins = f"{CALIBRATION}[0-9]/*"
    named = {n for line in lines for n in line if n.startswith("eval/")}
    names = sorted(named - set(fnmatch.filter(named, bins))) + ["train/loss"]
    names += [f"train/rollout/{name}" for name in ("score", "kl", "length")]  # of PPO
    found = [(name, series(lines, name)[1]) for name in names]
    return [(name, values[0], values[-1]) for name, values in found if values]


def scores(workdir: str) -> list[tuple[str, dict]]:
    """What `evaluate` left in a workdir: ("before training" or "at update N", scores and replies),
    in their order."""
    return [
        ("before training" if found["step"] is None else f"at update {found['step']}", found)
        for found in held_out_prompts.saved(workdir)
    ]


def page(workdirs: list[str]) -> str:
    """The HTML of all runs, pictures inside; every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tulu_jax", ""),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    together = _together(workdirs) if len(workdirs) > 1 else None
    return environment.get_template("report.html").render(
        runs=map(_shown, workdirs), together=together
    )


def _together(workdirs: list[str]) -> dict:
    """What the page has of several runs side by side."""
    picture = side_by_side.curves(workdirs)
    return {
        "picture": picture and base64.b64encode(picture).decode(),
        "tables": side_by_side.tables(workdirs),
    }


def _shown(workdir: str) -> dict:
    """What the page has of one run: its name, pictures, and tables of a header and rows."""
    lines, name = metrics.read(workdir), epath.Path(workdir).name
    rows = [[n, f"{first:.4f}", f"{last:.4f}"] for n, first, last in summary(lines)]
    tables = [(["metric", "first", "last"], rows)]
    scored = scores(workdir)
    for label, found in scored:
        cells = [[n, f"{value:.3f}"] for n, value in found["scores"].items()]
        tables.append(([f"held-out prompts of tulu_tiny, {label}", "share"], cells))
    if scored and scored[-1][1]["step"] is not None:
        last = scored[-1][1]["replies"][:PROMPTS_SHOWN]
        said = [[r["prompt"], r["answer"], r["reply"]] for r in last]
        tables.append((["prompt", "right answer", "reply"], said))
    pictures = [draw(lines, name)]
    if (found := calibration(lines)) is not None:
        pictures.append(draw_calibration(found, name))
    encoded = [base64.b64encode(picture).decode() for picture in pictures]
    return {"name": name, "pictures": encoded, "tables": tables}


def problems(workdirs: list[str]) -> Iterator[str]:
    """The workdirs without a curve to show."""
    for workdir in workdirs:
        try:
            if not matching(metrics.read(workdir), (pattern for _, p in PANELS for pattern in p)):
                yield f"{workdir}/{metrics.FILE} has no metric to show: the run has made no update"
        except validation.UsageError as error:
            yield str(error)


def main(argv: list[str]) -> None:
    """Writes the page and prints its tables."""
    del argv
    with validation.refusing():
        workdirs = [validation.expanded(workdir) for workdir in _WORKDIRS.value]
        out = validation.expanded(_OUT.value)
        validation.raise_if(problems(workdirs))
        for workdir in workdirs:
            keep_calibration(workdir)
            print(epath.Path(workdir).name)
            for name, first, last in summary(metrics.read(workdir)):
                print(f"  {name:28} {first:10.4f} -> {last:10.4f}")
            for label, found in scores(workdir):
                values = ", ".join(f"{n} {value:.3f}" for n, value in found["scores"].items())
                print(f"  held-out prompts, {label}: {values}")
        atomic.write_text(out, page(workdirs))
    print(f"Wrote {out}")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
