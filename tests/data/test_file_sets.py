"""Globs that find more than was meant, or less: both files named, and none of them read."""

import base64
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_rows import chats, messages, read_rows

from tulu_jax.data import examples, registry
from tulu_jax.data.sources import readers


def write(path, rows) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def read(folder, *globs) -> int:
    """The number of rows of a task of these globs."""
    task = registry.Task(name="t", sources={"train": registry.Files(paths=globs)})
    return len(list(examples.raw_rows(task, "train", str(folder))))


SHARDS = [f"train-0000{i}-of-00004.parquet" for i in range(4)]
REFUSED = {
    "json and parquet": (["x.json", "x.parquet"], "x.*", "two forms of one file"),
    "plain and gzip": (["x.jsonl", "x.jsonl.gz"], "x.jsonl*", "two forms of one file"),
    "a file and its shards": (
        ["train.jsonl", "train-00000-of-00001.parquet"],
        "train*",
        "two forms of one file",
    ),
    "a file and shards of its kind": (
        ["train.jsonl", "train-00000-of-00001.jsonl"],
        "train*",
        "two forms of one file",
    ),
    "shards of two sets": (
        ["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        "*.jsonl",
        "copies of one file|shards of different sets",
    ),
    "a shard with a hash and one without": (
        ["x-00000-of-00001.parquet", "x-00000-of-00001-17309c769bfe5733.parquet"],
        "x-*",
        "copies of one file",
    ),
    "a browser's second download": (["x.jsonl", "x (1).jsonl"], "*.jsonl", "copies of one file"),
    "a copy": (["x.jsonl", "x copy.jsonl"], "*.jsonl", "copies of one file"),
    "a copy on Windows": (["x.jsonl", "x - Copy (2).jsonl"], "*.jsonl", "copies of one file"),
    "a copy on Linux": (["x.jsonl", "x (copy).jsonl"], "*.jsonl", "copies of one file"),
    "a Mac's fork": (["x.jsonl", "._x.jsonl"], "*.jsonl", "holds no rows"),
    "a backup": (["x.jsonl", "x.jsonl.bak"], "x*", "x.jsonl.bak: cannot read this kind of file"),
    "an editor's backup": (["x.jsonl", "x.jsonl~"], "x*", "x.jsonl~: cannot read this kind of"),
    "a download at work": (["x-1.jsonl", "x-2.jsonl.crdownload"], "x-*.jsonl", "unfinished"),
    "part of a download": (["x-1.jsonl", "x-2.jsonl.part"], "x-*", "unfinished download"),
    "a lost shard": ([*SHARDS[:2], SHARDS[3]], "train-*", r"1 of its 4 shards are missing .* 2\)"),
    "a lost last shard": (SHARDS[:3], "*.parquet", r"1 of its 4 shards are missing \(number 3\)"),
    "shards counted from one": (
        ["x_1_of_3.jsonl", "x_3_of_3.jsonl"],
        "*.jsonl",
        r"1 of its 3 shards are missing \(number 2\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_would_be_read_twice_or_not_at_all(tmp_path, case):
    names, glob, message = REFUSED[case]
    for name in names:
        write(tmp_path / name, chats(2))
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, glob)
    two = "of one file" in str(raised.value) or "holds no rows" in str(raised.value)
    assert not two or all(name in str(raised.value) for name in names[:2])


def test_a_file_under_two_names(tmp_path):
    write(tmp_path / "x.jsonl", chats(2))
    os.symlink(tmp_path / "x.jsonl", tmp_path / "y.jsonl")
    os.link(tmp_path / "x.jsonl", tmp_path / "z.jsonl")
    for globs in (["[xy].jsonl"], ["[xz].jsonl"], ["x.jsonl", "x*"]):
        with pytest.raises(ValueError, match=r"/x\.jsonl and /\S+\.jsonl are the same file"):
            read(tmp_path, *globs)


ACCEPTED = {
    "all shards": (SHARDS, "train-*"),
    "shards with hashes": (["x-00000-of-00001-17309c769bfe5733.parquet"], "*.parquet"),
    "shards counted from one": (["x-1-of-2.jsonl", "x-2-of-2.jsonl"], "*.jsonl"),
    "parts without a total": (["part-00000.parquet", "part-00002.parquet"], "part-*"),
    "names that are alike": (["x.jsonl", "x1.jsonl", "x_of_1.jsonl", "xcopy.jsonl"], "*.jsonl"),
    "one shard by its name": (SHARDS[:1], SHARDS[0]),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_files_that_belong_together(tmp_path, case):
    names, glob = ACCEPTED[case]
    for name in [*names, ".x.jsonl", "other (1).tsv"]:  # a hidden file is no file of a glob
        write(tmp_path / name, chats(2))
    assert read(tmp_path, glob) == 2 * len(names)


def test_one_form_is_named_while_the_other_lies_beside_it(tmp_path):
    write(tmp_path / "x.json", chats(2))
    write(tmp_path / "x.jsonl", chats(3))
    assert read(tmp_path, "x.jsonl") == 3


def test_parquet_columns_of_view_types(tmp_path):
    """As newer writers leave them; pyarrow itself writes no list of views, so its schema is set."""
    rows = [{"dataset": name, "messages": messages("q", "a" * 30)} for name in "xyx"]
    plain = pa.Table.from_pylist(rows)
    view = pa.string_view()
    message = pa.struct([("content", view), ("role", view)])
    for number, kind in enumerate((pa.list_, pa.large_list, pa.list_view, pa.large_list_view)):
        schema = pa.schema([("dataset", view), ("messages", kind(message))])
        path = tmp_path / f"{number}.parquet"
        with pq.ParquetWriter(path, plain.schema, store_schema=False) as writer:
            writer.write_table(plain)
            content = base64.b64encode(schema.serialize().to_pybytes())
            writer.add_key_value_metadata({b"ARROW:schema": content})
        assert str(pq.ParquetFile(path).schema_arrow).count("string_view") > 2
        assert read_rows(path) == rows
        assert read_rows(path, {"dataset": "x"}) == [rows[0], rows[2]]
        placed = [place for place, _ in readers.read_placed(str(path), {"dataset": "x"})]
        assert placed == ["row 0", "row 2"]
