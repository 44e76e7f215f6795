"""Checkpoints: asynchronous, atomic, restored onto any mesh. The only file that imports Orbax."""

import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from tulu_jax import validation
from tulu_jax.models.config import LlamaConfig
from tulu_jax.training.state import TrainState

FOLDER = "checkpoints"
SAID = 300  # characters of a message of Orbax


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Save every `every` updates and at the end; keep the last `keep`, and the best if `best`.

    `best` names an evaluation metric to minimise, e.g. 'eval/loss'; None keeps only the last.
    """

    every: int
    keep: int = 2
    best: str | None = None

    def __post_init__(self):
        validation.check(
            self,
            lambda: [
                (self.every > 0, f"every = {self.every}: expected a positive number of updates"),
                (self.keep > 0, f"keep = {self.keep}: expected at least 1, to resume from"),
            ],
        )


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message names the last one that can be restored."""


class Checkpoints:
    """The checkpoints of one run, under `workdir/checkpoints/<step>`.

    An unfinished write has another name, so whatever is listed is complete: a kill or a full disk
    while saving leaves the previous checkpoint as the latest.
    """

    def __init__(self, workdir: str, config: CheckpointConfig | None = None):
        import orbax.checkpoint as ocp

        self._ocp, self._best = ocp, config and config.best
        self.folder = epath.Path(workdir).absolute() / FOLDER
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(read_only=config is None)
        if config is not None:
            keep, tracked = [policies.LatestN(config.keep)], {}
            if config.best:
                _check_metrics(self.folder)

                def best(metrics):
                    return metrics[config.best]

                tracked = {"best_fn": best, "best_mode": "min"}  # a resumed run has the metrics too
                keep.append(
                    policies.BestN(
                        get_metric_fn=best,
                        reverse=True,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    )
                )
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                **tracked,
            )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: TrainState, about: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Starts writing `state` with the JSON object `about`. Raises `CheckpointError`.

        Of the metrics, those that are finite are kept; without the one that `best` names the
        checkpoint is never the best.
        """
        args = self._ocp.args
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self._best not in metrics:
            metrics = {}
        items = args.Composite(state=args.StandardSave(state), about=args.JsonSave(dict(about)))
        with self._explained(step):
            self._manager.save(step, args=items, metrics=metrics or None, force=True)

    def wait(self) -> None:
        """Returns when what was being written is complete. Raises `CheckpointError`."""
        with self._explained(None):
            self._manager.wait_until_finished()

    def require(self, step: int | None) -> int:
        """`step` (None: the latest) if there is such a checkpoint. Raises `UsageError` with what
        there is."""
        steps = self.steps()
        found = step if step is not None or not steps else steps[-1]
        if found not in steps:
            asked = "" if step is None else f" of step {step}"
            advice = (
                f"found steps {steps}; give one of them as --step"
                if steps
                else "found none at all: train first, or give the --workdir of a run that did"
            )
            raise validation.UsageError(f"there is no checkpoint{asked} in {self.folder}; {advice}")
        return found

    def about(self, step: int) -> dict[str, Any]:
        """The JSON object saved with the checkpoint of `step`. Raises `UsageError` if it cannot be
        read."""
        return self._read(step, self._about)

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state saved at `step`, placed by the shardings of `abstract_state`. Raises
        `UsageError` if it cannot be read."""

        def read(step: int) -> TrainState:
            args = self._ocp.args
            items = args.Composite(state=args.StandardRestore(abstract_state))
            return self._manager.restore(step, args=items).state

        return self._read(step, read)

    def restore_params(self, step: int, abstract_params: dict) -> dict:
        """The parameters alone, without reading optimizer state. Raises `UsageError` if they cannot
        be read."""
        ocp, target = self._ocp, {"params": abstract_params}

        def read(step: int) -> dict:
            restored = ocp.PyTreeCheckpointer().restore(
                self.folder / str(step) / "state",
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
            return restored["params"]

        return self._read(step, read)

    def _about(self, step: int) -> dict[str, Any]:
        items = self._ocp.args.Composite(about=self._ocp.args.JsonRestore())
        return self._manager.restore(step, args=items).about

    def _read(self, step: int, read: Callable[[int], Any]) -> Any:
        """`read(step)`. What fails is a damaged checkpoint: raises `UsageError` that names it, and
        the newest other one for which `read` succeeds."""
        former = sys.unraisablehook
        sys.unraisablehook = functools.partial(_without_echoes, former)
        try:
            found = read(step)
            sys.unraisablehook = former  # after a failure, echoes come until the end
            return found
        except Exception as error:  # of json, TensorStore, Orbax and what these read with
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            folder = self.folder / str(step)
            raise validation.UsageError(
                f"the checkpoint of step {step} in {folder} cannot be read ({_short(error)}). "
                f"{self._whole(step, read)} To go without it, move {folder} out of that folder"
            ) from error

    def _whole(self, damaged: int, read: Callable[[int], Any]) -> str:
        """Which other checkpoint is whole, in a sentence."""
        others = [step for step in reversed(self.steps()) if step != damaged]
        if not others:
            return "There is no other."
        if jax.process_count() > 1:  # reading takes all processes, and others may have succeeded
            return f"There are also those of steps {others[::-1]}."
        for step in others:
            with contextlib.suppress(Exception):
                self._about(step)
                read(step)
                return f"That of step {step} is whole."
        return f"Those of steps {others[::-1]} cannot be read either."

    def describe_latest(self) -> str:
        """'step 40 in <folder>', or that there is none."""
        step = self.latest_step()
        return f"none in {self.folder}" if step is None else f"step {step} in {self.folder}"

    def close(self) -> None:
        """Waits for the last write and releases the folder. Raises `CheckpointError`."""
        self.wait()
        self._manager.close()

    def _explained(self, step: int | None):
        return _Explained(self, step)


class _Explained:
    """Turns a failed write into a `CheckpointError` that names what can still be restored."""

    def __init__(self, checkpoints: Checkpoints, step: int | None):
        self.checkpoints, self.step = checkpoints, step

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception):
            self.checkpoints._manager.reload()
            what = "a checkpoint" if self.step is None else f"the checkpoint of step {self.step}"
            raise CheckpointError(
                f"{what} could not be written: {error}. Last good checkpoint: "
                f"{self.checkpoints.describe_latest()}. Free some space or repair the folder and "
                "start the same command again."
            ) from error


def _check_metrics(folder: epath.Path) -> None:
    """Raises `UsageError` for metrics that cannot be read: Orbax reads them at once."""
    problems = []
    for file in folder.glob("*/metrics/metrics"):
        try:
            json.loads(file.read_text())
        except ValueError as error:
            step = file.parent.parent
            problems.append(f"{file} is damaged ({error}); move {step} out of that folder")
    validation.raise_if(problems)


def _without_echoes(former: Callable[[Any], None], unraisable) -> None:
    """A `sys.unraisablehook` for Orbax's reads: once one array cannot be read, the others arrive at
    an event loop that is closed, each with a traceback."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        former(unraisable)


def _short(error: BaseException) -> str:
    """The innermost cause of an error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:SAID]}"


def load_params(
    workdir: str, model: LlamaConfig, abstract_params: dict, step: int | None = None
) -> dict:
    """Parameters of a run's checkpoint (default: the latest), sharded as `abstract_params` says.

    Raises `UsageError` if there is no checkpoint, if it cannot be read, if its parameters have
    other names or shapes, or if they were trained as another function than `model`.
    """
    checkpoints = Checkpoints(workdir)
    step = checkpoints.require(step)
    validation.raise_if(problems(checkpoints, step, model, abstract_params))
    logging.info("Restoring parameters of step %d from %s", step, checkpoints.folder)
    return checkpoints.restore_params(step, abstract_params)


def problems(
    checkpoints: Checkpoints, step: int, model: LlamaConfig, abstract_params: dict
) -> list[str]:
    """Why the parameters of `step` are not of `model`, one line each, from JSON alone."""
    about, folder = checkpoints.about(step), checkpoints.folder / str(step)
    recorded = about["must_match"].get("model", {})
    expected = {field.name for field in dataclasses.fields(LlamaConfig)}
    if recorded.keys() != expected:
        return [
            f"the checkpoint in {folder} records a model of {sorted(recorded) or 'no fields'}; "
            f"expected {sorted(expected)}: another version wrote it. Export it to Hugging Face "
            "with that version, and take the export"
        ]
    frozen = about.get("frozen", {})
    if frozen.keys() & param_shapes(abstract_params).keys():
        return [
            f"the checkpoint in {folder} holds what trained beside {len(frozen)} frozen parameters "
            "of its base, and not these; expected all of them. Export that run to Hugging Face "
            "(python -m tulu_jax.convert), and take the export"
        ]
    trained = LlamaConfig(**recorded)
    return [
        f"the checkpoint in {folder} was trained with {name} = "
        f"{getattr(trained, name)}; this run's model has {getattr(model, name)}. Restore it in the "
        "gin file, or take another checkpoint"
        for name in trained.computed_otherwise(model)
    ] + param_problems(about["params"], abstract_params)


def param_shapes(params: dict) -> dict[str, list[int]]:
    """{parameter path: shape}, JSON-serialisable, as saved beside each checkpoint."""
    leaves = jax.tree.leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in leaves
    }


def param_problems(
    found: dict[str, list[int]], abstract_params: dict, noun: str = "parameter"
) -> list[str]:
    """How the shapes of a checkpoint differ from those the model expects, one line each."""
    expected = param_shapes(abstract_params)
    problems = [
        f"checkpoint {noun} {name} has shape {found[name]}; the model expects {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems += [f"checkpoint lacks {noun} {name}" for name in expected if name not in found]
    problems += [
        f"checkpoint has {noun} {name}, unknown to the model"
        for name in found
        if name not in expected
    ]
    return problems


def differences(before: dict, now: dict, inside: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, value before, value now) of what differs, nested ones as "outer.inner"; what a
    checkpoint does not record at all is free."""
    for name in (name for name in now if inside or name in before):
        was, value = before.get(name), now[name]
        if isinstance(was, dict) and isinstance(value, dict):
            yield from differences(was, value, f"{inside}{name}.")
        elif was != value:
            yield f"{inside}{name}", was, value
