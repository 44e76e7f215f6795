"""What a run reports: JSONL always, TensorBoard, Weights & Biases if asked for; rates and MFU."""

import dataclasses
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging
from etils import epath

from tulu_jax import atomic, chips, strict_json, validation

FILE = "metrics.jsonl"
WANDB_ID = "wandb_id"  # a file of the workdir
_BEGINNING = '{"step": '
_NO_METRICS = (
    "has a line without a step, expected the metrics of a run; move that file away, or choose "
    "another --workdir"
)
BUCKET_SECONDS = 30.0  # between two writes of the metrics of a run in a bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """`every`: updates between lines of metrics. `wandb_project`: None for no Weights & Biases."""

    every: int = 1
    tensorboard: bool = True
    wandb_project: str | None = None

    def __post_init__(self):
        validation.check(self, lambda: [(self.every > 0, f"every = {self.every}: not positive")])


class Recorder:
    """Writes scalars by step on process 0. A run that goes on from `start_step` keeps the lines of
    an earlier try up to there, and one that begins (0) none, so it has each step once. The file is
    replaced by a whole one (`atomic`): a kill leaves the former lines or the kept ones.

    Below a local `workdir` each line is on disk at once. An object in a bucket cannot grow: there
    the whole file is written again, and the TensorBoard files with it, every `BUCKET_SECONDS` and
    at each `flush`.
    """

    def __init__(self, config: LoggingConfig, workdir: str, start_step: int, run_config: dict):
        self._file = self._tensorboard = self._wandb = self._local = None
        self._lines: list[str] | None = None  # of a run in a bucket
        if jax.process_index() != 0:
            return
        self._folder = folder = epath.Path(workdir)
        path = folder / FILE
        lines = read(workdir) if path.exists() else []  # which refuses a file that is not ours
        kept = [strict_json.dumps(line) + "\n" for line in lines if 0 < start_step >= line["step"]]
        if "://" in workdir:
            self._lines, self._written = kept, time.monotonic()
            self._local = tempfile.TemporaryDirectory()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, "".join(kept))
            self._file = path.open("a")
        if config.tensorboard:
            where = self._local.name if self._local else str(folder / "tensorboard")
            self._tensorboard = _tensorboard().SummaryWriter(where, purge_step=start_step + 1)
        if config.wandb_project:
            self._wandb = _start_wandb(config.wandb_project, folder, run_config)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of metrics, on disk at once, so that a killed run keeps its curve; null stands
        for what is not finite."""
        if self._file is None and self._lines is None:
            return
        values = {name: float(value) for name, value in scalars.items()}
        line = strict_json.dumps({"step": step, **values}) + "\n"
        if self._file:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._file.name) from error
        else:
            self._lines.append(line)
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)
        if self._lines is not None and time.monotonic() > self._written + BUCKET_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Brings what was written into a bucket; called before each checkpoint, so that a run
        resumed from it has the lines up to there."""
        if self._lines is None:
            return
        atomic.write_text(self._folder / FILE, "".join(self._lines))
        if self._tensorboard:
            self._tensorboard.flush()
            for file in epath.Path(self._local.name).iterdir():
                atomic.write_bytes(self._folder / "tensorboard" / file.name, file.read_bytes())
        self._written = time.monotonic()

    def close(self) -> None:
        """Flushes and closes every sink."""
        self.flush()
        for sink in (self._file, self._tensorboard):
            if sink:
                sink.close()
        if self._local:
            self._local.cleanup()
        if self._wandb:
            self._wandb.finish()


def _tensorboard():
    """tensorboardX. It imports torch where there is one, for tensors that nobody here gives it:
    5 seconds of every start, so it is told that there is none."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None
    try:
        import tensorboardX
    finally:
        if absent:
            del sys.modules["torch"]
    return tensorboardX


def _start_wandb(project: str, folder: epath.Path, run_config: dict):
    """The Weights & Biases run of a workdir: the same one at each try, by the id kept there. It
    leaves out the steps that it has already."""
    try:
        import wandb
    except ImportError as error:
        raise validation.UsageError(
            f"LoggingConfig.wandb_project = {project!r} needs the package wandb: pip install wandb"
        ) from error
    file = folder / WANDB_ID
    known = file.read_text().strip() if file.exists() else ""
    run_id = known or uuid.uuid4().hex[:12]
    if not known:
        atomic.write_text(file, run_id + "\n")
    return wandb.init(
        project=project, name=folder.name, config=run_config, id=run_id, resume="allow"
    )


def read(workdir: str) -> list[dict]:
    """The lines of a run's metrics. A torn last line (a kill while writing) is left out.

    Raises `UsageError` if the run has written none, and for a line that is none of a run.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        raise validation.UsageError(
            f"{path} does not exist; expected the workdir of a run that has trained"
        )
    lines = path.read_text().split("\n")
    whole, last = lines[:-1], lines[-1]
    if last and not last.startswith(_BEGINNING[: len(last)]):
        raise validation.UsageError(f"{path} {_NO_METRICS}")
    if last:
        logging.warning("%s/%s ends in a torn line, left out: %r", workdir, FILE, last[:80])
    try:
        lines = [strict_json.loads(line) for line in whole]
    except ValueError as error:
        raise validation.UsageError(
            f"{path} has a line that is not JSON ({error}); remove that line"
        ) from error
    if not all(isinstance(line, dict) and type(line.get("step")) is int for line in lines):
        raise validation.UsageError(f"{path} {_NO_METRICS}")
    return lines


def rates(
    counts: Mapping[str, float], seconds: float, *, flops: float, peak_flops: float
) -> dict[str, float]:
    """`perf/*` of updates that took `seconds`: hardware MFU, and the rates of useful work.

    MFU counts every position of the batch, padding included: `flops` is model FLOPs for all of
    them (`LlamaConfig.flops_per_token`: causal attention over the whole row, more than documents
    of a packed row see), `peak_flops` that of all devices. The useful rates say how much of it was
    worth doing.
    """
    names = {"positions": "tokens", "nonpadding": "nonpadding_tokens", "trained": "trained_tokens"}
    return {
        "perf/step_seconds": seconds,
        "perf/mfu": flops / seconds / peak_flops,
        "perf/useful_fraction": counts["nonpadding"] / counts["positions"],
    } | {
        f"perf/{names.get(name, name)}_per_second": count / seconds
        for name, count in counts.items()
    }


def peak_flops(devices: list[jax.Device]) -> float:
    """Peak FLOP/s of `devices` together: published bfloat16 peaks, or on a CPU what a matrix
    multiplication reaches here (all devices share the cores)."""
    kind = devices[0].device_kind
    counted = "perf/mfu counts causal attention over whole rows and padding"
    if published := chips.peak(kind):
        peak = published * len(devices)
        logging.info("%s, against a published %.3g FLOP/s bfloat16", counted, peak)
        return peak
    x = jax.device_put(np.ones((1024, 1024), np.float32), jax.local_devices()[0])
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    measured = 2 * 1024**3 / min(seconds)
    logging.info("%s, against a measured %.3g FLOP/s float32: no published peak for device %r",
                 counted, measured, kind)  # fmt: skip
    return measured
