"""Short forms of benchmarks/soak.py: kills, SIGTERM, flipped bits and faults change no number."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))

import soak


@pytest.mark.slow
def test_kills_and_sigterm_change_no_number():
    found = soak.soak(kills=2, terms=1, flips=0, faults=0, seed=3, stages=("sft",))
    assert found.wrong == []
    assert found.kills.total() == 2 and found.terms.total() == 1


@pytest.mark.slow
def test_every_stage_through_kills_flipped_bits_and_faults():
    found = soak.soak(kills=24, terms=8, flips=60, faults=40, seed=4)
    assert found.wrong == []
    assert found.kills.total() == 24 and found.terms.total() == 8
    assert found.flips.total() == 60 and found.faults.total() >= 40
