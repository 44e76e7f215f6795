"""Checkpoints: asynchronous, atomic, restored onto any mesh. The only file that imports Orbax."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from tulu_jax import validation
from tulu_jax.training.state import TrainState

FOLDER = "checkpoints"


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

        self._ocp = ocp
        self.folder = epath.Path(workdir).absolute() / FOLDER
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(read_only=config is None)
        if config is not None:
            keep = [policies.LatestN(config.keep)]
            if config.best:
                keep.append(
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[config.best],
                        reverse=True,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    )
                )
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
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
        """Starts writing `state` with the JSON object `about`. Raises `CheckpointError`."""
        args = self._ocp.args
        items = args.Composite(state=args.StandardSave(state), about=args.JsonSave(dict(about)))
        with self._explained(step):
            self._manager.save(step, args=items, metrics=dict(metrics) or None, force=True)

    def wait(self) -> None:
        """Returns when what was being written is complete. Raises `CheckpointError`."""
        with self._explained(None):
            self._manager.wait_until_finished()

    def about(self, step: int) -> dict[str, Any]:
        """The JSON object saved with the checkpoint of `step`."""
        items = self._ocp.args.Composite(about=self._ocp.args.JsonRestore())
        return self._manager.restore(step, args=items).about

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state saved at `step`, placed by the shardings of `abstract_state`."""
        items = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(step, args=items).state

    def restore_params(self, step: int, abstract_params: dict) -> dict:
        """The parameters alone, without reading optimizer state."""
        ocp = self._ocp
        target = {"params": abstract_params}
        restored = ocp.PyTreeCheckpointer().restore(
            self.folder / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )
        return restored["params"]

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


def load_params(workdir: str, abstract_params: dict, step: int | None = None) -> dict:
    """Parameters of a run's checkpoint (default: the latest), sharded as `abstract_params` says.

    Raises `ValueError` if there is no checkpoint, or if its parameters have other names or shapes.
    """
    checkpoints = Checkpoints(workdir)
    if step is None:
        step = checkpoints.latest_step()
    if step is None or step not in checkpoints.steps():
        raise ValueError(
            f"no checkpoint {'' if step is None else f'of step {step} '}in {checkpoints.folder}; "
            f"found steps {checkpoints.steps()}"
        )
    validation.raise_if(param_problems(checkpoints.about(step)["params"], abstract_params))
    logging.info("Restoring parameters of step %d from %s", step, checkpoints.folder)
    return checkpoints.restore_params(step, abstract_params)


def param_shapes(params: dict) -> dict[str, list[int]]:
    """{parameter path: shape}, JSON-serialisable, as saved beside each checkpoint."""
    leaves = jax.tree.leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in leaves
    }


def param_problems(found: dict[str, list[int]], abstract_params: dict) -> list[str]:
    """How the shapes of a checkpoint differ from those the model expects, one line each."""
    expected = param_shapes(abstract_params)
    problems = [
        f"checkpoint parameter {name} has shape {found[name]}; the model expects {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems += [f"checkpoint lacks parameter {name}" for name in expected if name not in found]
    problems += [
        f"checkpoint has parameter {name}, unknown to the model"
        for name in found
        if name not in expected
    ]
    return problems
