"""Runs by two (slow: four) real processes, over gloo, give the curve of one, through deaths and
SIGTERM."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import metrics as metrics_lib

CONFIG = """
from __gin__ import dynamic_registration
from tulu_jax.data import tulu_tiny
from tulu_jax.models import config
from tulu_jax.parallel import mesh

include '{stage}.gin'

config.LlamaConfig.num_layers = 1
config.LlamaConfig.embed_dim = 32
config.LlamaConfig.mlp_dim = 64
config.LlamaConfig.head_dim = 8
config.LlamaConfig.num_heads = 4
config.LlamaConfig.num_kv_heads = 2
mesh.MeshConfig.data = 2
mesh.MeshConfig.fsdp = 2
mesh.MeshConfig.tensor = 2
MAX_LENGTH = 64
BATCH_SIZE = 8
BASE = None
NUM_STEPS = 6
CHECKPOINT_EVERY = 3
EVAL_EVERY = 1000
"""
# Shards of whole blocks of a quantised base.
WIDE = """
config.LlamaConfig.embed_dim = 128
config.LlamaConfig.mlp_dim = 128
config.LlamaConfig.head_dim = 32
"""
DEVICES = 8
PEER_TIMEOUT = 20


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_tokenizer):
    """A folder whose gin files, tokenizer and encode cache the tests share."""
    folder = tmp_path_factory.mktemp("processes")
    for stage in ("tulu_tiny_sft", "tulu_tiny_dpo"):
        (folder / f"{stage}_small.gin").write_text(CONFIG.format(stage=stage))
    qlora = CONFIG.format(stage="tulu_tiny_qlora") + WIDE
    (folder / "tulu_tiny_qlora_small.gin").write_text(qlora)
    put_tokenizer(folder / "cache/tulu_tiny_tokenizer")
    return folder


def start(home, workdir, *, count, stage="tulu_tiny_sft", options=(), of_one=(), devices=DEVICES):
    """`count` processes of one run on so many devices together; `of_one[i]` are flags of process i
    alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        *(sys.executable, "-m", "tulu_jax.train", f"--gin_file={stage}_small.gin"),
        *(f"--workdir={workdir}", f"--coordinator_address={address}", f"--num_processes={count}"),
        *(f"--peer_timeout={PEER_TIMEOUT}", "--start_timeout=240", *options),
    ]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count}",
    }
    return [
        subprocess.Popen(
            [*command, f"--process_id={i}", *(of_one[i] if of_one else ())],
            cwd=home,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes, codes=None):
    """What each wrote to stderr; all must end with these exit codes (default 0)."""
    errors = [process.communicate(timeout=500)[1] for process in processes]
    found = [process.returncode for process in processes]
    assert found == (codes or [0] * len(processes)), "\n---\n".join(e[-3000:] for e in errors)
    return errors


def at_step(processes, workdir, step):
    """Returns once `step` updates are in the metrics."""
    path = workdir / metrics_lib.FILE
    while not path.exists() or path.read_text().count("train/loss") < step:
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)


def assert_same_curve(found, expected):
    """The same numbers in another order of reduction; counts of rows and tokens exactly."""
    found, expected = (metrics_lib.read(str(workdir)) for workdir in (found, expected))
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {n for n in a if n.startswith("perf/")}:
            if name.startswith("batch/"):
                assert a[name] == b[name], name
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tulu_tiny_dpo", "tulu_tiny_qlora"])
def test_two_processes_give_the_curve_of_one(home, tmp_path, stage):
    """On pairs, and of adapters on a quantised base; on conversations, through deaths, below."""
    finish(start(home, tmp_path / "one", count=1, stage=stage))
    finish(start(home, tmp_path / "two", count=2, stage=stage))
    assert_same_curve(tmp_path / "two", tmp_path / "one")


def killed(home, workdir, victim, *, step, count, **run):
    """A try that ends in SIGKILL to one behind update `step`: all others say which, and ask to be
    started again."""
    processes = start(home, workdir, count=count, **run)
    at_step(processes, workdir, step)
    processes[victim].send_signal(signal.SIGKILL)
    died, host = time.monotonic(), socket.gethostname()
    codes = [75] * count
    codes[victim] = -signal.SIGKILL
    errors = finish(processes, codes)
    assert time.monotonic() - died < PEER_TIMEOUT + 10
    for i in set(range(count)) - {victim}:
        assert f"process {i} ({host}) stops: process {victim} ({host}) died" in errors[i]


def terminated(home, workdir, victim, *, step, count, **run):
    """A try that SIGTERM to one stops behind update `step`, with a checkpoint."""
    processes = start(home, workdir, count=count, **run)
    at_step(processes, workdir, step)
    processes[victim].send_signal(signal.SIGTERM)
    errors = finish(processes, [75] * count)
    saved = max(checkpoint_lib.Checkpoints(str(workdir)).steps())
    assert saved >= step
    assert all(f"Stopped and saved: step {saved} in" in error for error in errors)


def goes_on_to_the_end(home, workdir, one, *, tries, count, **run):
    """The last of `tries`: its curve is that of `one`, and process 0 alone writes and draws."""
    saved = max(checkpoint_lib.Checkpoints(str(workdir)).steps())
    errors = finish(start(home, workdir, count=count, **run))
    assert f"Resuming from step {saved}" in errors[0]
    assert_same_curve(workdir, one)
    assert ["train: 100%" in error for error in errors] == [i == 0 for i in range(count)]
    assert len(list((workdir / "tensorboard").iterdir())) == tries


SHORT = ["--gin.NUM_STEPS=20", "--gin.CHECKPOINT_EVERY=4", "--gin.EVAL_EVERY=10"]


@pytest.fixture(scope="module")
def one(home):
    """The workdir of the run of one process that two are compared with."""
    finish(start(home, home / "one", count=1, options=SHORT))
    return home / "one"


@pytest.mark.slow
def test_two_processes_through_the_death_of_the_first(home, one, tmp_path):
    """The death of the second is rehearsed in test_rehearse.py."""
    run = dict(count=2, options=SHORT)
    killed(home, tmp_path, 0, step=6, **run)
    goes_on_to_the_end(home, tmp_path, one, tries=2, **run)


@pytest.mark.slow
def test_two_processes_through_a_sigterm_to_the_second(home, one, tmp_path):
    run = dict(count=2, options=SHORT)
    terminated(home, tmp_path, 1, step=10, **run)
    goes_on_to_the_end(home, tmp_path, one, tries=2, **run)


@pytest.mark.slow
def test_two_processes_find_a_flipped_bit_and_go_back(home, one, tmp_path):
    """Each reads its share of the files; both say which one, though one alone has read it."""
    workdir = shutil.copytree(one, tmp_path / "run")
    folder = workdir / checkpoint_lib.FOLDER / "20"
    file = max((folder / "state").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    run = dict(count=2, options=SHORT)
    for error in finish(start(home, workdir, **run), [2, 2]):
        assert f"file {file.relative_to(folder)} has digest" in error and "of steps [16]" in error
    run["options"] = [*SHORT, "--on_damage=newest_whole"]
    assert "Resuming from step 16" in finish(start(home, workdir, **run))[0]
    assert_same_curve(workdir, one)
    names = {path.name for path in folder.parent.iterdir()}
    assert names == {"16", "20", "20.damaged"}


@pytest.mark.slow
def test_four_processes_through_two_deaths_and_a_sigterm(home, tmp_path):
    """Any process may die, process 0 too: the others say which, and the next try goes on.

    `context` spans two processes, so pairs of them load the same rows.
    """
    text = CONFIG.format(stage="tulu_tiny_sft").replace("MeshConfig.data", "MeshConfig.context")
    (home / "shared_rows_small.gin").write_text(text)
    options = ["--gin.NUM_STEPS=60", "--gin.CHECKPOINT_EVERY=10", "--gin.EVAL_EVERY=20"]
    run = dict(stage="shared_rows", options=options)
    finish(start(home, tmp_path / "one", count=1, **run))
    workdir = tmp_path / "four"
    killed(home, workdir, 2, step=12, count=4, **run)
    killed(home, workdir, 0, step=24, count=4, **run)
    terminated(home, workdir, 3, step=36, count=4, **run)
    goes_on_to_the_end(home, workdir, tmp_path / "one", tries=4, count=4, **run)


def test_processes_that_differ_are_refused_before_they_compile(home, tmp_path):
    of_one = [["--gin.NUM_STEPS=6"], ["--gin.NUM_STEPS=7"]]
    for error in finish(start(home, tmp_path / "run", count=2, of_one=of_one), [2, 2]):
        assert "has another configuration than most" in error and "NUM_STEPS = 7" in error
    assert not (tmp_path / "run").exists()
