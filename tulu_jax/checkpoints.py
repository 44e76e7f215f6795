"""Lists the checkpoints of a run, from its workdir alone: step, size, age, health.

Examples:
  python -m tulu_jax.checkpoints --workdir=runs/tulu_tiny_sft            # files and their sizes
  python -m tulu_jax.checkpoints --workdir=runs/tulu_tiny_sft --verify   # every byte, every array

Exit status 1 means that one is damaged. It only reads, on the CPU, also beside a run, and takes
memory for the largest array.
"""

import sys
import time
from collections.abc import Iterator

import jax
from absl import app, flags, logging

from tulu_jax import cli, validation
from tulu_jax.training import checkpoint, checkpoint_digests

_VERIFY = flags.DEFINE_bool("verify", False, "Compare every file and array with its digest.")

DAMAGED = "damaged: "


def health(checkpoints: checkpoint.Checkpoints, step: int, *, verify: bool) -> str:
    """'verified', 'unverified' (without digests, or not asked for), or 'damaged: ' and what is."""
    found = checkpoints.damages(step, sizes_only=not verify)
    if found and "://" in str(checkpoints.folder):  # it may have been damaged on its way
        found = checkpoints.damages(step, sizes_only=not verify)
    if found:
        return DAMAGED + checkpoint_digests.named(found)
    if found is None:
        return "unverified: saved without digests"
    return "verified" if verify else "unverified: sizes are right, --verify reads it"


def rows(workdir: str, *, verify: bool) -> Iterator[tuple[str, str, str, str]]:
    """Step, size, age and health of every checkpoint, in order. Raises `UsageError` if there is
    none."""
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.require(None)
    for step in checkpoints.steps():
        folder = checkpoints.folder / str(step)
        files = checkpoint_digests.files(folder).values()
        size = sum(file.stat().length for file in files)
        age = time.time() - max((file.stat().mtime for file in files), default=time.time())
        yield str(step), _size(size), _age(age), health(checkpoints, step, verify=verify)


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def main(argv: list[str]) -> None:
    """Prints the table, a line as soon as it is known."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # a run may hold the chips
    logging.get_absl_handler().addFilter(cli.ours_or_serious)
    with validation.refusing():
        workdir = cli.workdir()
        if workdir is None:
            raise validation.UsageError("no --workdir; give that of a run, such as runs/sft_70b")
        line, damaged = "{:>8}  {:>10}  {:>7}  {}", False
        print(line.format("step", "size", "age", "health"))
        for row in rows(workdir, verify=_VERIFY.value):
            print(line.format(*row), flush=True)
            damaged |= row[-1].startswith(DAMAGED)
    sys.exit(int(damaged))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
