"""Eight fake CPU devices, rank promotion as an error, and the real data where it is present.

Compiled programs are kept from one session to the next, in the folder that `CACHE` names: outside
of the tree, by versions, least recently used files deleted above `CACHE_BYTES`, safe to delete.
A test above its seconds (`limit_seconds` of pyproject.toml) that is not `slow` fails the run.
"""

import collections
import hashlib
import importlib.metadata
import os
import pathlib
import platform

CACHE_BYTES = 4 << 30
REPO = pathlib.Path(__file__).resolve().parents[1]


def cache_root() -> pathlib.Path:
    """$TULU_JAX_TEST_CACHE, or tulu_jax_tests in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = os.environ.get("TULU_JAX_TEST_CACHE") or f"{base}/tulu_jax_tests"
    return pathlib.Path(named).expanduser().absolute()


def processor() -> str:
    """The machine that code is compiled for: its model and instruction sets."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].split("\n") if info.exists() else []
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))]
    return "\n".join([platform.machine(), platform.processor(), *kept])


def compiled_folder() -> pathlib.Path:
    """Where jax keeps compiled programs: one folder for each jax, jaxlib and processor."""
    versions = [f"{name}-{importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]
    return cache_root() / "_".join([*versions, hashlib.md5(processor().encode()).hexdigest()[:8]])


def trim(root: pathlib.Path, limit: int) -> None:
    """Deletes the files below `root` that were used longest ago, until `limit` bytes are left."""
    files = []
    for path in root.rglob("*"):
        if path.is_file():
            stat = path.stat()
            files.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size


os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # 'tpu' or 'cuda': kernels run compiled there
# Workers and the processes that tests start inherit these.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled_folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addini("limit_seconds", "Seconds of a test that is not slow.", default="60")


class TimeLimit:
    """Adds up setup, call and teardown of each test, and fails the run by the names of those over
    the limit."""

    def __init__(self, limit: float):
        self.limit, self.seconds = limit, collections.Counter()

    def over(self) -> dict[str, float]:
        return {name: s for name, s in self.seconds.items() if s > self.limit}

    def pytest_runtest_logreport(self, report):
        if "slow" not in report.keywords:
            self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self, session, exitstatus):
        if self.over() and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for name, seconds in self.over().items():
            terminalreporter.write_line(
                f"FAILED {name}: took {seconds:.1f} s, a test may take {self.limit:g}; make it "
                "smaller, share what it makes, or mark it slow",
                red=True,
            )


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the reports of all workers come to one process
        config.pluginmanager.register(TimeLimit(float(config.getini("limit_seconds"))))
        trim(cache_root(), CACHE_BYTES)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real tokenizers, weights and rows; what needs it skips where it is absent."""
    root = pathlib.Path(os.environ.get("TULU_JAX_DATA", REPO.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real data not found at {root}; set TULU_JAX_DATA to its folder")
    return root
