"""Raw rows from files, local or remote: JSON lists, JSON lines (also gzipped), TSV, Parquet.

And from a set on the Hugging Face hub, when the files are not there.
"""

import contextlib
import gzip
import io
import pathlib
import zlib
from collections.abc import Iterator, Mapping

from tulu_jax import strict_json, validation
from tulu_jax.data import registry
from tulu_jax.data.sources import file_sets

_failed: dict[tuple, str] = {}  # hub sets that could not be loaded, and why
_out_of_reach: dict[str, str] = {}  # buckets, and why


def as_path(path: str):
    """A path object for a local path, or for a remote one such as `gs://bucket/key`."""
    if "://" in path:
        from etils import epath

        return epath.Path(path)
    return pathlib.Path(path)


@contextlib.contextmanager
def reaching(path) -> Iterator[None]:
    """Around what reads or writes `path`: what a bucket's client raises becomes an `OSError` that
    names the bucket, and so at once the next time, for the client tries for half a minute."""
    if "://" not in str(path):
        yield
        return
    bucket = "/".join(str(path).split("/")[:3])
    if bucket in _out_of_reach:
        raise OSError(_out_of_reach[bucket])
    try:
        yield
    except Exception as error:  # of gcsfs, aiohttp, requests, google.auth, or it is not installed
        unreachable = isinstance(error, validation.UnreachableError)
        if isinstance(error, (FileNotFoundError, ValueError)) and not unreachable:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        _out_of_reach[bucket] = (
            f"{bucket} cannot be read or written ({reason}). Check its name, the network and the "
            'credentials (gcloud auth application-default login), and that the extra "gcs" is '
            "installed; then start again"
        )
        raise OSError(_out_of_reach[bucket]) from error


def find(pattern: str) -> list[str]:
    """The files that `pattern`, a path whose last part may be a glob, stands for, sorted.

    Raises `ValueError` as `file_sets.matched`.
    """
    folder, slash, _ = pattern.rpartition("/")
    with reaching(pattern):
        if not file_sets.is_glob(pattern):
            return [pattern] if as_path(pattern).exists() else []
        try:  # asking whether it is a folder would take a bucket out of reach for none
            names = [file.name for file in as_path(folder or slash or ".").iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
    return file_sets.matched(pattern, names)


def read_placed(path: str, where: Mapping[str, str] | None = None) -> Iterator[tuple[str, dict]]:
    """Yields (where it is in the file, as "line 3", row) of each row of one file.

    Lines are counted from 1; items of a JSON list and rows of Parquet from 0. Rows whose columns do
    not equal `where` are passed over. Raises `FileNotFoundError` for a missing file and
    `ValueError` naming file and line for what does not parse, is not an object, is missing (an
    empty line, a truncated gzip), or for a file with no row at all; for a bucket that cannot be
    read, `OSError`.
    """
    if not path.endswith(file_sets.READABLE):
        raise ValueError(
            f"{path}: cannot read this kind of file; expected one of {file_sets.READABLE}"
        )
    file = as_path(path)
    with reaching(path):
        there = file.exists()
    if not there:
        raise FileNotFoundError(
            f"{path}: no such file; place it there, or give the folder that holds it as data_root"
        )
    read = 0
    for place, row in _rows(path, file, where or {}):
        read += 1
        if all(row.get(name) == value for name, value in (where or {}).items()):
            yield place, row
    if not read and not where:
        raise ValueError(f"{path}: has no rows; expected at least one")


def hub_set(files: registry.Files, *, wanted: str):
    """The `datasets.Dataset` of the hub set that `files` falls back on.

    Raises `FileNotFoundError` that says what to download and where to put it (`wanted`) if the hub
    cannot be reached or has no such set.
    """
    import datasets

    key = (files.hub, files.hub_split, files.hub_revision)
    reason = _failed.get(key)  # asking again takes as long, for each task of a mixture
    if reason is None:
        try:
            return datasets.load_dataset(
                files.hub, split=files.hub_split, revision=files.hub_revision
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = _failed[key] = " ".join(str(error).split())[:200]
    what = f"{files.hub!r}, split {files.hub_split}"
    what += f", revision {files.hub_revision}" if files.hub_revision else ""
    raise FileNotFoundError(
        f"found no {wanted}, and the hub set {what} could not be loaded: {reason}. Download its "
        f"files, place them as {wanted}, and give the folder above as data_root (--gin.DATA_ROOT)"
    )


def _rows(path: str, file, where: Mapping[str, str]) -> Iterator[tuple[str, dict]]:
    if found := validation.unreadable(file):
        raise ValueError(f"{path}: {found}")
    with reaching(path), file.open("rb") as raw:
        if found := validation.stand_in(raw.read(validation.HEAD)):
            raise ValueError(f"{path}: {found}")
    if path.endswith(".json"):
        with reaching(path):
            content = file.read_bytes()
        yield from _read_json_list(path, content)
    elif path.endswith(".parquet"):
        yield from _read_parquet(path, file, where)
    else:
        for number, line in _lines(path, file):
            is_table = path.endswith(".tsv")
            row = {"fields": line.split("\t")} if is_table else _parse_line(path, number, line)
            yield f"line {number}", row


def _read_parquet(path: str, file, where: Mapping[str, str]) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    try:
        with file.open("rb") as raw:
            parquet = pq.ParquetFile(raw)
            missing = sorted(set(where) - set(parquet.schema_arrow.names))
            if missing:
                raise ValueError(
                    f"{path}: found columns {parquet.schema_arrow.names}; expected {missing} too"
                )
            for batch in parquet.iter_batches(batch_size=1000):
                for index, row in _kept(batch, where):
                    yield f"row {first + index}", row
                first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({error})") from error


def _kept(batch, where: Mapping[str, str]) -> Iterator[tuple[int, dict]]:
    """(number, row) of those whose columns equal `where`; Arrow itself compares no views."""
    if not where:
        yield from enumerate(batch.to_pylist())
        return
    columns = [batch[name].to_pylist() for name in where]
    for index, values in enumerate(zip(*columns, strict=True)):
        if values == tuple(where.values()):
            yield index, batch.slice(index, 1).to_pylist()[0]


def _read_json_list(path: str, content: bytes) -> Iterator[tuple[str, dict]]:
    try:
        rows = strict_json.loads(content, finite=False)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: found a {type(rows).__name__}; expected a list of objects")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: item {index} is a {type(row).__name__}; expected an object")
        yield f"item {index}", row


def _lines(path: str, file) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its newline); a byte-order mark is passed over."""
    number = 0
    with reaching(path), file.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        try:
            text = io.TextIOWrapper(stream, "utf-8-sig", newline="\n")
            for number, line in enumerate(text, 1):
                yield number, line.rstrip("\r\n")
        except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {number}: unreadable ({error})") from error


def _parse_line(path: str, number: int, line: str) -> dict:
    if not line.strip():
        raise ValueError(f"{path}, line {number}: missing (the line is empty); expected an object")
    try:
        row = strict_json.loads(line, finite=False)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: malformed JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: found a {type(row).__name__}; expected an object")
    return row
