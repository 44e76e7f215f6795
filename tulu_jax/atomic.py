"""Files that are there whole or not at all, on a local disk or in a bucket.

A local file is written under a temporary name and renamed; an object of a bucket appears when it is
complete. A temporary name tells its process (`process_identity`), so no two processes share one, on
whatever hosts, and what a killed one left is known for what it is: `sweep` removes that alone.
"""

import contextlib
import os
import pathlib
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from typing import BinaryIO

import fsspec
from etils import epath

from tulu_jax import process_identity

Path = str | os.PathLike[str]

FORGOTTEN = 24 * 3600.0  # seconds without a change, after which the writer on another host is gone
unfinished: set[str] = set()  # what this process fills under temporary names
_SUFFIX = ".tulu_jax_partial"
_NAME = re.compile(
    r"\.(?P<target>.+)\.(?P<machine>[0-9a-f]{16})-(?P<pid>\d+)-(?P<started>\d*)-[0-9a-f]{8}"
    + re.escape(_SUFFIX)
)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8. Raises `OSError` that names `path`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content`. Raises `OSError` that names `path`."""
    with writing(path) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to fill, which is `path` in the end; after an exception it is not.

    A symbolic link stays, and what it names is replaced. What is no regular file, such as a pipe or
    /dev/stdout, is written to as it is. Raises `OSError` that names `path`.
    """
    if "://" in os.fspath(path):
        file = file_system(path).open(os.fspath(path), "wb")
        try:
            yield file
        except BaseException:
            file.discard()  # an object appears when its file is closed
            raise
        file.close()
        return
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "wb") as file:
                yield file
            return
    except FileNotFoundError:
        pass
    target = pathlib.Path(os.path.realpath(path))
    partial = target.with_name(temporary_name(target.name))
    unfinished.add(str(partial))
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, target)
    except OSError as error:
        if str(error.filename) == str(partial):
            error.filename, error.filename2 = os.fspath(path), None
        raise
    finally:
        with contextlib.suppress(OSError):  # it has been renamed, or was never made
            partial.unlink()
        unfinished.discard(str(partial))


def temporary_name(target: str) -> str:
    """A name, in the folder of `target`, that no other process makes; `sweep` knows it."""
    me = process_identity.current()
    return f".{target}.{me.machine}-{me.pid}-{me.started}-{uuid.uuid4().hex[:8]}{_SUFFIX}"


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is one that this module gave."""
    return _NAME.fullmatch(name) is not None


def writer(name: str) -> process_identity.Process | None:
    """The process that made a temporary name, without its host; None for any other name."""
    found = _NAME.fullmatch(name)
    return found and process_identity.Process(
        host="", machine=found["machine"], pid=int(found["pid"]), started=found["started"]
    )


def leftovers(
    folder: epath.Path, target: str | None = None
) -> tuple[list[epath.Path], list[epath.Path]]:
    """What lies in `folder` under temporary names (of `target`, or of all): of processes that are
    gone, and of those that run or of which this host cannot tell."""
    gone, others = [], []
    for path in folder.iterdir() if folder.exists() else ():
        found = _NAME.fullmatch(path.name)
        if found and target in (None, found["target"]):
            runs = writer(path.name).runs()
            dead = _forgotten(path) if runs is None else not runs
            (gone if dead else others).append(path)
    return gone, others


def move(source: epath.Path, target: epath.Path) -> None:
    """Gives a file another name, over what has that name. An object is copied by its service, then
    removed."""
    if "://" not in str(source):
        os.replace(source, target)
        return
    files = file_system(source)
    files.cp_file(str(source), str(target))
    files.rm_file(str(source))


def file_system(path: Path) -> fsspec.AbstractFileSystem:
    """What reads and writes `path`; of a bucket, the very client that `epath` has, with what it
    remembers of listings."""
    if "://" in os.fspath(path):
        return fsspec.filesystem("gcs", finalize_on_close=True)
    return fsspec.filesystem("file")


def sweep(folder: epath.Path, target: str | None = None) -> None:
    """Removes from `folder` what processes that are gone left under temporary names."""
    for path in leftovers(folder, target)[0]:
        with contextlib.suppress(FileNotFoundError):  # another sweeps too
            remove(path)


def remove_unfinished() -> None:
    """For a process that ends without unwinding."""
    for path in list(unfinished):
        with contextlib.suppress(OSError):
            remove(epath.Path(path))


def remove(path: epath.Path) -> None:
    """Removes a file, or a folder with all in it, of which the caller knows that it is ours."""
    if "://" in str(path):
        path.rmtree() if path.is_dir() else path.unlink()
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _forgotten(path: epath.Path) -> bool:
    """Whether nothing in a file or folder has changed for `FORGOTTEN` seconds."""
    try:
        files = [path, *path.iterdir()] if path.is_dir() else [path]
        changed = [file.stat().mtime for file in files]
    except OSError:  # it is being worked on
        return False
    return 0 < max(changed) < time.time() - FORGOTTEN  # 0: the file system does not tell
