"""The rehearsal: what it makes of a config, and one with two processes from start to PASS."""

import math
import os
import pathlib
import re
import subprocess
import sys

import builders
import gin
import pytest

from tulu_jax import cli, preflight, rehearse, validation
from tulu_jax.data import data_checks, tulu_tiny
from tulu_jax.models import config as models
from tulu_jax.models import llama
from tulu_jax.parallel import sharding
from tulu_jax.parallel.mesh import AXES, MeshConfig

REPO = pathlib.Path(__file__).resolve().parents[1]
LOCAL = {f"tulu_tiny_{name}.gin" for name in ("sft", "dpo", "qlora", "rm")}
COMPLETE = sorted(  # the others read a model's folder
    path.name
    for path in (REPO / "configs").glob("*.gin")
    if not {"stories", "ppo"} & {*re.split("[0-9_.]", path.name)}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory, in whose ./cache the tokenizer is trained once."""
    return tmp_path_factory.mktemp("rehearse")


@pytest.fixture(autouse=True)
def home(folder, monkeypatch):
    monkeypatch.chdir(folder)
    yield folder
    gin.clear_config()


@pytest.mark.parametrize("processes", [2, 3, 4, 6])
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=-1),
        MeshConfig(data=4, fsdp=-1, topology="4*v5p:8x8x8"),
        MeshConfig(fsdp=32, context=4, tensor=4),
    ],
)
@pytest.mark.parametrize("dpo_stage", [False, True])
def test_a_published_config_shrinks_to_a_mesh_that_fits(home, mesh, processes, dpo_stage):
    config = builders.train_config(
        home, dpo_stage=dpo_stage, model=models.named("llama2_70b"), mesh=mesh, batch_size=512,
        micro_batch_size=256, num_steps=None, num_epochs=2.0, base="gs://b/llama",
    )  # fmt: skip
    config = builders.replace(config, execution__attention="auto", data__max_length=8192)
    small = rehearse.shrink(config, processes=processes, embedded=True)
    sizes = {axis: getattr(small.mesh, axis) for axis in AXES}
    assert math.prod(sizes.values()) % processes == 0
    assert all((sizes[a] > 1) == (getattr(mesh, a) != 1) or a == "fsdp" for a in AXES)
    params = llama.abstract_params(small.model, "float32")
    assert sharding.divisibility_problems(sizes, params) == []
    assert small.model.num_params < 2e6 and small.model.rope_theta == 1e4
    assert small.model.num_heads // small.model.num_kv_heads == 4  # 8 of the 70B, at most 4
    assert small.micro_batches == 2 and small.base is None and small.num_epochs is None
    assert small.micro_batch_size % (sizes["data"] * sizes["fsdp"]) == 0
    assert small.data.train == ("tulu_tiny_preference" if dpo_stage else "tulu_tiny")
    assert small.objective == config.objective and small.optimizer == config.optimizer


@pytest.mark.parametrize("name", COMPLETE)
def test_every_published_file_can_be_rehearsed_with_four_processes(name):
    config = cli.load(name, ["--gin.BUCKET='gs://b'"] if name not in LOCAL else [], workdir=None)
    small = rehearse.shrink(config, processes=4, embedded=True)
    devices = 4 * rehearse.devices_of_a_process(small, 4)
    assert list(preflight.mesh_problems(small, devices)) == []
    assert list(data_checks.problems(small.data, kind=config.data.kind)) == []


def test_a_run_that_needs_a_reward_model_is_refused():
    config = cli.load("ppo_13b.gin", ["--gin.BUCKET='gs://b'"], workdir=None)
    with pytest.raises(validation.UsageError, match="has no reward model of their shape"):
        rehearse.shrink(config, processes=4, embedded=True)


def test_rows_that_are_there_are_kept(home):
    config = builders.train_config(home, tokenizer=tulu_tiny.tokenizer())
    small = rehearse.shrink(config, processes=2, embedded=False)
    assert (small.data.train, small.data.tokenizer) == (config.data.train, config.data.tokenizer)


def test_folders_that_no_rehearsal_made_stay(tmp_path):
    (tmp_path / "disturbed").mkdir()
    with pytest.raises(validation.UsageError, match="disturbed would be removed"):
        rehearse.clear(tmp_path)
    assert (tmp_path / "disturbed").exists()
    rehearse.clear(tmp_path / "new")
    (tmp_path / "new/disturbed").mkdir()
    rehearse.clear(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [rehearse.MARK]


@pytest.mark.slow
def test_two_processes_from_start_to_pass(home):
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", REPO / "launch/rehearse.sh", "--processes=2", "--gin_file=tulu_tiny_sft.gin"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=590,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "PASS", done.stdout + done.stderr[-2000:]
    assert len([line for line in lines if line.startswith("ok ")]) == 7
    assert "killed: each said that process 1 died" in done.stdout
