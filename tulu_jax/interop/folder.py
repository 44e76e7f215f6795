"""A folder that appears only when it is complete, on a local disk or in a bucket."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from etils import epath

from tulu_jax.interop.weight_files import is_remote

LAST = "config.json"  # nothing opens a Hugging Face folder without it


def check_target(target: epath.Path, *, overwrite: bool) -> None:
    """Raises `ValueError` if `target` is in use, or is not an export that may be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{target} exists; choose another folder, or pass overwrite=True")
    if not (target / LAST).exists():
        raise ValueError(
            f"{target} has no {LAST}, so it is not a Hugging Face folder and is not overwritten; "
            "choose another folder"
        )


@contextlib.contextmanager
def finished(target: epath.Path) -> Iterator[epath.Path]:
    """A folder `target.partial` to fill; at the end it takes the place of `target`.

    What a killed export left there is removed first. After an exception it is removed as well.
    """
    partial = target.parent / f"{target.name}.partial"
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        partial.rmtree()
        raise
    if is_remote(target):
        _move_files(partial, target)
        return
    replaced = target.parent / f"{target.name}.replaced"
    if replaced.exists():
        replaced.rmtree()
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    if replaced.exists():
        replaced.rmtree()


def _move_files(partial: epath.Path, target: epath.Path) -> None:
    """A bucket cannot rename a folder: its files move one by one, `LAST` in the end."""
    if target.exists():
        (target / LAST).unlink(missing_ok=True)
        target.rmtree()
    target.mkdir(parents=True)
    for file in sorted(partial.iterdir(), key=lambda file: (file.name == LAST, file.name)):
        file.rename(target / file.name)
    if partial.exists():
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
