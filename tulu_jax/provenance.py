"""Where the numbers of a run come from: `provenance.json` of its workdir, an entry for each try.

A run that was stopped and went on has several. Each says what computed its updates: versions, the
revision of this package, hardware, config, data, tokenizer, the weights it began with, and its wall
time. `metrics.jsonl` says what came out.
"""

import datetime
import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from tulu_jax import atomic, strict_json, validation

FILE = "provenance.json"
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
GIT_SECONDS = 10.0


class Record:
    """The entry of this try of a `trainer.Run`, which begins after `step`: written now and again
    with each `update`; by process 0 alone."""

    def __init__(self, run, step: int):
        workdir = run.config.workdir
        self._file = epath.Path(workdir) / FILE if jax.process_index() == 0 else None
        if self._file is None:
            return
        self._before = [] if step == 0 else read(workdir)
        self._start = time.monotonic()
        self._entry = {
            "began": _now(),
            "first_step": step,
            "versions": versions(),
            "git": revision(),
            "hardware": hardware(list(run.mesh.devices.flat)),
            "config": digest(run.config_text),
            "data": run.feed.rows.fingerprint,
            "tokenizer": run.tokenizer,
            "weights": run.weights,
        }
        self.update(step)

    def update(self, step: int) -> None:
        """Says that the try has reached `step`. `seconds` are those since its first update was
        prepared, compilation and evaluations within."""
        if self._file is None:
            return
        seconds = round(time.monotonic() - self._start, 1)
        entry = self._entry | {"last_step": step, "ended": _now(), "seconds": seconds}
        atomic.write_text(self._file, strict_json.dumps([*self._before, entry], indent=1) + "\n")


def read(workdir: str) -> list[dict[str, Any]]:
    """The entries of all tries; none of a run of before there were any. Raises `UsageError` for a
    file that holds none."""
    file = epath.Path(workdir) / FILE
    if not file.exists():
        return []
    try:
        found = strict_json.loads(file.read_text())
    except ValueError as error:
        raise validation.UsageError(
            f"{file} is not JSON ({error}); expected what a run wrote there; move it away"
        ) from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise validation.UsageError(f"{file} holds no list of tries; move it away")
    return found


def versions() -> dict[str, str]:
    """The versions of Python and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def revision() -> dict[str, Any] | None:
    """The git revision of this package and whether files of it were changed; None where it lies in
    no repository that knows it."""
    folder = pathlib.Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, check=True, timeout=GIT_SECONDS,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """What the devices of a mesh are, and of how many processes."""
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "machine": platform.machine(),
    }


def digest(text: str | None) -> str | None:
    """A short digest of a config's text."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
