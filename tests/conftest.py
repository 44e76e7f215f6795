"""Eight fake CPU devices, rank promotion as an error, the real data where it is present, a small
tokenizer, and tasks that exist for one test.

Compiled programs are kept from one session to the next (`caches`), also by the processes that tests
start. A test that is not `slow` and takes over `limit_seconds` fails the run (`time_limit`).
"""

import ctypes
import gc
import os
import pathlib
import shutil

import caches
import time_limit

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Threads of XLA's pool: a fake device may wait in several collectives at once, and where two cores
# give eight threads, all may wait.
os.environ.setdefault("NPROC", "64")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # 'tpu' or 'cuda': kernels run compiled there
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches.compiled_folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from raw_rows import identity

jax.config.update("jax_numpy_rank_promotion", "raise")

# Traces of jax are millions of objects that live on. To look through all of them again and again
# took a tenth of the suite's CPU time, of some files a third.
gc.set_threshold(50_000, 20, 1_000)

MOST_BYTES = 2_000_000_000  # of a worker between two files
REPO = pathlib.Path(__file__).resolve().parents[1]
LONGEST = (
    "test_recipe.py", "test_trainer.py", "test_step.py", "test_processes.py", "test_qlora.py",
    "test_rehearse.py", "test_buckets.py", "test_reward_runs.py", "test_watch.py",
    "test_dryrun.py", "test_flash_attention.py",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_go():
    """Behind a file, once there are many: two workers that keep all of theirs fill a machine."""
    yield
    if resident_bytes() > MOST_BYTES:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """The memory of this process, where Linux tells it."""
    told = pathlib.Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if told.exists() else 0


def pytest_addoption(parser):
    parser.addini("limit_seconds", "Seconds of a test that is not slow.", default="60")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the reports of all workers come to one process
        limit = time_limit.TimeLimit(float(config.getini("limit_seconds")))
        config.pluginmanager.register(limit)
        caches.trim(caches.root(), caches.BYTES)


def pytest_collection_modifyitems(items):
    """The longest files first, so that two workers end together."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real tokenizers, weights and rows; what needs it skips where it is absent."""
    root = pathlib.Path(os.environ.get("TULU_JAX_DATA", REPO.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real data not found at {root}; set TULU_JAX_DATA to its folder")
    return root


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> str:
    """A folder with the byte-level BPE tokenizer of tulu_tiny."""
    from tulu_jax.data import tulu_tiny

    return tulu_tiny.tokenizer(str(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def put_tokenizer(tokenizer_dir):
    """`put_tokenizer(folder)`: that tokenizer where `tulu_tiny.tokenizer(folder)` finds it; its
    folder there."""

    def put(folder: pathlib.Path) -> str:
        source = pathlib.Path(tokenizer_dir)
        return str(shutil.copytree(source, folder / source.name, dirs_exist_ok=True))

    return put


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    """That tokenizer, a `chat.ChatTokenizer`."""
    from tulu_jax.data import chat

    return chat.load_tokenizer(tokenizer_dir)


@pytest.fixture
def add_task():
    """`add_task(name, sources, ...)` registers a task until the test ends."""
    from tulu_jax.data import registry

    added = []

    def add(name: str, sources: dict, **options):
        options = {"kind": "sft", "convert": identity, "licence": "-", "origin": "-"} | options
        task = registry.Task(name=name, sources=sources, **options)
        registry.TaskRegistry.add(task)
        added.append(name)
        return task

    yield add
    for name in added:
        registry.TaskRegistry.remove(name)
