"""A full disk, real (a file system of a megabyte): one line, status 2, and what was there stays."""

import errno
import os
import pathlib
import subprocess
import sys
import time

import pytest

from tulu_jax import provenance, validation
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import lease
from tulu_jax.training import metrics as metrics_lib

SMALL = """
from __gin__ import dynamic_registration
from tulu_jax.data import tulu_tiny
from tulu_jax.models import config
from tulu_jax.training import metrics

include 'tulu_tiny_sft.gin'

config.LlamaConfig.num_layers = 1
config.LlamaConfig.embed_dim = 32
config.LlamaConfig.mlp_dim = 64
config.LlamaConfig.head_dim = 8
metrics.LoggingConfig.tensorboard = False
MAX_LENGTH = 64
BATCH_SIZE = 8
BASE = None
NUM_STEPS = 30
CHECKPOINT_EVERY = 10
EVAL_EVERY = 1000
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_tokenizer):
    folder = tmp_path_factory.mktemp("full_disk")
    put_tokenizer(folder / "cache/tulu_tiny_tokenizer")
    (folder / "small.gin").write_text(SMALL)
    return folder


@pytest.fixture
def disk(tmp_path):
    """`disk(megabytes)` mounts a file system of its own; needs the right to mount."""
    mounted = []

    def mount(megabytes: float) -> pathlib.Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        size = f"size={int(megabytes * 1024)}k"
        command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def start(home, name, *flags):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, "-m", f"tulu_jax.{name}", "--gin_file=small.gin", *flags],
        cwd=home,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def finish(process, code):
    said = process.communicate(timeout=300)[1]
    assert process.returncode == code, said
    return said


def fill(folder):
    """Leaves no byte free."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC


def test_a_disk_that_fills_up_keeps_the_run_and_its_curve(home, disk):
    workdir = disk(16) / "run"
    process = start(home, "train", f"--workdir={workdir}")
    checkpoints = workdir / checkpoint_lib.FOLDER
    while not (checkpoints / "10").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    fill(workdir.parent)
    said = finish(process, 2)
    assert f"Last good checkpoint: step 10 in {checkpoints}. Free some space" in said
    assert os.strerror(errno.ENOSPC) in said
    assert not (workdir / lease.FILE).exists()
    (workdir.parent / "filler").unlink()
    assert "Resuming from step 10" in finish(start(home, "train", f"--workdir={workdir}"), 0)
    steps = [line["step"] for line in metrics_lib.read(str(workdir)) if "train/loss" in line]
    assert steps == list(range(1, 31))
    left = {path.name for path in workdir.iterdir()}
    assert left == {
        "checkpoints",
        "config.gin",
        "tokenizer.json",
        metrics_lib.FILE,
        provenance.FILE,
    }

    out = disk(0.1) / "hf"  # an export
    said = finish(start(home, "convert", f"--workdir={workdir}", f"--out={out}"), 2)
    assert "free some space" in said
    assert not [*out.parent.iterdir()]


def test_a_cache_without_room_is_refused_and_goes_on(home, disk, put_tokenizer):
    cache = disk(0.25)
    (cache / "cache").mkdir()
    put_tokenizer(cache / "cache/tulu_tiny_tokenizer")
    (home / "cached.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from tulu_jax.data import loader\n"
        "include 'small.gin'\n"
        f"loader.DataConfig.cache_dir = '{cache}/cache'\n"
    )
    said = finish(start(home, "prepare", "--gin_file=cached.gin"), 2)
    assert os.strerror(errno.ENOSPC) in said and "free some space" in said


def test_what_no_room_is():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert validation.is_full(OSError(number, os.strerror(number)))
        wrapped = RuntimeError("a checkpoint could not be written")
        wrapped.__cause__ = ValueError(f"RESOURCE_EXHAUSTED: write: {os.strerror(number)} [17]")
        assert validation.is_full(wrapped)
    assert not validation.is_full(OSError(errno.EIO, os.strerror(errno.EIO)))
    assert not validation.is_full(None)
