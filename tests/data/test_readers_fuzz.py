"""Files of raw rows that are damaged: every row, or an error that names file and line."""

import gzip
import json

import hypothesis
import pytest
from hypothesis import strategies as st
from raw_rows import chats, read_rows

LINES = "".join(json.dumps(row) + "\n" for row in chats(20))
FUZZ = hypothesis.settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", b"", "a.jsonl: has no rows; expected at least one"),
        ("a.json", b"", r"a.json: not JSON \(Expecting value"),
        ("a.json", b"[]", "a.json: has no rows"),
        ("a.jsonl.gz", b"", "a.jsonl.gz: has no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a.jsonl, line 2: malformed JSON \(Expecting value"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": 2}\n', r"line 2: missing \(the line is empty\)"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: found a list; expected an object"),
        ("a.jsonl", b'{"a": 1}\n\xff\xfe\n', "a.jsonl, after line 0: unreadable|after line 1"),
        ("a.jsonl", b'{"a": ' + b"[" * 200_000, "a.jsonl, line 1: malformed JSON"),
        ("a.json", b"[" * 200_000, r"a.json: not JSON \(brackets are nested too deep"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: malformed JSON .*4300 digits"),
        ("a.json", b'{"a": 1}', "found a dict; expected a list of objects"),
        ("a.json", b"[1]", "item 0 is a int; expected an object"),
        ("a.jsonl.gz", b"not gzip", "after line 0: unreadable"),
        ("a.parquet", b"not parquet", "a.parquet: not readable as Parquet"),
        ("a.parquet", b"", "a.parquet: not readable as Parquet"),
        ("a.csv", b"a,b", "cannot read this kind of file; expected one of"),
    ],
)
def test_damage_is_named(tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=error):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.tsv"])
def test_a_byte_order_mark_is_passed_over(tmp_path, name):
    content = {"a.json": b'[{"a": 1}]', "a.tsv": b"x\ty\n"}.get(name, b'{"a": 1}\n')
    content = b"\xef\xbb\xbf" + content
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_rows(tmp_path / name) == [{"fields": ["x", "y"]} if name == "a.tsv" else {"a": 1}]


def test_of_a_key_given_twice_the_last_counts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1, "a": 2}\n')
    assert read_rows(tmp_path / "a.jsonl") == [{"a": 2}]


def test_line_separators_inside_strings_split_no_line(tmp_path):
    rows = [{"a": "x\u2028y\x85z\x0b"}, {"a": "b"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines).replace("\x0b", "\\u000b"), newline="")
    assert read_rows(tmp_path / "a.jsonl") == rows


@FUZZ
@hypothesis.given(length=st.integers(0, len(LINES) - 1))
def test_lines_cut_anywhere(tmp_path, length):
    """A cut is seen unless it falls between two rows, which no line can tell."""
    (tmp_path / "cut.jsonl").write_text(LINES[:length])
    whole = LINES[:length].count("}]}")
    try:
        assert len(read_rows(tmp_path / "cut.jsonl")) == whole > 0
    except ValueError as error:
        text = str(error)
        assert f"line {whole + 1}: malformed JSON" in text or "has no rows" in text


@FUZZ
@hypothesis.given(length=st.integers(0, len(gzip.compress(LINES.encode(), mtime=0)) - 1))
def test_gzip_cut_anywhere_is_seen(tmp_path, length):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINES.encode(), mtime=0)[:length])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz(: has no rows|, after line)"):
        read_rows(tmp_path / "cut.jsonl.gz")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.tsv", "a.parquet"])
@FUZZ
@hypothesis.given(content=st.binary(max_size=300), start=st.sampled_from([0, 1, 60, 10**6]))
def test_garbage_gives_rows_or_a_named_error(tmp_path, name, content, start):
    content = LINES.encode()[:start] + content
    (tmp_path / name).write_bytes(gzip.compress(content) if start and name[-1] == "z" else content)
    try:
        assert all(isinstance(row, dict) for row in read_rows(tmp_path / name))
    except ValueError as error:
        assert name in str(error)
