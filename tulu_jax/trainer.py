"""The one training loop, for every objective: a config in, checkpoints and curves out."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from tulu_jax import atomic, provenance, trained, validation
from tulu_jax import base as base_lib
from tulu_jax import meter as meter_lib
from tulu_jax import step as step_lib
from tulu_jax.data.fields import Fields
from tulu_jax.models.config import SCORE
from tulu_jax.models.llama import Params
from tulu_jax.objectives.objective import Batch, Feed
from tulu_jax.parallel import compiler, preemption, sharding, stall
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import agreement, checkpoint_folders, optim, watch
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import lease as lease_lib
from tulu_jax.training import metrics as metrics_lib
from tulu_jax.training import state as state_lib
from tulu_jax.training.state import Frozen, TrainState

CONFIG_FILE = "config.gin"
WRITTEN = "# Parameters for "  # headings of an operative config, and of no file that people write
MEANS = {
    "data": " (other rows, tokenizer, template, length, or versions of tasks)",
    "tokenizer": " (digests; another text has the same ids)",
}
OF_BASE = ("base_dtype", "generation_config", base_lib.OF_POLICY)
BEFORE = {"optimizer": {"end_learning_rate": 0.0}}  # what checkpoints of before do not say


def about(
    config: TrainConfig,
    params: Params,
    frozen: Frozen,
    *,
    weights: str,
    of_base: dict[str, Any],
    tokenizer: str | None,
) -> dict[str, Any]:
    """What a checkpoint says of any run of `config`, `params` being what trains of the model that
    began with `weights`, `of_base` what exports need to know of the base. Of a reward model
    `tokenizer`, the digest, is always told, with the template: who trains against it must know what
    text it reads. None elsewhere, until there are data."""
    must_match = {
        "model": dataclasses.asdict(config.model),
        "objective": config.objective.identity(),
        "optimizer": dataclasses.asdict(config.optimizer),
        "param_dtype": config.param_dtype,
    }
    if tokenizer is not None:
        must_match |= {"tokenizer": tokenizer, "chat": config.data.chat}
    if config.adapter is not None:
        must_match["adapter"] = dataclasses.asdict(config.adapter)
        must_match["quant"] = config.quant and dataclasses.asdict(config.quant)
    return {
        "params": agreement.param_shapes(params),
        "frozen": agreement.param_shapes(frozen.base),
        "weights": weights,
        "watch": watch.History(config.watch, 0).as_saved(),
        **of_base,
        "must_match": must_match,
    }


class Run:
    """One run on one mesh: its feed, its compiled steps, its state. `Run(config).train()`.

    `config_text`, the gin text that rebuilds `config`, is saved in the workdir as `config.gin`. A
    run reads no data before `open`. `on_damage` is one of `checkpoint.ON_DAMAGE`.
    """

    def __init__(
        self, config: TrainConfig, config_text: str | None = None, *, on_damage: str = "stop"
    ):
        self.config, self.config_text, self.on_damage = config, config_text, on_damage
        self.mesh = mesh_lib.make(config.mesh_on(jax.device_count()))
        self.row_share = mesh_lib.row_share(self.mesh)
        self.abstract, self.abstract_frozen = step_lib.abstract_state(config, self.mesh)
        self.peak_flops = metrics_lib.peak_flops(list(self.mesh.devices.flat))
        self.eval_step = jax.jit(step_lib.make_eval_step(config))
        self.feed: Feed | None = None
        self.frozen = Frozen()
        self.history = watch.History(config.watch, 0)
        self.watchdog = stall.Watchdog(None)

    @functools.cached_property
    def checkpoints(self) -> checkpoint_lib.Checkpoints:
        return checkpoint_lib.Checkpoints(self.config.workdir, self.config.checkpoint)

    @functools.cached_property
    def tokenizer(self) -> str:
        """The digest of the tokenizer (`trained.tokenizer_digest`)."""
        with validation.reading():
            return trained.tokenizer_digest(self.config.data.tokenizer)

    def open(self) -> None:
        """Opens the data, encoding what is not yet encoded, and counts the updates."""
        config = self.config
        self.feed = config.objective.feed(self)
        rows = self.feed.rows
        self.num_steps = config.num_updates(rows.rows_per_epoch)
        validation.raise_if(optim.problems(config.optimizer, self.num_steps))
        logging.info(
            "%d updates of %d rows, %.1f examples on average; %d updates of warm-up",
            self.num_steps,
            config.batch_size,
            config.batch_size * rows.num_examples / rows.rows_per_epoch,
            optim.num_warmup(config.optimizer, self.num_steps),
        )
        self.fields: Fields = config.objective.fields(
            rows=config.batch_size,
            length=config.data.max_length,
            packing=config.data.packing,
            places=rows.pairs_per_row,
        )

    def train(self) -> dict[str, float]:
        """Trains from the latest checkpoint, or from the start, to the end; the last evaluation.

        Raises `watch.UnstableError` if an update goes wrong and the policy is to stop,
        `UsageError` if another run has the workdir (`lease.held`), or no room is left on a disk,
        and for a SIGTERM `preemption.Preempted`, after saving. If an update hangs, the process
        ends (`stall.Watchdog`).
        """
        try:
            with preemption.listening(), lease_lib.held(self.config.workdir) as self.lease:
                self.open()
                with (
                    stall.watching(self.config.watch.hung_after) as self.watchdog,
                    jax.set_mesh(self.mesh),
                ):
                    return self._train()
        except (OSError, checkpoint_lib.CheckpointError) as error:
            if not validation.is_full(error):
                raise
            raise validation.UsageError(self._no_room(error)) from error

    def _no_room(self, error: Exception) -> str:
        if isinstance(error, checkpoint_lib.CheckpointError):
            return str(error)
        good = checkpoint_folders.newest(self.config.workdir)
        return (
            f"{error}. Last good checkpoint: {good}. Free some space or raise the quota, and start "
            "the same command again"
        )

    def _train(self) -> dict[str, float]:
        state, frozen = self._start()
        if jax.process_index() == 0:
            self._keep()
        self.frozen = frozen
        self.feed.begin(lambda: self._initial_params(state, frozen), self.weights)
        notice = preemption.Notice()
        try:
            found = self._loop(state, frozen, notice)
            self.watchdog.expect("the last checkpoint")
            return found
        finally:
            self.checkpoints.close()
            notice.close()

    def _keep(self) -> None:
        """Leaves in the workdir what makes it whole by itself, beside the checkpoints. Raises
        `UsageError` for files of these names which no run wrote."""
        folder = epath.Path(self.config.workdir)
        file = folder / CONFIG_FILE
        if self.config_text and file.exists() and WRITTEN not in file.read_text():
            raise validation.UsageError(
                f"{file} would be replaced, and no run wrote it; move it away, or choose another "
                "--workdir"
            )
        of_a_run = file.exists() or (folder / metrics_lib.FILE).exists()
        trained.keep_tokenizer(self.config, replace=of_a_run)
        if self.config_text:
            atomic.write_text(file, self.config_text)

    def save_initial(self) -> None:
        """Writes the checkpoint of step 0: the parameters of `base` and a new optimizer state."""
        with lease_lib.held(self.config.workdir), jax.set_mesh(self.mesh):
            state, _ = self._start()
            with preemption.finishing():
                self.checkpoints.save(int(state.step), state, self._about(), {})
                self.checkpoints.close()

    def put(self, batch: Batch) -> Batch:
        """The global arrays of a batch from the rows that each process loads (`mesh.row_share`).

        Raises `ValueError` for a field that is not as the objective says; how many rows, and how
        many examples they hold, may differ.
        """
        _, parts = self.row_share
        placed = {}
        for name, value in batch.items():
            field = self.fields[name]
            long = field.axes[-1] != "length" or value.shape[-1] == field.shape[-1]
            if value.ndim != len(field.shape) or value.dtype != field.dtype or not long:
                raise ValueError(
                    f"field {name!r} of a batch is {value.dtype} {list(value.shape)}; expected "
                    f"{field.dtype} {list(field.shape)}, as the objective's fields say"
                )
            placed[name] = jax.make_array_from_process_local_data(
                jax.NamedSharding(self.mesh, sharding.spec(*field.axes)),
                value,
                global_shape=(value.shape[0] * parts, *value.shape[1:]),
            )
        return placed

    def progress(self, items, name: str, **options):
        """`items` with a progress bar called `name`, on process 0."""
        import tqdm

        def announced():
            for number, item in enumerate(items, options.get("initial", 0) + 1):
                self.watchdog.expect(f"{name} {number}")
                yield item

        return tqdm.tqdm(announced(), desc=name, disable=jax.process_index() != 0, **options)

    def _start(self) -> tuple[TrainState, Frozen]:
        """What to go on from; with it `weights`, the fingerprint of the parameters the run began
        with, and `of_base`, what exports need to know of the base."""
        if self.checkpoints.latest_step() is not None:
            state, frozen = self.checkpoints.resume(self._restored, self.on_damage), Frozen()
            if jax.tree.leaves(self.abstract_frozen):
                frozen = self._split(self._loaded_again())[1]
            return state, frozen
        validation.raise_if(trained.reward_problems(self.config))
        params = base_lib.initial_params(self.config, self.mesh)
        self.of_base = base_lib.about(self.config, params)
        self.weights = state_lib.fingerprint(params)
        params, frozen = self._split(params)
        if (adapters := base_lib.initial_adapters(self.config, self.weights)) is not None:
            placed = jax.tree.map(lambda leaf: leaf.sharding, self.abstract.params)
            params = jax.device_put(adapters, placed)
        optim.warn_of_rounding(params, self.config.optimizer.learning_rate)
        init = optim.make(self.config.optimizer, num_steps=1).init
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract.opt_state)
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=jax.jit(init, out_shardings=shardings)(params),
        )
        return state, frozen

    def _restored(self, step: int) -> TrainState:
        about = self.checkpoints.about(step)
        self.weights = about["weights"]
        self.of_base = {name: about[name] for name in OF_BASE if name in about}
        validation.raise_if(self._resume_problems(about))
        self.history = watch.History(self.config.watch, step, about.get("watch"))
        logging.info("Resuming from step %d in %s", step, self.checkpoints.folder)
        return self.checkpoints.restore(step, self.abstract)

    def _split(self, params: Params) -> tuple[Params, Frozen]:
        """The parameters of the base as what trains and what is frozen, on their devices."""
        trained, frozen = step_lib.split(self.config, params)
        given = {id(leaf) for leaf in jax.tree.leaves(params)}
        donated = {id(leaf) for leaf in jax.tree.leaves(trained)} & given

        def placed(leaf, abstract):
            if id(leaf) in given:
                return leaf
            return jax.device_put(np.asarray(leaf, abstract.dtype), abstract.sharding)

        def apart(leaf, abstract):  # the updates donate what trains
            if id(leaf) not in donated:
                return placed(leaf, abstract)
            return jax.jit(jnp.copy, out_shardings=abstract.sharding)(leaf)

        return (
            jax.tree.map(placed, trained, self.abstract.params),
            jax.tree.map(apart, frozen, self.abstract_frozen),
        )

    def _initial_params(self, state: TrainState, frozen: Frozen) -> Params:
        """The parameters the run began with."""
        return frozen.whole(state.params) if int(state.step) == 0 else self._loaded_again()

    def _loaded_again(self) -> Params:
        """The parameters of the base of a resumed run. Raises `UsageError` if the base is no longer
        the one that the run began with."""
        params = base_lib.initial_params(self.config, self.mesh)
        base_lib.require_same(self.config, state_lib.fingerprint(params), self.weights)
        return params

    def _about(self) -> dict[str, Any]:
        """What a checkpoint says of the run, and what a resumed run must agree with; before the
        data is opened, the first update is still free to choose it."""
        found = about(
            self.config,
            self.abstract.params,
            self.abstract_frozen,
            weights=self.weights,
            of_base=self.of_base,
            tokenizer=self.tokenizer if self.config.objective.head == SCORE else None,
        )
        if self.feed is not None:
            found["must_match"] |= {
                "data": self.feed.rows.fingerprint,
                "data_seed": self.config.data.seed,
                "batch_size": self.config.batch_size,
                "num_steps": self.num_steps,
                "tokenizer": self.tokenizer,
                "chat": self.config.data.chat,
            }
        return found | {"watch": self.history.as_saved()}

    def _resume_problems(self, about: dict) -> list[str]:
        theirs, ours = about["must_match"], self._about()["must_match"]
        theirs |= {name: said | theirs[name] for name, said in BEFORE.items() if name in theirs}
        frozen = about.get("frozen", {})  # checkpoints of before froze nothing
        return [
            *agreement.param_problems(about["params"], self.abstract.params),
            *agreement.param_problems(frozen, self.abstract_frozen.base, "frozen parameter"),
            *(
                f"the checkpoints in {self.checkpoints.folder} were made with {name} = {before}; "
                f"this run has {now}{MEANS.get(name, '')}. Restore the setting or choose another "
                "--workdir"
                for name, before, now in agreement.differences(theirs, ours)
            ),
        ]

    def evaluate(self, params: Params, frozen: Frozen) -> dict[str, float]:
        """`eval/*` means over the whole validation split, and over the feed's groups of examples;
        nothing if there is no such split."""
        batches = self.feed.evaluation()
        if batches is None:
            return {}
        totals, count, examples = dict.fromkeys(self.config.objective.metrics, 0.0), 0.0, []
        for number, batch in enumerate(batches, 1):
            self.watchdog.expect(f"batch {number} of an evaluation")
            n, found = jax.device_get(self.eval_step(params, frozen, self.put(batch)))
            totals = {name: totals[name] + float(found.scalars[name]) for name in totals}
            count += float(n)
            examples.append(found.examples)
        means = {name: total / count for name, total in totals.items()}
        means |= self.feed.groups(examples)
        return {f"eval/{name}": mean for name, mean in means.items()}

    def _bound(self, step: int) -> tuple[jax.Array, ...]:
        """What `train_step` takes to judge the loss of `step`; nothing if it does not."""
        if self.config.watch.spikes != "skip":
            return ()
        bound = np.float32(self.history.bound(step))
        whole = jax.NamedSharding(self.mesh, jax.P())
        return (jax.make_array_from_process_local_data(whole, bound, global_shape=()),)

    def _loop(
        self, state: TrainState, frozen: Frozen, notice: preemption.Notice
    ) -> dict[str, float]:
        config = self.config
        start = int(state.step)
        if start >= self.num_steps:
            logging.info("Nothing left to do: step %d of %d", start, self.num_steps)
            return self.evaluate(state.params, frozen)
        recorder = metrics_lib.Recorder(
            config.logging, config.workdir, start, dataclasses.asdict(config)
        )
        record = provenance.Record(self, start)
        meter = meter_lib.Meter(self, recorder)
        train_step = jax.jit(
            step_lib.make_train_step(config, self.num_steps),
            donate_argnums=0,
            compiler_options=compiler.options(self.mesh.devices.flat[0].device_kind),
        )
        last_eval: dict[str, float] = {}
        if start == 0:
            last_eval = self.evaluate(state.params, frozen)
            recorder.write(0, last_eval)
        steps = range(start + 1, self.num_steps + 1)
        bar = self.progress(steps, "train", initial=start, total=self.num_steps)
        for step in bar:
            self.lease.check()
            batch = self.put(self.feed(step, state.params))
            bound = self._bound(step)
            with jax.transfer_guard("disallow"):
                state, measured = train_step(state, frozen, batch, *bound)
            meter.push(step, measured, bar)
            final = step == self.num_steps
            stop = not final and notice.reached(step)
            save = final or stop or step % config.checkpoint.every == 0
            evaluate = final or bool(config.eval_every and step % config.eval_every == 0)
            if save or evaluate:
                meter.flush(bar)  # a checkpoint is of finite numbers only
            if evaluate:
                last_eval = self.evaluate(state.params, frozen)
                recorder.write(step, last_eval)
                logging.info("step %d %s", step, meter_lib.line(last_eval))
                meter.restart()
            if save:
                self.watchdog.expect(f"the start of the checkpoint of step {step}")
                measured = last_eval if evaluate else {}
                recorder.flush()  # a resumed run has the lines before its checkpoint
                self.checkpoints.save(step, state, self._about(), measured)
                record.update(step)
            if stop:
                recorder.close()
                self.checkpoints.wait()
                raise preemption.Preempted(
                    f"Stopped and saved: {self.checkpoints.describe_latest()}", together=True
                )
        recorder.close()
        return last_eval
