"""Eight fake CPU devices, rank promotion as an error, and the real data where it is present.

Programs that several tests compile are compiled once a session, by whichever process comes first.
"""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # 'tpu' or 'cuda': kernels run compiled there
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tulu_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real tokenizers, weights and rows; what needs it skips where it is absent."""
    root = pathlib.Path(os.environ.get("TULU_JAX_DATA", REPO.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real data not found at {root}; set TULU_JAX_DATA to its folder")
    return root
