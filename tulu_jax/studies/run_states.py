"""Where each run of a study lies, the gin file that it is, and what there is of it already."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from tulu_jax import atomic, gin_files, provenance, strict_json, validation
from tulu_jax.data import registry
from tulu_jax.evals import scores
from tulu_jax.recipe import TrainConfig
from tulu_jax.studies.declared import AS_FILE, Design, Run
from tulu_jax.training import checkpoint_folders

MISSING, UNFINISHED, OTHER, DONE = "missing", "unfinished", "of another config", "done"
# What changes no number but by rounding: places, how often something is written, the mesh.
_NOT_COMPARED = (
    "workdir", "reference_dir", "logging", "checkpoint", "mesh", "micro_batch_size", "eval_every",
    "data.workers", "data.cache_dir", "data.data_root", "execution.adapter",
    "execution.remat_policy", "execution.row_parts", "execution.products_apart",
    "execution.balanced", "execution.pairs_first",
)  # fmt: skip
_PATHS = (
    "base",
    "adapter_from",
    "data.tokenizer",
    "objective.reward_from",
)  # of which the last part is compared
_OF_SEEDS = ("seed", "data.seed", "base", "objective.reward_from")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """A run with one seed: its gin file, a name or a path, its workdir, and those of its base and
    of its reward model, of what scores its answers, and with `best_of` the run that draws them."""

    run: Run
    seed: int | None
    gin_file: str
    workdir: str
    base: str | None = None
    reward: str | None = None
    scored_by: str | None = None
    drawn_by: "Placed | None" = None
    asked: tuple[str, ...] = ()  # flags of its evaluation, whose scores lie apart from others

    @property
    def needs(self) -> Mapping[str, str]:
        """The names of the runs whose weights it takes, by their workdirs."""
        found = {
            self.base: self.run.base, self.reward: self.run.reward,
            self.scored_by: self.run.scored_by,
        }  # fmt: skip
        return {workdir: name for workdir, name in found.items() if workdir and name}

    @property
    def name(self) -> str:
        """Such as 'dpo, seed 2'."""
        return self.run.name if self.seed is AS_FILE else f"{self.run.name}, seed {self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What there is of a run: `kind`, and in `says` what is wrong if it is not done; the step that
    it has reached; the fields of its config; its tries (`provenance.read`), and the scores of its
    last step with the folder that they lie in. Of a run that is only prepared, its data card."""

    kind: str
    says: str
    step: int | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tries: Sequence[Mapping[str, Any]] = ()
    folder: pathlib.Path | None = None
    scored: Sequence[scores.Scored] = ()
    workdir: str = ""
    card: Mapping[str, Any] | None = None


def place(
    design: Design, runs: Sequence[Run], *, configs: pathlib.Path, root: str, below_bucket: bool
) -> list[Placed]:
    """The runs with their seeds, in an order in which they can be trained: the first seed of all,
    then the second, so that the table is whole early. Workdirs lie below `root`. A run with seeds
    or overrides becomes a gin file in `configs`, that starts from the workdir of its base, or
    `below_bucket` from runs/NAME there. Without them its own file says what it starts from."""
    found = []
    for number in range(max(len(run.tries) for run in runs)):
        for run in (run for run in runs if number < len(run.tries)):
            seed, gin_file = run.tries[number], run.gin_file
            where = "runs" if below_bucket else os.path.abspath(root)
            base, reward, scored_by = (
                _workdir_of(design, name, seed, where)
                for name in (run.base, run.reward, run.scored_by)
            )
            drawn_by = None
            if run.best_of is not None:
                drawn_by = next(p for p in found if _workdir(where, p.run, p.seed) == base)
                gin_file = drawn_by.gin_file
            elif run.overrides or seed is not AS_FILE or (base and not below_bucket):
                file = configs / f"{_stem(run, seed)}.gin"
                configs.mkdir(parents=True, exist_ok=True)
                _write(file, gin_text(run, seed, base, reward))
                gin_file = str(file)
            one = Placed(
                run=run, seed=seed, gin_file=gin_file, workdir=_workdir(root, run, seed),
                base=base, reward=reward, scored_by=scored_by, drawn_by=drawn_by,
                asked=() if below_bucket else design.asked,
            )  # fmt: skip
            found.append(one)
    return found


def _workdir_of(design: Design, name: str | None, seed: int | None, root: str) -> str | None:
    """The workdir of the run `name` with that seed, or the first that it has."""
    if name is None:
        return None
    of = design.run(name)
    return _workdir(root, of, seed if seed in of.tries else of.tries[0])


def gin_text(run: Run, seed: int | None, base: str | None, reward: str | None = None) -> str:
    """The gin file of a run with one seed, `base` being the workdir that it starts from, `reward`
    that of its reward model."""
    lines = [
        "from __gin__ import dynamic_registration",
        "from tulu_jax import recipe",
        "from tulu_jax.data import loader",
        "from tulu_jax.data import registry",
        "",
        f"include {run.gin_file!r}",
        "",
    ]
    values = dict(run.overrides)
    if base is not None:
        values["BASE"] = base
    if reward is not None:
        values["REWARD"] = reward
    if seed is not AS_FILE:
        values |= {"recipe.TrainConfig.seed": seed, "loader.DataConfig.seed": seed}
    for name, value in values.items():
        is_reference = isinstance(value, str) and value.startswith(("@", "%"))
        lines.append(f"{name} = {value if is_reference else repr(value)}")
    if not any("registry." in line for line in lines[7:]):
        lines.remove("from tulu_jax.data import registry")
    return "\n".join(lines) + "\n"


def config(placed: Placed) -> TrainConfig:
    """The config of a run, as `train` would have it. Raises `UsageError`."""
    return gin_files.load(placed.gin_file, workdir=placed.workdir)


def state(placed: Placed) -> State:
    """What lies in the workdir of a run, compared with what the study declares."""
    workdir = epath.Path(placed.workdir)
    if placed.drawn_by is not None:
        return _drawn(placed, placed.drawn_by)
    if placed.run.initial is not None:
        return _initial(placed)
    if placed.run.only_prepared:
        return _prepared(placed, workdir / "data" / "card.json")
    saved = workdir / "config.gin"
    steps = _steps(workdir)
    if not saved.exists() or not steps:
        return State(kind=MISSING, says=f"{placed.name}: no checkpoint in {workdir}")
    try:
        found = flat(gin_files.load(str(saved), workdir=placed.workdir))
        wanted = flat(config(placed))
    except validation.UsageError as error:
        return State(kind=OTHER, says=f"{placed.name}: its config cannot be read: {error}")
    step, tries = steps[-1], provenance.read(placed.workdir)
    about = {"step": step, "config": found, "tries": tries, "workdir": placed.workdir}
    if problems := list(differences(found, wanted)):
        return State(kind=OTHER, says=f"{placed.name}: {'; '.join(problems)}", **about)
    last = num_steps(placed.workdir, step)
    if step < last:
        says = f"{placed.name}: unfinished, at step {step:,} of {last:,}"
        return State(kind=UNFINISHED, says=says, **about)
    folder = evals_folder(placed, step)
    return State(kind=DONE, says="", folder=folder, scored=_scores(folder), **about)


def _scores(folder: pathlib.Path) -> list[scores.Scored]:
    try:
        return scores.load(folder)[1]
    except validation.UsageError:
        return []


def _drawn(placed: Placed, of: Placed) -> State:
    """The state of a run that is only evaluated, with the weights of another."""
    weights = state(of)
    if weights.kind != DONE:
        return State(kind=weights.kind, says=f"{placed.name}: of {weights.says}")
    folder = evals_folder(placed, weights.step)
    return State(
        kind=DONE, says="", step=weights.step, config=weights.config, tries=weights.tries,
        folder=folder, scored=_scores(folder), workdir=placed.workdir,
    )  # fmt: skip


def _initial(placed: Placed) -> State:
    """The state of a run that is only evaluated, with the weights that its file starts from."""
    folder = evals_folder(placed, None)
    return State(
        kind=DONE, says="", config=flat(config(placed)), folder=folder, scored=_scores(folder),
        workdir=placed.workdir,
    )  # fmt: skip


def _prepared(placed: Placed, file: epath.Path) -> State:
    """The state of a run of which the data card is wanted."""
    if not file.exists():
        return State(kind=MISSING, says=f"{placed.name}: no {file}; its rows were not prepared")
    try:
        card = strict_json.loads(file.read_text())
    except ValueError as error:
        return State(kind=OTHER, says=f"{placed.name}: {file} is not JSON ({error})")
    wanted = registry.name_of(config(placed).data.train)
    if card.get("mixture") != wanted:
        says = f"{placed.name}: {file} is of {card.get('mixture')!r}, expected {wanted!r}"
        return State(kind=OTHER, says=says)
    return State(kind=DONE, says="", workdir=placed.workdir, card=card)


def num_steps(workdir: str, step: int) -> int:
    """The updates of the whole run, as its checkpoint of `step` has them."""
    from tulu_jax.training import checkpoint

    about = checkpoint.Checkpoints(workdir).about(step)
    return int(about["must_match"].get("num_steps", 0))


def evals_folder(placed: Placed, step: int | None) -> pathlib.Path:
    """Where `evaluate` leaves what it finds of a step, None of one with `initial`; of the best of
    n, which has one, in a folder of its own."""
    workdir = placed.workdir.rstrip("/")
    parent = f"evals/{epath.Path(workdir).name}" if "://" in workdir else f"{workdir}/evals"
    apart = "".join(f",{flag.lstrip('-')}" for flag in placed.asked)
    if placed.drawn_by is not None:
        return pathlib.Path(parent)
    return pathlib.Path(parent) / f"{'initial' if step is None else f'step_{step}'}{apart}"


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of a config by their dotted names, but for those that change no number."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if name in _NOT_COMPARED:
            continue
        if dataclasses.is_dataclass(value):
            found |= flat(value, f"{name}.")
        elif name in _PATHS and isinstance(value, str):
            found[name] = value.rstrip("/").rpartition("/")[2]
        else:
            found[name] = value
    return found


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """A line for each field of a run that is not as the study has it."""
    for name in dict.fromkeys((*wanted, *found)):
        if found.get(name) != wanted.get(name):
            yield (
                f"{name} = {found.get(name)!r}, expected {wanted.get(name)!r}; train it again "
                "elsewhere (--out), or move it away"
            )


def varied(states: Mapping[str, State]) -> dict[str, dict[str, Any]]:
    """The fields that differ between runs, seeds aside, with the value of each run."""
    configs = {name: state.config for name, state in states.items() if state.config}
    names = dict.fromkeys(field for config in configs.values() for field in config)
    found = {}
    for field in names:
        values = {name: config.get(field) for name, config in configs.items()}
        if field not in _OF_SEEDS and len({repr(value) for value in values.values()}) > 1:
            found[field] = values
    return found


def _workdir(root: str, run: Run, seed: int | None) -> str:
    return f"{root.rstrip('/')}/{_stem(run, seed)}"


def _stem(run: Run, seed: int | None) -> str:
    return run.name if seed is AS_FILE else f"{run.name}.seed_{seed}"


def _write(file: pathlib.Path, text: str) -> None:
    if not file.exists() or file.read_text() != text:
        atomic.write_text(file, text)


def _steps(workdir: epath.Path) -> list[int]:
    folder = workdir / checkpoint_folders.FOLDER
    names = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    return sorted(int(path.name) for path in names if checkpoint_folders.is_checkpoint(path))
