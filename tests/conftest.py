"""Eight fake CPU devices, rank promotion as an error, and the real data where it is present.

Compiled programs are kept from one session to the next (`caches`), also by the processes that tests
start. A test that is not `slow` and takes over `limit_seconds` fails the run (`time_limit`).
"""

import os
import pathlib

import caches
import time_limit

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # 'tpu' or 'cuda': kernels run compiled there
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches.compiled_folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

REPO = pathlib.Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addini("limit_seconds", "Seconds of a test that is not slow.", default="60")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the reports of all workers come to one process
        limit = time_limit.TimeLimit(float(config.getini("limit_seconds")))
        config.pluginmanager.register(limit)
        caches.trim(caches.root(), caches.BYTES)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real tokenizers, weights and rows; what needs it skips where it is absent."""
    root = pathlib.Path(os.environ.get("TULU_JAX_DATA", REPO.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real data not found at {root}; set TULU_JAX_DATA to its folder")
    return root
