"""The suite's own rules: a test that takes too long fails the run by name, unless it is slow."""

import os
import pathlib
import subprocess
import sys

import caches
import jax
import jaxlib
import pytest

TESTS = pathlib.Path(__file__).resolve().parent
MODULE = """
import time
import pytest

@pytest.fixture
def long():
    time.sleep(0.6)

def test_quick(): pass
def test_that_is_long(long): pass
@pytest.mark.slow
def test_that_may_be(long): pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_one_that_takes_too_long_fails_the_run_by_name(tmp_path, workers):
    (tmp_path / "test_it.py").write_text(MODULE)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", TESTS.parent / "pyproject.toml"),
            *("-p", "conftest", "-p", "no:cacheprovider", "-o", "limit_seconds=0.5"),
            *(*workers, f"--rootdir={tmp_path}", tmp_path),
        ],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(TESTS), "TULU_JAX_TEST_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "3 passed" in said, said
    assert "test_it.py::test_that_is_long: took 0.6 s, a test may take 0.5" in said
    assert "::test_quick: took" not in said and "::test_that_may_be: took" not in said
    assert "slowest 15 durations" in said


def test_what_was_used_longest_ago_is_deleted_above_the_limit(tmp_path):
    for age, name in enumerate(["new", "old", "oldest"]):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (10_000 - age, 10_000 - age))
    caches.trim(tmp_path, 250)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["new", "old"]
    caches.trim(tmp_path, 250)
    assert len(list(tmp_path.iterdir())) == 2


def test_compiled_programs_lie_outside_of_the_tree_by_versions(monkeypatch, tmp_path):
    assert TESTS.parent not in caches.root().parents
    assert f"jax-{jax.__version__}_jaxlib-{jaxlib.__version__}" in caches.compiled_folder().name
    monkeypatch.setattr(caches, "processor", lambda: "another")
    other = caches.compiled_folder()
    monkeypatch.undo()
    assert other != caches.compiled_folder()
