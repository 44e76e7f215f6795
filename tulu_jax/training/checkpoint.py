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
from jax.experimental import multihost_utils

from tulu_jax import validation
from tulu_jax.models.config import LlamaConfig
from tulu_jax.parallel import sharding
from tulu_jax.training import (
    agreement,
    checkpoint_arrays,
    checkpoint_digests,
    checkpoint_folders,
    unfinished,
)
from tulu_jax.training.state import TrainState

FOLDER = checkpoint_folders.FOLDER
SAID = 300  # characters of a message of Orbax
ON_DAMAGE = ("stop", "newest_whole")  # what a run does about a damaged checkpoint
GO_BACK = "A run goes back to the newest whole one with train --on_damage=newest_whole."


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Save every `every` updates and at the end; keep the last `keep`, the best, and some for good.

    `best` names an evaluation metric to minimise, e.g. 'eval/loss'; `keep_every` keeps the
    checkpoints of its multiples. None keeps no more than the last.
    """

    every: int
    keep: int = 2
    best: str | None = None
    keep_every: int | None = None

    def __post_init__(self):
        validation.check(
            self,
            lambda: [
                (self.every > 0, f"every = {self.every}: expected a positive number of updates"),
                (self.keep > 0, f"keep = {self.keep}: expected at least 1, to resume from"),
                (
                    self.keep_every is None
                    or self.keep_every >= self.every > 0 == self.keep_every % self.every,
                    f"keep_every = {self.keep_every}: expected a multiple of every = {self.every}, "
                    "of which there are checkpoints, or None",
                ),
            ],
        )


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message names the last one that can be restored."""


class DamagedError(validation.UsageError):
    """A checkpoint cannot be read, or is not what was saved; the message names what of it."""


def left_of_first_step(workdir: str, made_of: str) -> unfinished.Unfinished | None:
    """What a `save_streamed` of step 0 that was killed left of itself; None for a bucket. To be
    asked for before there are `Checkpoints` with a config, which remove it."""
    import orbax.checkpoint as ocp

    if "://" in workdir:
        return None
    root = epath.Path(workdir).absolute()
    unnamed = root / FOLDER / f"0{ocp.path.step.TMP_DIR_SUFFIX}"
    return unfinished.Unfinished(root, unnamed, made_of, checkpoint_arrays.opens)


class OnItsWayError(DamagedError):
    """What was read is not what was saved, and what is saved is whole."""


class Checkpoints:
    """The checkpoints of one run, under `workdir/checkpoints/<step>`.

    An unfinished write has another name, so whatever is listed is complete: a kill or a full disk
    while saving leaves the previous checkpoint as the latest. What is restored is compared with the
    digests that were saved (`checkpoint_digests`). Folders of others among the steps are let be.
    """

    def __init__(self, workdir: str, config: CheckpointConfig | None = None):
        import orbax.checkpoint as ocp

        self._ocp, self._best = ocp, config and config.best
        root = epath.Path(workdir)
        self.folder = (root if "://" in workdir else root.absolute()) / FOLDER
        self._rereads = "://" in workdir and jax.process_count() == 1  # several read together
        policies, ours = ocp.checkpoint_managers, checkpoint_folders.only_ours(ocp)
        options = ocp.CheckpointManagerOptions(read_only=config is None, step_name_format=ours)
        if config is not None:
            keep, tracked = [policies.LatestN(config.keep)], {}
            if config.keep_every:
                keep.append(policies.EveryNSteps(config.keep_every))
            if config.best:
                checkpoint_folders.check_metrics(self.folder)

                def best(metrics):
                    return metrics[config.best]

                tracked = {"best_fn": best, "best_mode": "min"}  # a resumed run has the metrics too
                one = dict(reverse=True, n=1, keep_checkpoints_without_metrics=False)
                keep.append(policies.BestN(get_metric_fn=best, **one))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                enable_async_checkpointing=True,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._add_digests
                ),
                step_name_format=ours,
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
        self._save(step, state, lambda: about, metrics, checkpoint_digests.of_arrays)
        if jax.process_index() == 0:
            unfinished.remove(self.folder.parent)

    def save_streamed(
        self,
        step: int,
        state: TrainState,
        about: Callable[[], Mapping[str, Any]],
        before: unfinished.Unfinished | None = None,
    ) -> None:
        """Writes a `state` of `checkpoint_arrays.Streamed` leaves, a piece at a time, but for those
        written `before`. `about` is asked when all are written. Raises `CheckpointError`."""
        checkpoint_arrays.write_streamed(self._ocp, before)
        self._save(step, state, about, {}, checkpoint_arrays.of_streamed)
        self.wait()
        if before is not None:
            before.remove()

    def _save(self, step, state, about, metrics, digests) -> None:
        args = self._ocp.args
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self._best not in metrics:
            metrics = {}
        storage = checkpoint_arrays.storage(self._ocp, state)
        items = args.Composite(state=args.StandardSave(state, storage), about=args.JsonSave({}))
        with self._explained(step):
            self._manager.wait_until_finished()
            taken = step not in self.steps() and (self.folder / str(step)).exists()
            if taken and jax.process_index() == 0:  # Orbax would delete it
                self._set_aside(step, "foreign")
            self._saving = step, digests(state), about
            self._manager.save(step, args=items, metrics=metrics or None, force=True)

    def _add_digests(self) -> None:
        """Says what was written, and its digests, before its folder gets its name; on process 0,
        and not in the thread of the loop."""
        step, arrays, about = self._saving
        unnamed = self.folder / f"{step}{self._ocp.path.step.TMP_DIR_SUFFIX}"
        folder = unnamed if unnamed.exists() else self.folder / str(step)  # buckets rename nothing
        (folder / "about" / "metadata").write_text(json.dumps(dict(about())))
        checkpoint_digests.write(folder, arrays)

    def _set_aside(self, step: int, why: str) -> None:
        """Renames the folder `step` to `step.why`, so that nobody takes it for a checkpoint, with a
        number where there is such a folder."""
        names = [f"{step}.{why}", *(f"{step}.{why}.{number}" for number in range(2, 1000))]
        aside = next(path for name in names if not (path := self.folder / name).exists())
        (self.folder / str(step)).rename(aside)
        logging.warning("%s is now %s", self.folder / str(step), aside)

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
        """The JSON object saved with the checkpoint of `step`. Raises `DamagedError` if it cannot
        be read, or is another."""
        return self._read(step, self._about)

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state saved at `step`, placed by the shardings of `abstract_state`. Raises
        `DamagedError` if it cannot be read, or is not what was saved."""

        def read(step: int, like: TrainState) -> TrainState:
            items = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(like))
            return self._manager.restore(step, args=items).state

        return self._verified(step, abstract_state, read)

    def stored_params(
        self, step: int, params: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, checkpoint_arrays.StoredArray]:
        """The parameters at these paths, to be read a layer at a time: `check_stored` says then
        whether they were what was saved. Raises `DamagedError` if they cannot be opened."""
        return self._read(
            step, lambda step: checkpoint_arrays.stored(self.folder / str(step), params)
        )

    def check_stored(self, step: int, params: Mapping[str, checkpoint_arrays.StoredArray]) -> None:
        """Raises `DamagedError` if what was read of `params` is not what was saved; in a bucket
        `OnItsWayError` if it is when it is read again."""

        def check(step: int, arrays: dict) -> None:
            recorded = checkpoint_digests.load_or_warn(self.folder / str(step))
            found = {f"params/{path}": array.text() for path, array in arrays.items()}
            if recorded and (problems := checkpoint_digests.differences(recorded, found)):
                raise ValueError(checkpoint_digests.named(problems))

        def check_again(step: int) -> None:
            arrays = checkpoint_arrays.stored(self.folder / str(step), params)
            checkpoint_arrays.read(arrays)
            check(step, arrays)

        try:
            check(step, params)
        except ValueError as error:
            self._read(step, check_again)
            raise OnItsWayError(
                f"what was read of step {step} in {self.folder} is not what lies there "
                f"({_short(error)}); start the same command again"
            ) from error

    def restore_params(self, step: int, abstract_params: dict) -> dict:
        """The parameters alone, without reading optimizer state. Raises `DamagedError` if they
        cannot be read, or are not what was saved."""
        return self._verified(step, {"params": abstract_params}, self._part)["params"]

    def resume(self, restore: Callable[[int], TrainState], on_damage: str) -> TrainState:
        """`restore(step)` of the newest step. With `on_damage` "newest_whole" that of the newest
        for which it does not raise `DamagedError`; those it passes are set aside."""
        damaged = []
        for step in reversed(steps := self.steps()):
            try:
                state = restore(step)
                break
            except DamagedError as error:
                if on_damage != "newest_whole" or step == steps[0]:
                    raise
                logging.warning("%s. Going back, as --on_damage=newest_whole says", error)
                damaged.append(step)
        if jax.process_index() == 0:
            for step in damaged:
                self._set_aside(step, "damaged")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are aside")
        self._manager.reload()
        return state

    def damages(self, step: int, *, sizes_only: bool) -> list[str] | None:
        """What of the checkpoint of `step` is not what was saved, one text each, array by array on
        one process; None if it was saved without digests."""
        folder = self.folder / str(step)
        try:
            recorded = checkpoint_digests.load(folder)
            if recorded is None:
                return None
            found = checkpoint_digests.file_problems(recorded, folder, sizes_only=sizes_only)
            if found or sizes_only:
                return found
            tree = self._ocp.PyTreeCheckpointer().metadata(folder / "state").item_metadata.tree
            leaves, structure = jax.tree.flatten_with_path(tree)
            for index, (path, leaf) in enumerate(leaves):
                one = [self._ocp.PLACEHOLDER] * len(leaves)
                one[index] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                part = self._part(step, jax.tree.unflatten(structure, one), partial=False)
                array = {sharding.path_name(path): jax.tree.leaves(part)[index]}
                found += checkpoint_digests.array_problems(recorded, array)
            return found
        except Exception as error:
            if _out_of_memory(error):
                raise
            return [_short(error)]

    def _part(self, step: int, like: dict, *, partial: bool = True) -> dict:
        """The arrays of `like`, a part of the state of `step`; if not `partial`, the whole with
        placeholders for what is not read."""
        ocp = self._ocp
        return ocp.PyTreeCheckpointer().restore(
            self.folder / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item=like,
                restore_args=ocp.checkpoint_utils.construct_restore_args(like),
                partial_restore=partial,
            ),
        )

    def _verified(self, step: int, like: Any, read: Callable[[int, Any], Any]) -> Any:
        def verified(step: int) -> Any:
            folder = self.folder / str(step)
            return checkpoint_digests.verified(folder, like, functools.partial(read, step))

        return self._read(step, verified)

    def _about(self, step: int) -> dict[str, Any]:
        folder, about = self.folder / str(step), self._ocp.args.JsonRestore()
        if recorded := checkpoint_digests.load(folder):
            problems = checkpoint_digests.file_problems(recorded, folder, below="about/")
            if problems:
                raise ValueError(checkpoint_digests.named(problems))
        return self._manager.restore(step, args=self._ocp.args.Composite(about=about)).about

    def _read(self, step: int, read: Callable[[int], Any]) -> Any:
        """`read(step)`. What fails is a damaged checkpoint: raises `DamagedError` that names it,
        and the newest other one for which `read` succeeds."""
        former = sys.unraisablehook
        sys.unraisablehook = functools.partial(_without_echoes, former)
        try:
            try:
                found = read(step)
            except Exception as error:  # in a bucket it may have been damaged on its way
                if _out_of_memory(error) or not self._rereads:
                    raise
                logging.warning("Step %d is read again (%s)", step, _short(error))
                found = read(step)
            sys.unraisablehook = former  # after a failure, echoes come until the end
            return found
        except Exception as error:  # of json, TensorStore, Orbax and what these read with
            if _out_of_memory(error):
                raise
            folder = self.folder / str(step)
            raise DamagedError(
                f"the checkpoint of step {step} in {folder} cannot be read ({_short(error)}). "
                f"{self._whole(step, read)} To go without it, move {folder} out of that folder"
            ) from error

    def _whole(self, damaged: int, read: Callable[[int], Any]) -> str:
        """Which other checkpoint is whole, in a sentence."""
        others = [step for step in reversed(self.steps()) if step != damaged]
        if not others:
            return "There is no other."
        if jax.process_count() > 1:  # reading takes all processes, and others may have succeeded
            return f"There are also those of steps {others[::-1]}. {GO_BACK}"
        for step in others:
            with contextlib.suppress(Exception):
                self._about(step)
                read(step)
                return f"That of step {step} is whole. {GO_BACK}"
        return f"Those of steps {others[::-1]} cannot be read either."

    def describe_latest(self) -> str:
        """'step 40 in <folder>', or that there is none."""
        step = self.latest_step()
        return f"none in {self.folder}" if step is None else f"step {step} in {self.folder}"

    def close(self) -> None:
        """Waits for the last write and releases the folder. Raises `CheckpointError`."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        """Turns a failed write into a `CheckpointError` that names what can still be restored."""
        try:
            yield
        except Exception as error:
            self._manager.reload()
            what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            raise CheckpointError(
                f"{what} could not be written: {error}. Last good checkpoint: "
                f"{self.describe_latest()}. Free some space or repair the folder and start the "
                "same command again."
            ) from error


def _without_echoes(former: Callable[[Any], None], unraisable) -> None:
    """A `sys.unraisablehook` for Orbax's reads: once one array cannot be read, the others arrive at
    an event loop that is closed, each with a traceback."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        former(unraisable)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _short(error: BaseException) -> str:
    """The innermost cause of an error that does not name an object, on one line."""
    while error.__cause__ is not None and "gs://" not in str(error):
        error = error.__cause__
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:SAID]}"


def load_params(
    workdir: str, model: LlamaConfig, abstract_params: dict, step: int | None = None
) -> dict:
    """Parameters of a run's checkpoint (default: the latest), sharded as `abstract_params` says.

    Raises `UsageError` if there is no checkpoint, if it cannot be read, if its parameters have
    other names or shapes, or if they were trained as another function than `model`.
    """
    checkpoints = Checkpoints(workdir)
    step = checkpoints.require(step)
    about, folder = checkpoints.about(step), checkpoints.folder / str(step)
    validation.raise_if(agreement.model_problems(about, folder, model, abstract_params))
    logging.info("Restoring parameters of step %d from %s", step, checkpoints.folder)
    return checkpoints.restore_params(step, abstract_params)
