"""SIGTERM as Python and as compiled code get it, in processes of their own."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

BEGIN = """
import contextlib, pathlib, sys, time
import jax, jax.numpy as jnp
from tulu_jax import atomic
from tulu_jax.parallel import preemption
from tulu_jax.training import lease

preemption.GRACE = 0.5
folder = pathlib.Path(sys.argv[1])
"""
IN_PYTHON = """
with preemption.ending(), lease.held(str(folder / "run")), atomic.writing(folder / "half"):
    (folder / "ready").touch()
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass
"""
IN_COMPILED_CODE = """
with preemption.ending(), lease.held(str(folder / "run")), atomic.writing(folder / "half") as file:
    file.write(b"half")
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: x + 1e-9, x))
    compiled = endless.lower(1.0).compile()
    (folder / "ready").touch()
    compiled(1.0).block_until_ready()
"""
IN_WHAT_IS_DONE_LATER = """
with preemption.ending(), lease.held(str(folder / "run")):
    with preemption.later():
        (folder / "ready").touch()
        end = time.monotonic() + 1.5  # beyond GRACE
        while time.monotonic() < end:
            time.sleep(0.01)
        (folder / "done").touch()
    (folder / "never").touch()
"""
IN_A_LOOP = """
with (
    preemption.ending(),
    lease.held(str(folder / "run")),
    contextlib.closing(preemption.Notice()) as notice,
):
    for step in range(1, 1000):
        time.sleep(0.01)
        if notice.reached(step):
            raise preemption.Preempted("Stopped and saved", together=True)
        (folder / "ready").touch()
"""


def terminated(tmp_path: pathlib.Path, code: str) -> tuple[int, str]:
    """Exit status and stderr of a process that gets SIGTERM once it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(BEGIN + code), str(tmp_path)],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


@pytest.mark.parametrize(
    ("code", "words", "left"),
    [
        (IN_PYTHON, "with nothing to save since the last checkpoint", set()),
        (IN_COMPILED_CODE, "still in compiled code: ended", set()),
        (IN_WHAT_IS_DONE_LATER, "with nothing to save since the last checkpoint", {"done"}),
        (IN_A_LOOP, "Stopped and saved. Start the same command again", set()),
    ],
    ids=["python", "compiled code", "later", "loop"],
)
def test_sigterm_ends_with_75_and_leaves_nothing_torn(tmp_path, code, words, left):
    status, said = terminated(tmp_path, code)
    assert status == 75, said
    assert words in said and "Traceback" not in said
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files - {"ready"} == left
