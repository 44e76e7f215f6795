"""`python -m tulu_jax.dryrun` as typed: the real compiler, a small model, an absent slice."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import commands
import pytest

from tulu_jax import cli
from tulu_jax.planning import aot, hlo

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "jax[tpu]"'
)


def assert_reported(folder, said):
    assert "to spare" in said and "between, by calibration" in said
    assert "MFU, visible attention counted" in said and "attention counted whole" in said
    (result,) = json.loads((folder / "dryrun.json").read_text())
    assert result["fits"] and result["spare"] > 0.9
    assert result["seconds"]["step"] > 0
    assert 0 < result["mfu"] < result["mfu_whole_attention"] < 1
    band, seconds = result["band"], result["seconds"]
    assert band["low"] < 1 < band["high"]
    assert band["share"] == pytest.approx(seconds["interconnect"] / seconds["step"])
    assert ("extrapolated" in said) == band["extrapolated"]
    assert (folder / "dryrun.png").read_bytes()[:4] == b"\x89PNG"
    module = hlo.parse((folder / "step.hlo.txt").read_text())
    gathered = [i for body in module.computations.values() for i in body if i.collective]
    assert any(i.collective == "all-gather" for i in gathered)
    # Weights' gradients are reduce-scattered (or cut from an all-reduce by its fusion); what is
    # all-reduced whole is norms and scalars.
    for i in gathered:
        if i.collective == "all-reduce" and not re.search(r"all-reduce-scatter", i.text):
            assert sum(hlo.shape_bytes(i.shape)) < 1e6, i
    assert result["faults"] == []


def test_a_step_is_compiled_and_reported(tmp_path):
    """In a process that knows nothing of absent slices."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = ["--gin_file=tulu_tiny_sft.gin", "--topology=v5e:2x2", f"--out={tmp_path}"]
    process = subprocess.run(
        [sys.executable, "-m", "tulu_jax.dryrun", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert_reported(tmp_path, process.stdout)


@pytest.mark.slow
def test_a_step_on_pairs_is_compiled_and_reported(tmp_path, capsys):
    command = ("--gin_file=tulu_tiny_dpo.gin", "--topology=v5e:2x2", f"--out={tmp_path}")
    status = commands.run("dryrun", *command)
    said = capsys.readouterr()
    assert status == 0, said
    assert_reported(tmp_path, said.out)
    (found,) = json.loads((tmp_path / "dryrun.json").read_text())
    first, seconds = found["first_pass"], found["seconds"]
    assert first["rows"] == 128  # of 128 positions: 4,096 a device
    batches = math.ceil(found["updates"] * 8 / 128)  # no epochs: all rows are new
    assert seconds["reference_pass"] == pytest.approx(batches * first["seconds"])
    whole = found["updates"] * seconds["step"] + seconds["reference_pass"]
    assert found["hours"] == pytest.approx(whole / 3600)
    assert 0 < first["seconds"] < 128 / 8 * seconds["step"]


def test_what_a_divided_step_should_not_have_is_found():
    module = hlo.parse(
        """ENTRY %main (p: bf16[80,512,64]) -> bf16[80,8192,64] {
  %p = bf16[80,512,64] parameter(0)
  %sum = f32[4096,8192] all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %two = (f32[160,8192], f32[160,8192]) all-reduce(%p, %p), replica_groups={{0,1,2,3}}
  %over_data = f32[4096,8192] all-reduce(%p), replica_groups={{0,4}}, to_apply=%add
  ROOT %whole = bf16[80,8192,64] all-gather(%p), replica_groups={{0,1,2,3}}
}
"""
    )
    found = aot.faults(module, {"data": 2, "fsdp": 4}, {"model/layers/w": (80, 8192, 64)})
    assert found == [
        "sum sums 134 MB whole over fsdp",
        "two sums 10 MB whole over fsdp",
        "whole holds model/layers/w [80, 8192, 64] whole",
    ]
    of_two = aot.faults(module, {"data": 2, "fsdp": 4}, {}, networks=2)  # the norms of both
    assert of_two == ["sum sums 134 MB whole over fsdp"]


@pytest.mark.slow
def test_a_plan_writes_a_fragment_and_is_the_same_twice(tmp_path, capsys):
    fragments = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        status = commands.run(
            "dryrun",
            "--gin_file=tulu_tiny_sft.gin",
            "--topology=v5e:2x2",
            "--plan",
            "--compiles=2",
            f"--out={folder}",
        )
        assert status == 0, capsys.readouterr()
        fragments.append((folder / "slice.gin").read_text())
        assert len(json.loads((folder / "dryrun.json").read_text())) == 2
    assert fragments[0] == fragments[1]
    assert "mesh.MeshConfig.topology = 'v5e:2x2'" in fragments[0]
    assert " tokens/s, MFU " in fragments[0] and "(whole)" in fragments[0]
    mine = tmp_path / "mine.gin"
    mine.write_text(
        "from __gin__ import dynamic_registration\n"
        "include 'tulu_tiny_sft.gin'\nSLICE = 'v5p_64'\ninclude 'one/slice.gin'\n"
    )
    config = cli.load(str(mine), ["--gin.TOKENIZER='unused'"], workdir=None)
    mesh = {name: size for name, size in config.mesh.sizes(4).items() if size > 1}
    result = json.loads((tmp_path / "one" / "dryrun.json").read_text())[0]
    assert mesh == {name: size for name, size in result["mesh"].items() if size > 1}
    assert config.execution.remat_policy == result["remat_policy"]


def test_what_does_not_fit_is_status_1_with_advice(tmp_path, capsys):
    status = commands.run(
        "dryrun",
        "--gin_file=tulu_tiny_sft.gin",
        "--topology=v5e:2x2",
        "--gin.BATCH_SIZE=32768",
        f"--out={tmp_path}",
    )
    said = capsys.readouterr().out
    assert status == 1, said
    assert "does not fit" in said and "micro_batch_size" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--topology=v9:4x4"], "generation 'v9' is unknown"),
        ([], "names no topology"),
        (["--topology=v5e:3x5"], "no mesh, micro-batch and rematerialisation fits v5e:3x5"),
    ],
)
def test_misuse_is_status_2(tmp_path, capsys, arguments, said):
    command = ("--gin_file=tulu_tiny_sft.gin", f"--out={tmp_path}", *arguments)
    assert commands.run("dryrun", *command) == 2
    assert said in capsys.readouterr().err
