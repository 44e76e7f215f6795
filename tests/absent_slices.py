"""Fixtures of tests that compile for TPUs which are not there."""

import importlib.metadata
import importlib.util
import os
import pathlib

import pytest

from tulu_jax.planning import compiled, schedule


def folder() -> pathlib.Path:
    """Where compiled programs lie from run to run: outside the tree, by versions; delete it freely.

    TULU_JAX_TEST_CACHE is the root of all caches of the tests.
    """
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    root = pathlib.Path(os.environ.get("TULU_JAX_TEST_CACHE") or home / "tulu_jax_tests")
    versions = (f"{n}-{importlib.metadata.version(n)}" for n in ("jax", "jaxlib", "libtpu"))
    return root / "tpu_kernels" / "_".join(versions)


@pytest.fixture(autouse=True, scope="session")
def kept_programs():
    """Programs compiled for TPUs are read from `folder()`, in child processes too."""
    if importlib.util.find_spec("libtpu") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiled.FOLDER, str(folder()))
        yield


@pytest.fixture
def absent_slices(monkeypatch):
    """What libtpu must believe to describe slices that are not there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('needs libtpu: pip install "jax[tpu]"')
    for name, value in schedule.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
