"""Several runs beside each other: curves overlaid, configs diffed, scores, origins."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from tulu_jax import gin_files, provenance, validation
from tulu_jax.evals import scores
from tulu_jax.studies import origins, pictures, run_states
from tulu_jax.training import metrics

CURVES = (
    "train/loss", "eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "train/kl",
    "train/grad_norm",
)  # fmt: skip
_SEED = re.compile(r"[._-]seed[._-]?\d+$")  # at the end of a workdir's name

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def curves(workdirs: Sequence[str]) -> bytes | None:
    """A PNG of `CURVES`; runs whose names differ in their seed alone are one line with a band."""
    runs: dict[str, list] = {}
    for workdir in workdirs:
        name = _SEED.sub("", epath.Path(workdir).name)
        runs.setdefault(name, []).append(metrics.read(workdir))
    return pictures.curves(runs, CURVES)


def tables(workdirs: Sequence[str]) -> list[Table]:
    """What differs between the configs, the scores of the last step, and what made each run; those
    of them that there are."""
    names = [epath.Path(workdir).name for workdir in workdirs]
    configs, unread = {}, []
    for name, workdir in zip(names, workdirs, strict=True):
        try:
            configs[name] = _config(workdir)
        except validation.UsageError as error:
            unread.append([name, " ".join(str(error).split())])
    found: list[Table] = []
    if rows := _differing(configs):
        found.append(("What differs between the configs", ["field", *configs], rows))
    if unread:
        found.append(("Configs that cannot be read here", ["run", "why"], unread))
    if rows := _scores(workdirs):
        found.append(("Scores of the last step, 95 %", ["benchmark", "metric", *names], rows))
    rows = [list(origins.of_tries(provenance.read(workdir)).values()) for workdir in workdirs]
    if any(any(row) for row in rows):
        header = ["run", *origins.of_tries(())]
        rows = [[name, *row] for name, row in zip(names, rows, strict=True)]
        found.append(("Where they come from", header, rows))
    return found


def _config(workdir: str) -> dict[str, Any]:
    file = epath.Path(workdir) / "config.gin"
    if not file.exists():
        raise validation.UsageError(f"{file} does not exist")
    return run_states.flat(gin_files.load(str(file), workdir=workdir))


def _differing(configs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row for each field that is not the same in all; '—' where a config has no such field."""
    fields = dict.fromkeys(field for config in configs.values() for field in config)
    rows = []
    for field in fields:
        values = [repr(c[field]) if field in c else "—" for c in configs.values()]
        if len(set(values)) > 1:
            rows.append([field, *values])
    return rows


def _scores(workdirs: Sequence[str]) -> list[list[str]]:
    """A row for each metric of a benchmark that some run was evaluated on."""
    found = [_last_scores(workdir) for workdir in workdirs]
    keys = dict.fromkeys(key for its in found for key in its)
    return [[*key, *(its.get(key, "—") for its in found)] for key in keys]


def _last_scores(workdir: str) -> dict[tuple[str, str], str]:
    folders = [pathlib.Path(p) for p in epath.Path(workdir).glob("evals/step_*")]
    numbered = {int(p.name[5:]): p for p in folders if p.name[5:].isdigit()}
    if not numbered:
        return {}
    try:
        _, scored = scores.load(numbered[max(numbered)])
    except validation.UsageError:
        return {}
    return {(one.key, m.name): scores.interval(m) for one in scored for m in one.metrics}
