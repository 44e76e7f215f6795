"""What tests keep from one session to the next, outside of the tree; safe to delete."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform

BYTES = 2 << 30  # of all versions together


def root() -> pathlib.Path:
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
    return root() / "_".join([*versions, hashlib.md5(processor().encode()).hexdigest()[:8]])


def trim(folder: pathlib.Path, limit: int) -> None:
    """Deletes the files below `folder` that were used longest ago, until `limit` bytes are left."""
    files = []
    for path in folder.rglob("*"):
        if path.is_file():
            stat = path.stat()
            files.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size
