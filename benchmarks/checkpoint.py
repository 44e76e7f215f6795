"""Seconds that a save takes, how long the loop waits for it, and what of it the digests are.

    python benchmarks/checkpoint.py [--gigabytes=0.6] [--repeats=5]

Parameters and two moments of that size in all, float32 and normal. `blocked` is `Checkpoints.save`
itself, `save` the same until the checkpoint is complete, which a loop that saved synchronously
would wait for. Both parts of the digests are timed alone: the sums of the arrays, and the hashes of
the files. In a save they run beside what is written, and behind it. NAME_cpu are seconds of all
cores, which other work on the machine changes less.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

import outcome

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from etils import epath

from tulu_jax.training import checkpoint, checkpoint_digests
from tulu_jax.training.state import TrainState

WIDTH, DEPTH = 1024, 4
BLOCKED, SHARE = 0.15, 0.05  # at most, of a save


def make_state(size: float) -> TrainState:
    shape = (max(1, int(size / 4 / 3 / DEPTH / WIDTH)), WIDTH)
    keys = iter(jax.random.split(jax.random.key(0), 3 * DEPTH))

    def tree():
        return {f"kernel_{i}": jax.random.normal(next(keys), shape) for i in range(DEPTH)}

    return TrainState(step=jnp.int32(0), params=tree(), opt_state={"mu": tree(), "nu": tree()})


def timed(call) -> tuple[float, float]:
    """Seconds of the clock, and of all cores."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu


def measure(state: TrainState, repeats: int) -> dict[str, float]:
    """Medians in seconds, NAME of the clock and NAME_cpu of all cores."""
    found = {name: [] for name in ("blocked", "save", "sums", "files")}
    jax.block_until_ready(checkpoint_digests.of_arrays(state))
    with tempfile.TemporaryDirectory() as workdir:
        config = checkpoint.CheckpointConfig(every=1, keep=1)
        checkpoints = checkpoint.Checkpoints(workdir, config)
        for step in range(repeats + 1):
            blocked = timed(lambda step=step: checkpoints.save(step, state, {}, {}))
            rest = timed(checkpoints.wait)
            save = tuple(map(sum, zip(blocked, rest, strict=True)))
            arrays = checkpoint_digests.of_arrays(state)
            sums = timed(lambda: jax.block_until_ready(checkpoint_digests.of_arrays(state)))
            folder = epath.Path(workdir) / checkpoint.FOLDER / str(step)
            files = timed(lambda f=folder, a=arrays: checkpoint_digests.write(f, a))
            if step:  # the first one compiles
                values = {"blocked": blocked, "save": save, "sums": sums, "files": files}
                for name, value in values.items():
                    found[name].append(value)
        checkpoints.close()
    return {
        name + suffix: statistics.median(value[kind] for value in values)
        for name, values in found.items()
        for kind, suffix in enumerate(("", "_cpu"))
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    seconds = measure(make_state(given.gigabytes * 1e9), given.repeats)
    blocked = seconds["blocked"] / seconds["save"]
    share = (seconds["sums"] + seconds["files"]) / seconds["save"]
    cpu = (seconds["sums_cpu"] + seconds["files_cpu"]) / seconds["save_cpu"]
    print(json.dumps({name: round(value, 3) for name, value in seconds.items()}))
    print(f"digests: {share:.1%} of the seconds of a save, {cpu:.1%} of its cores' seconds")
    for name, ratio, target in (("blocked", blocked, BLOCKED), ("digests", share, SHARE)):
        result = {"name": f"checkpoint_{name}", "ratio": ratio, "target": target}
        outcome.tell(result | {"ok": ratio <= target})


if __name__ == "__main__":
    main()
