"""What the loop reads of each update: is it finite, its rates, its lines, the progress bar."""

import math
import time

import jax
import numpy as np

from tulu_jax import step as step_lib
from tulu_jax.training import metrics as metrics_lib


class Meter:
    """Reads metrics of `run`, a `trainer.Run`, one update late, so that the device never waits."""

    def __init__(self, run, recorder: metrics_lib.Recorder):
        self.run, self.recorder = run, recorder
        self.pending: tuple[int, step_lib.Measured] | None = None
        self.flops = run.config.model.flops_per_token(run.config.data.max_length)
        self.restart()

    def restart(self) -> None:
        """Leaves what happened since the last update out of the rates."""
        self.time = time.perf_counter()

    def push(self, step: int, measured: step_lib.Measured, bar) -> None:
        """Remembers what was measured at `step` and reports that of the update before."""
        self.flush(bar)
        self.pending = step, measured

    def flush(self, bar) -> None:
        """Reports what is pending. Raises `FloatingPointError` if it is not finite."""
        if self.pending is None:
            return
        step, measured = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(measured.scalars).items()}
        now = time.perf_counter()
        seconds, self.time = now - self.time, now
        self._require_finite(step, values, measured.examples)
        known = {*self.run.config.objective.metrics, "grad_norm", "learning_rate"}
        counts = {name: values.pop(name) for name in list(values) if name not in known}
        scalars = {f"train/{name}": value for name, value in values.items()}
        scalars |= {f"batch/{name}": value for name, value in counts.items()}
        scalars |= metrics_lib.rates(
            counts, seconds, flops=self.flops * counts["positions"], peak_flops=self.run.peak_flops
        )
        if step % self.run.config.logging.every == 0 or step == self.run.num_steps:
            self.recorder.write(step, scalars)
        rate = scalars["perf/nonpadding_tokens_per_second"]
        bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:,.0f} useful tokens/s")

    def _require_finite(self, step: int, values: dict[str, float], examples: dict) -> None:
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if not bad:
            return
        run, size = self.run, self.run.config.batch_size
        rows = [run.feed.rows.example_ids(row) for row in range((step - 1) * size, step * size)]
        said = ""
        for name, value in examples.items():
            by_row = np.isfinite(np.asarray(value)).reshape(size, -1)
            named = [
                example
                for ids, finite in zip(rows, by_row, strict=True)
                for example, fine in zip(ids, finite, strict=False)
                if not fine
            ]
            said += f"Examples whose {name} is not finite: {', '.join(named) or 'none'}. "
        run.checkpoints.wait()
        raise FloatingPointError(
            f"step {step}: {line(bad)} is not finite. {said}Rows of the batch: "
            f"{', '.join(example for ids in rows for example in ids)}. Last "
            f"good checkpoint: {run.checkpoints.describe_latest()}. Look at these rows, lower the "
            "learning rate, or start again to resume from that checkpoint."
        )


def line(values: dict[str, float]) -> str:
    """Names and values, five digits each."""
    return ", ".join(f"{name} {value:.5g}" for name, value in values.items())
