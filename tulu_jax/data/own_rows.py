"""Tasks of own rows: a file that no module registers, or a task without a converter.

`--gin.MIXTURE="my.jsonl"` names such a file; `components.of` asks here for what has no name.
"""

import dataclasses
import functools
import os

from tulu_jax import validation
from tulu_jax.data import registry, task_files
from tulu_jax.data.sources import file_sets, own, readers


def task_of_file(path: str, *, data_root: str | None, split: str) -> registry.Task:
    """The task whose rows, of the train split and of `split`, are in the file (or glob) `path`.

    Raises `FileNotFoundError` that says where it was looked for, and `ValueError` for what is not
    read, or lies in both places.
    """
    place = _place(path, data_root)
    return registry.Task(name=path, sources={"train": place, split: place})


def resolved(task: registry.Task, *, data_root: str | None) -> registry.Task:
    """`task` with its kind, converter and files: what it was made without.

    Raises `ValueError` naming file and line for a first row of neither kind, and as `task_of_file`.
    """
    sources = {
        split: _place(source, data_root) if isinstance(source, str) else source
        for split, source in task.sources.items()
    }
    placed = dataclasses.replace(task, sources=sources)
    kind = task.kind or _kind(placed, data_root)
    return dataclasses.replace(placed, kind=kind, convert=own.CONVERTERS[kind])


def _place(path: str, data_root: str | None) -> str:
    """Where `path` is: in the working directory, or below the data root."""
    path = os.path.expanduser(path)
    places = [path if "://" in path else os.path.abspath(path)]
    found = [place for place in places if readers.find(place)]
    if data_root is not None and not os.path.isabs(path) and "://" not in path:
        place = f"{os.path.expanduser(data_root).rstrip('/')}/{path}"
        # A bucket is not asked for what is here, nor for what may be a misspelt name.
        if "://" not in place or (not found and file_sets.suffix(path)):
            places.append(place)
            found += [place] if readers.find(place) else []
    if not found:
        raise FileNotFoundError(
            f"there is no such file: looked for {' and '.join(places)}{_nearest(places[0])}"
        )
    if len(found) > 1 and not os.path.samefile(*found):
        raise ValueError(
            f"{path!r} is {found[0]} in the working directory and {found[1]} below the data root; "
            "give the whole path of the one that is meant"
        )
    if "://" not in found[0] and os.path.isdir(found[0]):
        raise ValueError(f"{found[0]} is a folder; expected files: name those in it, as {path}/*")
    return found[0]


def _nearest(place: str) -> str:
    folder, name = os.path.split(place)
    return validation.nearest(name, os.listdir(folder)) if os.path.isdir(folder) else ""


def _kind(task: registry.Task, data_root: str | None) -> str:
    source = task.source("train")
    if callable(source):
        rows = iter(source())
        return own.kind_of(next(rows, {}))
    first, *_ = task_files.located(task, task_files.of(source), data_root)
    return _kind_of_file(first, task_files.stamp(first))


@functools.lru_cache(maxsize=256)
def _kind_of_file(path: str, stamp: tuple) -> str:
    """The kind of the rows of a file, by its first; `stamp` changes when the file does."""
    del stamp
    place, row = next(readers.read_placed(path))
    try:
        return own.kind_of(row)
    except ValueError as error:
        raise ValueError(f"{path}, {place}: {error}") from error
