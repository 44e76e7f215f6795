"""The benchmark against other trainers, our own worker as a peer: real processes, tiny sizes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "benchmarks/peers_cpu.py", *arguments],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_it_measures_a_peer_and_names_one_that_cannot_run():
    """`tunix` is not installed where we are, so its worker ends."""
    ended = run(
        "--tiny", "--rounds=2", f"--peer=ours={sys.executable}", f"--peer=tunix={sys.executable}"
    )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    found = json.loads(lines[-1])
    for stage, loss in (("sft", "5.5"), ("dpo", "0.6931")):
        measured = found["seconds"][stage]
        assert {"tulu_jax", "ours"} <= measured.keys()
        assert all(len(turns) == 2 and min(turns) > 0 for turns in measured.values())
        assert found["ratios"][stage].keys() == {"ours"}
        assert "tunix" in found["absent"][stage]["tunix"]  # the module that is missing
        both = [line for line in lines if line.startswith(("tulu_jax  ", "ours  "))]
        assert len(both) == 2 and all(loss in line for line in both)
    assert "tulu_jax, cached reference" in found["seconds"]["dpo"]
    assert found["of"] == 4 and found["won"] <= 2 and not found["ok"]
    assert found["ratio"] == min(found["ratios"][stage]["ours"] for stage in ("sft", "dpo"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("torch=/bin/true", "'torch' is unknown; expected NAME=PYTHON, of ["),
        ("tunix=/nowhere/python", "'/nowhere/python' is no interpreter; give that of tunix"),
    ],
)
def test_it_refuses_a_peer_that_it_cannot_start(given, said):
    ended = run(f"--peer={given}")
    assert ended.returncode == 2 and said in ended.stderr
