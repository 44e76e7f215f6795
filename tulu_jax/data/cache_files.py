"""The files of a cached folder: each written whole, listed with its digest, verified when opened.

`examples-NNNNN-DIGEST.arrow` hold the rows and `aside.jsonl` what was left out. `manifest.json`,
written last, has the counts of the folder, of each shard its size, rows and largest id, and a
digest of itself. What is not as it says is refused, for a damaged row would be trained on.

A mapped shard is looked at whenever one of its examples is read: if its file was written since, it
is hashed again. What a disk changes under a run without a write, only the next run sees.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

from tulu_jax import atomic, digests, strict_json, validation
from tulu_jax.data.sources import readers

MANIFEST, ASIDE = "manifest.json", "aside.jsonl"
PREFIX, SUFFIX = "examples-", ".arrow"
_verified: dict[str, tuple] = {}  # the stamp that a local file had when it was found whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One Arrow file, as it was when it was written. `max_id` is its largest token id, or −1."""

    file: Any  # pathlib.Path, or epath.Path in a bucket
    bytes: int
    rows: int
    max_id: int

    @property
    def digest(self) -> str:
        return _digest_in(self.file.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """What a finished folder holds: counts, shards in order, the digest of `aside.jsonl`."""

    counts: dict
    shards: tuple[Shard, ...]
    aside: str


def write(file, content: bytes) -> None:
    """Writes `file` so that it is there whole or not at all; other hosts may write the same one."""
    with readers.reaching(file):
        atomic.write_bytes(file, content)


def write_shard(folder, number: int, table) -> Shard:
    """Writes an Arrow table as shard `number` of a folder."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    file = folder / f"{PREFIX}{number:05d}-{digests.of_bytes(content)}{SUFFIX}"
    write(file, content)
    return _described(file, len(content), table)


def written(folder) -> dict[str, list]:
    """The files of shards in a folder that may be unfinished, by their number "NNNNN"."""
    found = {}
    for file in _files(folder):
        if file.name.startswith(PREFIX) and file.name.endswith(SUFFIX):
            number = file.name.removeprefix(PREFIX).partition("-")[0]
            found.setdefault(number, []).append(file)
    return found


def reopened(file) -> tuple[Shard, Any] | None:
    """The shard that an earlier run left in `file`, and its Arrow table; None if it is damaged."""
    with readers.reaching(file):
        content = file.read_bytes()
    if digests.of_bytes(content) != _digest_in(file.name):
        return None
    table = _parsed(content)
    return _described(file, len(content), table), table


def finish(folder, shards: Iterable[Shard], *, aside: bytes, counts: dict) -> None:
    """Writes what was left out, and then the manifest."""
    write(folder / ASIDE, aside)
    listed = [
        {"name": s.file.name, "bytes": s.bytes, "rows": s.rows, "max_id": s.max_id} for s in shards
    ]
    content = {"counts": counts, "shards": listed, "aside": digests.of_bytes(aside)}
    content["digest"] = _digest_of(content, folder)
    write(folder / MANIFEST, json.dumps(content, indent=2).encode())


def is_finished(folder) -> bool:
    with readers.reaching(folder):
        return (folder / MANIFEST).exists()


def listing(folder) -> Listing:
    """What a finished folder holds.

    Raises `UsageError` if its manifest is damaged, or if shards are missing or were added.
    """
    file = folder / MANIFEST
    with readers.reaching(folder):
        text = file.read_bytes()
    try:
        content = strict_json.loads(text)
        expected = content.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise _damaged(file, "no list of files", "the one that was written") from None
    if (found := _digest_of(content, folder)) != expected:
        raise _damaged(file, f"digest {found}", expected)
    entries = content.pop("shards")
    shards = tuple(Shard(file=folder / entry.pop("name"), **entry) for entry in entries)
    there = {f.name for f in _files(folder) if f.name == ASIDE or f.name.endswith(SUFFIX)}
    known = {shard.file.name for shard in shards} | {ASIDE}
    for name in sorted(known - there):
        raise _damaged(folder / name, "no such file", "the one that was written")
    for name in sorted(there - known):
        raise _damaged(folder / name, "a file that was added", "those of the manifest alone")
    return Listing(shards=shards, **content)


def table(shard: Shard):
    """The Arrow table of a shard: mapped into memory from a local file, read from a bucket.

    Raises `UsageError` if the file is not as it was written.
    """
    import pyarrow as pa

    if _is_remote(shard.file):
        result = _parsed(_fetched(shard))
    else:
        check(shard)
        with pa.memory_map(str(shard.file)) as mapped:
            result = pa.ipc.open_stream(mapped).read_all()
    if result.num_rows != shard.rows:
        raise _damaged(shard.file, f"{result.num_rows} rows", str(shard.rows))
    return result


def check(shard: Shard) -> None:
    """Raises `UsageError` if a local file is not as it was written.

    It is hashed once in a process, and again when it is written. One that is removed stays mapped,
    and one of a bucket was read into memory.
    """
    if _is_remote(shard.file):
        return
    path = os.fspath(shard.file)
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return
    stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    if _verified.get(path) == stamp:
        return
    if stat.st_size != shard.bytes:
        raise _damaged(shard.file, f"{stat.st_size} bytes", str(shard.bytes))
    if (found := digests.of_file(path)) != shard.digest:
        raise _damaged(shard.file, f"digest {found}", shard.digest)
    _verified[path] = stamp


def aside(folder) -> list[dict]:
    """What a finished folder left out, with the reasons. Raises `UsageError` if it is damaged."""
    file, expected = folder / ASIDE, listing(folder).aside
    with readers.reaching(folder):
        content = file.read_bytes()
    if (found := digests.of_bytes(content)) != expected:
        raise _damaged(file, f"digest {found}", expected)
    return [strict_json.loads(line) for line in content.decode().splitlines()]


def _is_remote(file) -> bool:
    return "://" in str(file)


def _files(folder) -> list:
    with readers.reaching(folder):
        return sorted(folder.iterdir()) if folder.exists() else []


def _digest_in(name: str) -> str:
    return name.removesuffix(SUFFIX).rpartition("-")[2]


def _digest_of(content: dict, folder) -> str:
    """The digest of a manifest, which is no other folder's."""
    return digests.of_bytes(json.dumps([folder.name, content], sort_keys=True).encode())


def _described(file, size: int, content) -> Shard:
    import pyarrow as pa
    import pyarrow.compute as pc

    largest = [
        pc.max(pc.list_flatten(content[field.name])).as_py()
        for field in content.schema
        if pa.types.is_large_list(field.type) and not field.name.endswith("_spans")
    ]
    max_id = max((found for found in largest if found is not None), default=-1)
    return Shard(file=file, bytes=size, rows=content.num_rows, max_id=max_id)


def _fetched(shard: Shard) -> bytes:
    for _ in range(2):  # what is damaged may have been damaged on its way
        with readers.reaching(shard.file):
            content = shard.file.read_bytes()
        if (found := digests.of_bytes(content)) == shard.digest:
            return content
    raise _damaged(shard.file, f"digest {found}", shard.digest)


def _parsed(content: bytes):
    import pyarrow as pa

    return pa.ipc.open_stream(pa.py_buffer(content)).read_all()


def _damaged(file, found: str, expected: str) -> validation.UsageError:
    return validation.UsageError(
        f"{file}: found {found}, expected {expected}; remove the folder {file.parent}, and its "
        "rows are encoded anew"
    )
