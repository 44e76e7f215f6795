"""The one training loop, for SFT and DPO: a config in, checkpoints and curves out."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from tulu_jax import base as base_lib
from tulu_jax import pairs, validation
from tulu_jax import step as step_lib
from tulu_jax.data import loader
from tulu_jax.objectives import dpo
from tulu_jax.parallel import compiler, preemption, sharding
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import metrics as metrics_lib
from tulu_jax.training import optim
from tulu_jax.training import state as state_lib
from tulu_jax.training.state import TrainState

CONFIG_FILE = "config.gin"


def put_batch(batch: dict, mesh: jax.sharding.Mesh) -> dict:
    """The global arrays of a batch from the rows that each process loads (`mesh.row_share`)."""
    _, parts = mesh_lib.row_share(mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding.batch_sharding(mesh, name, value.ndim),
            value,
            global_shape=(value.shape[0] * parts, *value.shape[1:]),
        )
        for name, value in batch.items()
    }


class Run:
    """One run on one mesh: its data, its compiled steps, its state. `Run(config).train()`.

    `config_text`, the gin text that rebuilds `config`, is saved in the workdir as `config.gin`.
    """

    def __init__(self, config: TrainConfig, config_text: str | None = None):
        self.config, self.config_text = config, config_text
        self.mesh = mesh_lib.make(config.mesh_on(jax.device_count()))
        self.row_share = mesh_lib.row_share(self.mesh)
        self.objective = step_lib.OBJECTIVES[type(config.objective)]
        with validation.reading():
            self.train_split = pairs.Split(loader.prepare(config.data, split="train"))
            held_out = loader.prepare(config.data, split="validation")
        self.eval_split = None if held_out is None else pairs.Split(held_out)
        self.num_steps = config.num_updates(self.rows.rows_per_epoch)
        validation.raise_if(optim.problems(config.optimizer, self.num_steps))
        logging.info(
            "%d updates of %d rows, %.1f examples on average; %d updates of warm-up",
            self.num_steps,
            config.batch_size,
            config.batch_size * self.rows.num_examples / self.rows.rows_per_epoch,
            optim.num_warmup(config.optimizer, self.num_steps),
        )
        self.checkpoints = checkpoint_lib.Checkpoints(config.workdir, config.checkpoint)
        self.abstract = step_lib.abstract_state(config, self.mesh, self.num_steps)
        self.peak_flops = metrics_lib.peak_flops(list(self.mesh.devices.flat))
        self.eval_step = jax.jit(step_lib.make_eval_step(config))
        self.reference: dict | None = None  # parameters of a resident reference

    @property
    def rows(self) -> loader.Rows:
        return self.train_split.rows

    def train(self) -> dict[str, float]:
        """Trains from the latest checkpoint, or from the start, to the end; the last evaluation.

        Raises `FloatingPointError` if the loss or a gradient is not finite, and
        `preemption.Preempted` after saving what a SIGTERM interrupts.
        """
        with jax.set_mesh(self.mesh):
            state, self.weights = self._start()
            if self.config_text and jax.process_index() == 0:
                (epath.Path(self.config.workdir) / CONFIG_FILE).write_text(self.config_text)
            if self.objective is dpo:
                self._attach_reference(state)
            notice = preemption.Notice()
            try:
                return self._loop(state, notice)
            finally:
                self.checkpoints.close()
                notice.close()

    def save_initial(self) -> None:
        """Writes the checkpoint of step 0: the parameters of `base` and a new optimizer state."""
        with jax.set_mesh(self.mesh):
            state, self.weights = self._start()
            self.checkpoints.save(int(state.step), state, self.about(), {})
            self.checkpoints.close()

    def _start(self) -> tuple[TrainState, str]:
        """The state to go on from, and the fingerprint of the parameters the run began with."""
        step = self.checkpoints.latest_step()
        if step is not None:
            about = self.checkpoints.about(step)
            validation.raise_if(self._resume_problems(about))
            logging.info("Resuming from step %d in %s", step, self.checkpoints.folder)
            return self.checkpoints.restore(step, self.abstract), about["weights"]
        params = base_lib.initial_params(self.config, self.abstract.params)
        self.base_dtype = base_lib.weights_dtype(self.config)
        self._warn_of_rounding(params)
        init = optim.make(self.config.optimizer, self.num_steps).init
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract.opt_state)
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=jax.jit(init, out_shardings=shardings)(params),
        )
        return state, state_lib.fingerprint(params)

    def _warn_of_rounding(self, params: dict) -> None:
        """Warns if much of what the updates would change is below the parameters' precision."""
        rate, dtype = self.config.optimizer.learning_rate, jnp.dtype(self.config.param_dtype)
        if rate >= jnp.finfo(dtype).eps:
            return
        share = optim.share_below_rounding(params, rate)
        if share > 0:
            advice = "a higher learning_rate"
            if dtype != jnp.float32:
                advice = "recipe.TrainConfig.param_dtype = 'float32'"
            logging.warning(
                "Estimate: %.2f %% of the parameters stay as they are in an update at the peak "
                "rate: learning_rate = %g, about what AdamW moves each by, is less than half of "
                "the step to the next %s. What would train them: %s",
                *(100 * share, rate, dtype.name, advice),
            )

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of the run, and what a resumed run must agree with."""
        config = self.config
        return {
            "params": checkpoint_lib.param_shapes(self.abstract.params),
            "weights": self.weights,
            "base_dtype": self.base_dtype,
            "must_match": {
                "data": self.rows.fingerprint,
                "data_seed": config.data.seed,
                "batch_size": config.batch_size,
                "num_steps": self.num_steps,
                "model": dataclasses.asdict(config.model),
                "objective": dataclasses.asdict(config.objective),
                "optimizer": dataclasses.asdict(config.optimizer),
                "param_dtype": config.param_dtype,
            },
        }

    def _resume_problems(self, about: dict) -> list[str]:
        self.weights = about["weights"]
        self.base_dtype = about.get("base_dtype", self.config.param_dtype)
        ours, theirs = self.about()["must_match"], about["must_match"]
        return checkpoint_lib.param_problems(about["params"], self.abstract.params) + [
            f"the checkpoints in {self.checkpoints.folder} were made with {name} = {before}; "
            f"this run has {now}. Restore the setting or choose another --workdir"
            for name, before, now in _different(theirs, ours)
        ]

    def _attach_reference(self, state: TrainState) -> None:
        """The reference of DPO, the parameters the run began with: a frozen copy of them, or the
        log-probabilities of both splits; nothing for a loss that needs none."""
        if not self.config.objective.needs_reference:
            return
        if self.config.objective.reference == "resident":
            params = self._reference_params(state)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
            copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)
            self.reference = copy(params)  # the updates donate the state
            return

        def with_logps(name, split):
            if split is None:
                return None
            logps = pairs.reference_logps(
                self.config,
                split.rows,
                pairs.reference_cache(self.config, name, split.rows, self.weights),
                params=lambda: self._reference_params(state),
                put=lambda batch: put_batch(batch, self.mesh),
                progress=self._progress,
            )
            return pairs.Split(split.rows, logps)

        self.train_split = with_logps("train", self.train_split)
        self.eval_split = with_logps("eval", self.eval_split)

    def _reference_params(self, state: TrainState) -> dict:
        """The parameters the run began with; a resumed run without its cache loads its base again.

        Raises `UsageError` if the base is no longer the one that the run began with.
        """
        if int(state.step) == 0:
            return state.params
        params = base_lib.initial_params(self.config, self.abstract.params)
        found = state_lib.fingerprint(params)
        if found != self.weights:
            raise validation.UsageError(
                f"base = {self.config.base!r} has weights {found}; this run began with "
                f"{self.weights}, and its cached reference log-probabilities are gone. Restore "
                "that base, or start anew in another --workdir"
            )
        return params

    def _eval_batches(self, rows: loader.Rows) -> Iterator[dict]:
        return loader.eval_batches(
            rows,
            batch_size=self.config.micro_batch_size or self.config.batch_size,
            process_index=self.row_share[0],
            process_count=self.row_share[1],
        )

    def _progress(self, items, name: str, **options):
        import tqdm

        return tqdm.tqdm(items, desc=name, disable=jax.process_index() != 0, **options)

    def evaluate(self, params: dict) -> dict[str, float]:
        """`eval/*` means over the whole validation split, of DPO by source and by length as well;
        nothing if there is no such split."""
        if self.eval_split is None:
            return {}
        totals, count = dict.fromkeys(self.objective.METRICS, 0.0), 0.0
        groups = pairs.Groups(self.eval_split.rows)
        for batch in self._eval_batches(self.eval_split.rows):
            batch = put_batch(self.eval_split.attach(batch), self.mesh)
            sums, n, values = jax.device_get(self.eval_step(params, batch, self.reference))
            totals = {name: totals[name] + float(sums[name]) for name in totals}
            count += float(n)
            groups.add(values)
        means = {name: total / count for name, total in totals.items()} | groups.means()
        return {f"eval/{name}": mean for name, mean in means.items()}

    def _loop(self, state: TrainState, notice: preemption.Notice) -> dict[str, float]:
        config = self.config
        start = int(state.step)
        if start >= self.num_steps:
            logging.info("Nothing left to do: step %d of %d", start, self.num_steps)
            return self.evaluate(state.params)
        recorder = metrics_lib.Recorder(
            config.logging, config.workdir, start, dataclasses.asdict(config)
        )
        meter = Meter(self, recorder)
        train_step = jax.jit(
            step_lib.make_train_step(config, self.num_steps),
            donate_argnums=0,
            compiler_options=compiler.options(self.mesh.devices.flat[0].device_kind),
        )
        batches = loader.batches(
            self.rows,
            batch_size=config.batch_size,
            start_step=start,
            num_steps=self.num_steps,
            process_index=self.row_share[0],
            process_count=self.row_share[1],
            workers=config.data.workers,
        )
        last_eval: dict[str, float] = {}
        if start == 0:
            last_eval = self.evaluate(state.params)
            recorder.write(0, last_eval)
        bar = self._progress(batches, "train", initial=start, total=self.num_steps)
        for step, batch in enumerate(bar, start + 1):
            batch = put_batch(self.train_split.attach(batch), self.mesh)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch, self.reference)
            meter.push(step, metrics, bar)
            final = step == self.num_steps
            stop = not final and notice.reached(step)
            save = final or stop or step % config.checkpoint.every == 0
            evaluate = final or bool(config.eval_every and step % config.eval_every == 0)
            if save or evaluate:
                meter.flush(bar)  # a checkpoint is of finite numbers only
            if evaluate:
                last_eval = self.evaluate(state.params)
                recorder.write(step, last_eval)
                logging.info("step %d %s", step, _line(last_eval))
                meter.restart()
            if save:
                measured = last_eval if evaluate else {}
                recorder.flush()  # a resumed run has the lines before its checkpoint
                self.checkpoints.save(step, state, self.about(), measured)
            if stop:
                recorder.close()
                self.checkpoints.wait()
                raise preemption.Preempted(
                    f"Stopped and saved: {self.checkpoints.describe_latest()}"
                )
        recorder.close()
        return last_eval


class Meter:
    """Reads metrics one update late, so that the device never waits, and reports rates."""

    def __init__(self, run: Run, recorder: metrics_lib.Recorder):
        self.run, self.recorder = run, recorder
        self.pending: tuple[int, dict] | None = None
        self.flops = run.config.model.flops_per_token(run.config.data.max_length)
        self.restart()

    def restart(self) -> None:
        """Leaves what happened since the last update out of the rates."""
        self.time = time.perf_counter()

    def push(self, step: int, metrics: dict, bar) -> None:
        """Remembers the metrics of `step` and reports those of the update before."""
        self.flush(bar)
        self.pending = step, metrics

    def flush(self, bar) -> None:
        """Reports what is pending. Raises `FloatingPointError` if it is not finite."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        margins = metrics.pop(step_lib.PAIR_MARGINS, None)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self.time = now - self.time, now
        self._require_finite(step, values, margins)
        counted = [n for n in (*metrics_lib.COUNTS, *metrics_lib.EXAMPLES) if n in values]
        counts = {name: values.pop(name) for name in counted}
        scalars = {f"train/{name}": value for name, value in values.items()}
        scalars |= {f"batch/{name}": value for name, value in counts.items()}
        scalars |= metrics_lib.rates(
            counts, seconds, flops=self.flops * counts["positions"], peak_flops=self.run.peak_flops
        )
        if step % self.run.config.logging.every == 0 or step == self.run.num_steps:
            self.recorder.write(step, scalars)
        rate = scalars["perf/nonpadding_tokens_per_second"]
        bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:,.0f} useful tokens/s")

    def _require_finite(self, step: int, values: dict[str, float], margins) -> None:
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if not bad:
            return
        run, size = self.run, self.run.config.batch_size
        rows = [run.rows.example_ids(row) for row in range((step - 1) * size, step * size)]
        said = ""
        if margins is not None:
            by_row = np.isfinite(np.asarray(margins)).reshape(size, -1)
            named = [
                example
                for ids, finite in zip(rows, by_row, strict=True)
                for example, fine in zip(ids, finite, strict=False)
                if not fine
            ]
            said = f"Pairs whose margin is not finite: {', '.join(named) or 'none'}. "
        run.checkpoints.wait()
        raise FloatingPointError(
            f"step {step}: {_line(bad)} is not finite. {said}Rows of the batch: "
            f"{', '.join(example for ids in rows for example in ids)}. Last "
            f"good checkpoint: {run.checkpoints.describe_latest()}. Look at these rows, lower the "
            "learning rate, or start again to resume from that checkpoint."
        )


def _different(before: dict, now: dict, inside: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, value before, value now) of what differs, nested ones as "outer.inner"."""
    for name in now:
        was, value = before.get(name), now[name]
        if isinstance(was, dict) and isinstance(value, dict):
            yield from _different(was, value, f"{inside}{name}.")
        elif was != value:
            yield f"{inside}{name}", was, value


def _line(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in values.items())
