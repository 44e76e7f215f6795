"""Raw rows from files, local or remote: JSON lists, JSON lines (also gzipped), tab-separated."""

import gzip
import io
import json
import pathlib
from collections.abc import Iterator

READABLE = (".json", ".jsonl", ".jsonl.gz", ".tsv")


def as_path(path: str):
    """A path object for a local path, or for a remote one such as `gs://bucket/key`."""
    if "://" in path:
        from etils import epath

        return epath.Path(path)
    return pathlib.Path(path)


def read_rows(path: str) -> Iterator[dict]:
    """Yields the rows of one file in order, each a dict; a `.tsv` row is `{"fields": [...]}`.

    Raises `FileNotFoundError` for a missing file and `ValueError` naming file and line for what
    does not parse, is not an object, or is missing (an empty line, a truncated gzip).
    """
    if not path.endswith(READABLE):
        raise ValueError(f"{path}: cannot read this kind of file; expected one of {READABLE}")
    file = as_path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"{path}: no such file; place it there, or give the folder that holds it as data_root"
        )
    if path.endswith(".json"):
        yield from _read_json_list(path, file.read_bytes())
        return
    for number, line in _lines(path, file):
        if path.endswith(".tsv"):
            yield {"fields": line.split("\t")}
        else:
            yield _parse_line(path, number, line)


def _read_json_list(path: str, content: bytes) -> Iterator[dict]:
    try:
        rows = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: found a {type(rows).__name__}; expected a list of objects")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: item {index} is a {type(row).__name__}; expected an object")
        yield row


def _lines(path: str, file) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its newline)."""
    number = 0
    with file.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        try:
            for number, line in enumerate(io.TextIOWrapper(stream, "utf-8", newline="\n"), 1):
                yield number, line.rstrip("\r\n")
        except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {number}: unreadable ({error})") from error


def _parse_line(path: str, number: int, line: str) -> dict:
    if not line.strip():
        raise ValueError(f"{path}, line {number}: missing (the line is empty); expected an object")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: malformed JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: found a {type(row).__name__}; expected an object")
    return row
