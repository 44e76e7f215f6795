"""A folder that appears only when it is complete, on a local disk or in a bucket.

`MANIFEST` in it lists its files, and is first of all in the folder that is filled under a temporary
name (`atomic`). So it tells what is ours: an export is replaced if its manifest lists every file in
it, and of what lies about, only folders with such a name and a manifest are removed. An export that
says what it is made of goes on in the folder that a killed one of the same left.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from tulu_jax import atomic, strict_json, validation
from tulu_jax.interop.weight_files import is_remote
from tulu_jax.parallel import preemption

LAST = "config.json"  # nothing opens a Hugging Face folder without it
MANIFEST = "tulu_jax.json"
FORMAT = 1
UNFINISHED = "unfinished"  # what of the manifest matters as long as a folder is filled
_OF_A_LIST = ("made_by", "format", "files")
_EMPTY_DISK = {"lost+found"}
_SHOWN = 5  # names in a message


def located(path: str | os.PathLike[str]) -> epath.Path:
    """The place that `path` means; symbolic links are followed, so that they stay."""
    target = epath.Path(path).expanduser()
    return target if is_remote(target) else epath.Path(os.path.realpath(target))


def problems(target: epath.Path, *, overwrite: bool, num_bytes: int) -> list[str]:
    """Why an export of `num_bytes` cannot be written to `target`, one line each."""
    if target.exists() and not target.is_dir():
        return [f"{target} is a file; choose another folder"]
    found, there = [], _content(target)
    if there and not overwrite:
        found.append(f"{target} exists; choose another folder, or replace it with --overwrite")
    elif foreign := sorted(there - set(_listed(target) or ())):
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        found.append(
            f"{target} holds {', '.join(foreign[:_SHOWN])}{more}, not listed in its {MANIFEST} as "
            "part of an export, so it is not overwritten; move that away, remove the folder "
            "yourself, or choose another"
        )
    return found if is_remote(target) else found + _disk_problems(target, num_bytes)


def _content(target: epath.Path) -> set[str]:
    """The names in a folder, but for what an empty disk has and what exports fill there."""
    return {name for name in _names(target) - _EMPTY_DISK if not atomic.is_temporary(name)}


def _names(folder: epath.Path) -> set[str]:
    """None for a folder that is not there, as an empty one in a bucket never is."""
    return {file.name for file in folder.iterdir()} if folder.exists() else set()


def _listed(folder: epath.Path) -> list[str] | None:
    """What the manifest in a folder lists, and itself; None where no export made the folder."""
    try:
        fields = strict_json.loads((folder / MANIFEST).read_text())
        if fields["made_by"] != "tulu_jax" or fields["format"] != FORMAT:
            return None
        return [str(name) for name in fields["files"]] + [MANIFEST]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _list(folder: epath.Path) -> None:
    """Writes the manifest of what is in a folder."""
    _write(folder, {name: noted(folder)[name] for name in noted(folder) if name != UNFINISHED})


def noted(folder: epath.Path) -> dict[str, Any]:
    """What `note` wrote of a folder that is filled."""
    try:
        fields = strict_json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in fields.items() if name not in _OF_A_LIST}


def note(folder: epath.Path, fields: dict[str, Any]) -> None:
    """Adds `fields` to the manifest of a folder that is filled; what stands under `UNFINISHED` is
    left out when it is complete."""
    _write(folder, noted(folder) | fields)


def _write(folder: epath.Path, fields: dict[str, Any]) -> None:
    names = sorted(name for name in _names(folder) if not _passing(name))
    listed = dict(zip(_OF_A_LIST, ("tulu_jax", FORMAT, names), strict=True))
    atomic.write_text(folder / MANIFEST, json.dumps(listed | fields, indent=2) + "\n")


def _passing(name: str) -> bool:
    return name == MANIFEST or atomic.is_temporary(name)


def _disk_problems(target: epath.Path, num_bytes: int) -> list[str]:
    place = pathlib.Path(target)
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        return [f"{target}: {place} cannot be written to ({error.strerror}); choose another folder"]
    if free < num_bytes:
        return [
            f"{place} has {free / 1e9:.1f} GB free; the export takes {num_bytes / 1e9:.1f} GB. "
            "Choose another folder, or free some space"
        ]
    return []


@contextlib.contextmanager
def finished(target: epath.Path, *, made_of: str | None = None) -> Iterator[epath.Path]:
    """A folder to fill, whose files are those of `target` in the end.

    It has a temporary name beside `target`, and takes that of `target`; or, where `target` is a
    folder that exists, which may be a mounted disk, it lies in it, and its files move up, `LAST` in
    the end. What a killed export to `target` left is removed first; but if that was `made_of` the
    same, it is the folder to go on with, and `noted` tells what was noted there. After an exception
    it is removed as well. Raises `UsageError` if another process of this host writes to `target`.
    """
    inside = target.is_dir() and not is_remote(target)
    partial = (target if inside else target.parent) / atomic.temporary_name(target.name)
    atomic.unfinished.add(str(partial))
    for old in _beside(target)[0]:
        unfinished = noted(old).get(UNFINISHED)
        if made_of and isinstance(unfinished, dict) and unfinished.get("made_of") == made_of:
            _take_over(old, partial)
        else:
            _discard(old)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if made_of and UNFINISHED not in noted(partial):
            note(partial, {UNFINISHED: {"made_of": made_of}})
        elif not made_of:
            _list(partial)
        _require_alone(target, partial)
        yield partial
        _list(partial)
    except BaseException:
        if partial.exists():
            atomic.remove(partial)
        raise
    with preemption.later():
        if inside or is_remote(target):
            _move_files(partial, target)
        else:
            _rename(partial, target)
    atomic.unfinished.discard(str(partial))


def _beside(target: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
    """Folders in which exports to `target` are filled: of processes that are gone, and others."""
    places = [target.parent] if is_remote(target) else [target.parent, target]
    found = [atomic.leftovers(place, target.name) for place in places if place.is_dir()]
    return [path for gone, _ in found for path in gone], [path for _, on in found for path in on]


def _require_alone(target: epath.Path, mine: epath.Path) -> None:
    for other in _beside(target)[1]:
        if other.name == mine.name:
            continue
        writer = atomic.writer(other.name)
        if writer.runs():
            raise validation.UsageError(
                f"{target} is being written by process {writer.pid} of this host; wait for it, end "
                "it, or choose another folder"
            )
        logging.warning("%s is of an export on another host; remove it if that has ended", other)


def _take_over(old: epath.Path, partial: epath.Path) -> None:
    """Gives a folder that a killed export left the name `partial`, unless there is one already."""
    if partial.exists():
        _discard(old)
    elif is_remote(old):
        for name in sorted(_names(old), key=lambda name: name == MANIFEST):
            atomic.move(old / name, partial / name)
    else:
        with contextlib.suppress(FileNotFoundError):  # another export took it
            old.rename(partial)
            atomic.sweep(partial)


def _discard(partial: epath.Path) -> None:
    """Removes what a killed export filled: a folder with a manifest, or one that is empty still."""
    with contextlib.suppress(FileNotFoundError):
        if _listed(partial) is not None or not _names(partial):
            atomic.remove(partial)


def _rename(partial: epath.Path, target: epath.Path) -> None:
    try:
        partial.rename(target)
    except OSError as error:
        if not target.exists():
            raise
        atomic.remove(partial)
        raise validation.UsageError(
            f"{target} was made by somebody else meanwhile, and is left as it is; export again, to "
            "another folder or with --overwrite"
        ) from error


def _move_files(partial: epath.Path, target: epath.Path) -> None:
    """Replaces the files of an export by those in `partial`. A kill at any moment leaves only what
    the manifest of `target` lists, and no `LAST` before all files are there."""
    target.mkdir(parents=True, exist_ok=True)
    old = _content(target) & set(_listed(target) or ()) - {MANIFEST}
    for name in sorted(old, key=lambda name: (name != LAST, name)):
        atomic.remove(target / name)
    for name in sorted(_names(partial), key=lambda name: (name == LAST, name != MANIFEST, name)):
        atomic.move(partial / name, target / name)
    if partial.exists():  # a bucket has no empty folders
        atomic.remove(partial)


@contextlib.contextmanager
def local_folder(target: epath.Path) -> Iterator[pathlib.Path]:
    """A local folder whose files end up in `target`: itself, or one that is uploaded from."""
    if not is_remote(target):
        yield pathlib.Path(target)
        return
    with tempfile.TemporaryDirectory() as staging:
        yield pathlib.Path(staging)
        for file in sorted(pathlib.Path(staging).iterdir()):
            epath.Path(file).copy(target / file.name)
