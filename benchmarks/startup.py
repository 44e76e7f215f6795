"""Start-up: import time of `tulu_jax.train`, and seconds from process start to the first update.

    python benchmarks/startup.py

Each is a fresh process, medians of several, on a warm disk. The alternative for the import is the
same process importing transformers' `LlamaForCausalLM` and torch, which a torch trainer needs.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import outcome

TARGET_SECONDS, ROUNDS = 4.0, 5
HEAVY = ("tensorflow", "torch", "transformers", "datasets")
OURS = (
    "import tulu_jax.train, tulu_jax.trainer, sys;"
    f"print([m for m in {HEAVY!r} if m in sys.modules])"
)
THEIRS = "import torch, transformers; transformers.LlamaForCausalLM"


def seconds_of(code: str) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout.strip()


def first_step(folder: str) -> float:
    """Seconds until the metrics of the first update are on disk, with the data encoded already."""
    workdir = pathlib.Path(folder, f"run{time.monotonic_ns()}")
    command = [sys.executable, "-m", "tulu_jax.train", "--gin_file=tulu_tiny_sft.gin"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}", "--gin.NUM_STEPS=2"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and "train/loss" in metrics.read_text()):
        if process.poll() not in (None, 0):
            raise RuntimeError(f"training failed: {' '.join(command)}")
        time.sleep(0.02)
    elapsed = time.perf_counter() - start
    process.wait()
    return elapsed


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    seconds_of(OURS), seconds_of(THEIRS)  # warm the disk
    ours, theirs = [], []
    for _ in range(ROUNDS):
        elapsed, heavy = seconds_of(OURS)
        ours.append(elapsed)
        theirs.append(seconds_of(THEIRS)[0])
    with tempfile.TemporaryDirectory() as folder:
        first_step(folder)  # trains the tokenizer and fills the encode cache
        starts = [first_step(folder) for _ in range(3)]
    imported, other = statistics.median(ours), statistics.median(theirs)
    print(f"{'what':52} {'seconds':>8}")
    print(f"{'import tulu_jax.train and the trainer':52} {imported:8.2f}")
    print(f"{'import torch and transformers.LlamaForCausalLM':52} {other:8.2f}")
    print(f"{'process start to first update (tulu_tiny, compiling)':52} "
          f"{statistics.median(starts):8.2f}")  # fmt: skip
    print(f"imported before they are needed: {heavy}")
    ok = imported < TARGET_SECONDS and heavy == "[]"
    summary = {"name": "startup", "ratio": TARGET_SECONDS / imported, "target": 1.0, "ok": ok}
    summary |= {"import_seconds": imported, "first_step_seconds": statistics.median(starts)}
    outcome.tell({**summary, "heavy_modules": heavy})


if __name__ == "__main__":
    main()
