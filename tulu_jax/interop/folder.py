"""A folder that appears only when it is complete, on a local disk or in a bucket."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from tulu_jax.interop.weight_files import is_remote

LAST = "config.json"  # nothing opens a Hugging Face folder without it
PARTIAL = ".partial"
_NO_CONTENT = {PARTIAL, "lost+found"}  # what a killed export left, and what an empty disk holds


def located(path: str | os.PathLike[str]) -> epath.Path:
    """The place that `path` means; symbolic links are followed, so that they stay."""
    target = epath.Path(path).expanduser()
    return target if is_remote(target) else epath.Path(os.path.realpath(target))


def problems(target: epath.Path, *, overwrite: bool, num_bytes: int) -> list[str]:
    """Why an export of `num_bytes` cannot be written to `target`, one line each."""
    if target.exists() and not target.is_dir():
        return [f"{target} is a file; choose another folder"]
    found = []
    if target.exists() and any(file.name not in _NO_CONTENT for file in target.iterdir()):
        ours = (target / LAST).exists() or (target / PARTIAL).exists()
        if not overwrite:
            found.append(f"{target} exists; choose another folder, or replace it with --overwrite")
        elif not ours:
            found.append(
                f"{target} has no {LAST}, so it is not a Hugging Face folder and is not "
                "overwritten; choose another folder"
            )
    return found if is_remote(target) else found + _disk_problems(target, num_bytes)


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
def finished(target: epath.Path) -> Iterator[epath.Path]:
    """A folder to fill, whose files are those of `target` in the end.

    It is `target.partial`, which takes the name of `target`; or, where `target` is a folder that
    exists, which may be a mounted disk, `.partial` in it, and its files move up, `LAST` in the end.
    What a killed export left there is removed first. After an exception it is removed as well.
    """
    inside = target.is_dir() and not is_remote(target)
    partial = target / PARTIAL if inside else target.parent / f"{target.name}{PARTIAL}"
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        partial.rmtree()
        raise
    if inside or is_remote(target):
        _move_files(partial, target)
    else:
        partial.rename(target)


def _move_files(partial: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    (target / LAST).unlink(missing_ok=True)
    for old in target.iterdir():
        if old.name not in _NO_CONTENT:
            whole_folder = old.is_dir() and not os.path.islink(old)
            old.rmtree() if whole_folder else old.unlink()
    for file in sorted(partial.iterdir(), key=lambda file: (file.name == LAST, file.name)):
        file.rename(target / file.name)
    if partial.exists():  # a bucket has no empty folders
        partial.rmtree()


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
