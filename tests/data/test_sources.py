"""Readers: what each takes, and what each says of bad input."""

import gzip
import json

import pytest
from raw_rows import read_rows

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 80123\n"
KINDS = ("json", "jsonl", "jsonl.gz", "tsv", "parquet")
GOOD = '{"a": 1}\n'


def test_every_kind_of_file(tmp_path):
    rows = [{"text": "é 💡"}, {"text": "two\nlines"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "r.jsonl").write_text(lines)
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "r.tsv").write_text("q\ta\\nb\tr\nq2\ta2\tr2\n")
    assert read_rows(tmp_path / "r.jsonl") == read_rows(tmp_path / "r.json") == rows
    assert read_rows(tmp_path / "r.jsonl.gz") == rows
    assert read_rows(tmp_path / "r.tsv") == [
        {"fields": ["q", "a\\nb", "r"]},
        {"fields": ["q2", "a2", "r2"]},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", GOOD + '{"a": \n', r"r.jsonl, line 2: malformed JSON"),
        ("r.jsonl", GOOD + "\n" + GOOD, r"r.jsonl, line 2: missing \(the line is empty\)"),
        ("r.jsonl", GOOD + "[1]\n", r"r.jsonl, line 2: found a list; expected an object"),
        ("r.jsonl", GOOD.encode() + b"\xff\n", r"r.jsonl, after line \d: unreadable"),
        ("r.json", '[{"a": 1}', r"r.json: not JSON \(.*line 1"),
        ("r.json", '{"a": 1}', r"r.json: found a dict; expected a list of objects"),
        ("r.json", "[1]", r"r.json: item 0 is a int; expected an object"),
        ("r.csv", "a,b", r"r.csv: cannot read this kind of file"),
        ("r.jsonl.gz", b"not gzip", r"r.jsonl.gz, after line 0: unreadable"),
        *((f"r.{kind}", LFS, rf"r.{kind}: found a Git LFS pointer") for kind in KINDS),
        ("r.jsonl", "\n<!DOCTYPE html>\n<html>", r"r.jsonl: found a web page, expected a file"),
        (
            "r.jsonl.gz",
            gzip.compress(GOOD.encode() * 9000)[:-9],
            r"r.jsonl.gz, after line \d+: unreadable",
        ),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_missing_file_says_where_it_belongs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"r.jsonl: no such file; place it there"):
        read_rows(tmp_path / "r.jsonl")
