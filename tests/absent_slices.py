"""Fixtures of tests that compile for TPUs which are not there."""

import importlib.metadata
import importlib.util
import pathlib

import caches
import pytest

from tulu_jax.planning import compiled
from tulu_jax.planning.cycles import schedule


def folder() -> pathlib.Path:
    """Where compiled programs lie from run to run, by versions."""
    versions = (f"{n}-{importlib.metadata.version(n)}" for n in ("jax", "jaxlib", "libtpu"))
    return caches.root() / "tpu_kernels" / "_".join(versions)


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
