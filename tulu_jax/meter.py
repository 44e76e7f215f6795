"""What the loop reads of each update: is it finite, its rates, its lines, the progress bar."""

import math
import time

import jax
import numpy as np
from absl import logging

from tulu_jax import step as step_lib
from tulu_jax.training import metrics as metrics_lib
from tulu_jax.training import watch


class Meter:
    """Reads metrics of `run`, a `trainer.Run`, one update late, so that the device never waits."""

    def __init__(self, run, recorder: metrics_lib.Recorder):
        self.run, self.recorder = run, recorder
        self.pending: tuple[int, step_lib.Measured] | None = None
        self.flops = run.config.trained_model.flops_per_token(run.config.data.max_length)
        self.restart()

    def restart(self) -> None:
        """Leaves what happened since the last update out of the rates."""
        self.time = time.perf_counter()

    def push(self, step: int, measured: step_lib.Measured, bar) -> None:
        """Remembers what was measured at `step` and reports that of the update before."""
        self.flush(bar)
        self.pending = step, measured

    def flush(self, bar) -> None:
        """Reports what is pending. Raises `watch.UnstableError` if it went wrong, and the policy is
        to stop."""
        if self.pending is None:
            return
        step, measured = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(measured.scalars).items()}
        now = time.perf_counter()
        seconds, self.time = now - self.time, now
        skipped = values.pop("skipped", 0.0) > 0
        self._judge(step, values, measured.examples, skipped)
        known = {*self.run.config.objective.metrics, "grad_norm", "learning_rate"}
        counts = {name: values.pop(name) for name in list(values) if name not in known}
        scalars = {f"train/{name}": value for name, value in values.items()}
        if self.run.config.watch.skips:
            scalars["train/skipped"] = self.run.history.skipped
        scalars |= {f"batch/{name}": value for name, value in counts.items()}
        scalars |= metrics_lib.rates(
            counts, seconds, flops=self.flops * counts["positions"], peak_flops=self.run.peak_flops
        )
        if step % self.run.config.logging.every == 0 or step == self.run.num_steps or skipped:
            self.recorder.write(step, scalars)
        rate = scalars["perf/nonpadding_tokens_per_second"]
        bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:,.0f} useful tokens/s")

    def _judge(self, step: int, values: dict[str, float], examples: dict, skipped: bool) -> None:
        """Adds the loss of `step` to the history. Tells of an update that went wrong, and stops as
        the policy says."""
        policy, history, loss = self.run.config.watch, self.run.history, values["loss"]
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        bound = history.bound(step)
        history.add(None if skipped else loss)
        if not bad and not skipped and loss <= bound:
            return
        if bad:
            said = f"step {step}: {line(bad)} is not finite. {self._not_finite(step, examples)}"
        else:
            said = (
                f"step {step}: loss {loss:.5g} is a spike, above {bound:.5g} as the "
                f"{policy.window} updates before have it. "
            )
        rows = ", ".join(example for ids in self._rows(step) for example in ids)
        said += f"Rows of the batch: {rows}. "
        if skipped and history.skipped_in_a_row() < policy.most_skipped:
            logging.warning("%sThe update was skipped, %d in all", said, history.skipped)
            return
        if not bad and not skipped and policy.spikes == "log":
            logging.warning("%sThe run goes on", said)
            return
        self.run.checkpoints.wait()
        if skipped:
            said += f"It is the last of {policy.most_skipped} updates skipped in a row. "
            advice = ""
        else:
            advice = f", or set WatchConfig.{'not_finite' if bad else 'spikes'} = 'skip'"
        raise watch.UnstableError(
            f"{said}Last good checkpoint: {self.run.checkpoints.describe_latest()}. Look at these "
            f"rows, lower the learning rate{advice}; started again, the run goes on from there"
        )

    def _rows(self, step: int) -> list[list[str]]:
        """The names of the examples of each row of the batch of `step`."""
        size, ids = self.run.config.batch_size, self.run.feed.rows.example_ids
        return [ids(row) for row in range((step - 1) * size, step * size)]

    def _not_finite(self, step: int, examples: dict) -> str:
        """Which examples have values that are not finite, in sentences."""
        said = ""
        for name, value in examples.items():
            by_row = np.isfinite(np.asarray(value)).reshape(self.run.config.batch_size, -1)
            named = [
                example
                for ids, finite in zip(self._rows(step), by_row, strict=True)
                for example, fine in zip(ids, finite, strict=False)
                if not fine
            ]
            said += f"Examples whose {name} is not finite: {', '.join(named) or 'none'}. "
        return said


def line(values: dict[str, float]) -> str:
    """Names and values, five digits each."""
    return ", ".join(f"{name} {value:.5g}" for name, value in values.items())
