"""The files that a task's source is read from: where they are, and what is wrong with them."""

import os

from tulu_jax.data import registry
from tulu_jax.data.sources import file_sets, readers


def of(source: str | registry.Files) -> registry.Files:
    return registry.Files(paths=(source,)) if isinstance(source, str) else source


def located(task: registry.Task, files: registry.Files, data_root: str | None) -> list[str]:
    """The files there are, in order; `[]` if there are none and the hub has them.

    Raises `FileNotFoundError` that says what to download and where to put it, and `ValueError` that
    lists what `file_sets.problems` finds.
    """
    paths = [os.path.expanduser(path) for path in files.paths]
    root = None if data_root is None else os.path.expanduser(data_root).rstrip("/")
    anywhere = [path for path in paths if os.path.isabs(path) or "://" in path]
    if root is None and len(anywhere) < len(paths) and files.hub is None:
        raise ValueError(
            f"task {task.name!r} reads {', '.join(map(repr, files.paths))} below the data root, "
            "and none is given; set data_root to the folder (or gs:// prefix) that holds it"
        )
    patterns = [path if path in anywhere or root is None else f"{root}/{path}" for path in paths]
    found = {pattern: readers.find(pattern) for pattern in patterns}
    missing = [pattern for pattern, there in found.items() if not there]
    if missing and (files.hub is None or len(missing) < len(patterns)):
        raise FileNotFoundError(
            f"task {task.name!r}: found no {', '.join(missing)}; it comes from {task.origin}. "
            "Place it there, or set data_root (--gin.DATA_ROOT) to the folder that holds it"
        )
    if problems := list(file_sets.problems(found)):
        raise ValueError("; ".join(problems))
    return [path for there in found.values() for path in there]


def wanted(files: registry.Files, data_root: str | None) -> str:
    """The paths of `files`, for messages."""
    return ", ".join(f"{data_root or '<data_root>'}/{path}" for path in files.paths)


def stamp(path: str) -> tuple:
    """What changes when a file is written anew, without reading it."""
    with readers.reaching(path):
        found = readers.as_path(path).stat()
    if "://" in path:
        return found.length, found.mtime
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
