"""Replies to a file of rows: resumed after any byte, in order at the end, never to other rows."""

import json

import pytest

from tulu_jax import validation
from tulu_jax.decode import reply_file

ROWS = [
    {"prompt": "Grüße\u2028?", "id": "a"},
    {"messages": [{"role": "user", "content": "b"}]},
    {"prompt": "c"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def test_rows_are_answered_once_and_end_in_order(tmp_path):
    rows = reply_file.read_rows(write(tmp_path / "in.jsonl", ROWS))
    assert rows == ROWS
    assert reply_file.messages(rows[2]) == [{"role": "user", "content": "c"}]
    assert reply_file.messages(rows[1]) == ROWS[1]["messages"]
    out = tmp_path / "made" / "out.jsonl"
    first = reply_file.ReplyFile(str(out), rows)
    first.add(2, "third\n")
    first.add(0, "erste")
    first.close()
    whole = out.read_bytes()
    for kept in range(len(whole) + 1):  # killed anywhere
        out.write_bytes(whole[:kept])
        again = reply_file.ReplyFile(str(out), rows)
        assert again.left == [n for n in range(3) if n not in again.answered]
        assert len(again.answered) == whole[:kept].count(b"\n")
        again.close()
    out.write_bytes(whole)
    last = reply_file.ReplyFile(str(out), rows)
    last.add(1, "second")
    last.close()
    found = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    replies = ["erste", "second", "third\n"]
    assert found == [row | {"row": n, "reply": replies[n]} for n, row in enumerate(ROWS)]
    assert reply_file.ReplyFile(str(out), rows).left == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows"),
        ('{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ('["a"]\n', "line 1: found ['a']; expected an object"),
        ('{"text": "a"}\n', "found the fields ['text']"),
        ('{"prompt": "a", "messages": []}\n', "expected one of"),
        ('{"prompt": " "}\n', "found the prompt ' '; expected a text"),
    ],
)
def test_what_is_no_row_is_named(tmp_path, text, said):
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(validation.UsageError) as refusal:
        reply_file.read_rows(str(path))
    assert said in str(refusal.value) and "in.jsonl" in str(refusal.value)


def test_replies_to_other_rows_are_not_gone_on_with(tmp_path):
    path = write(tmp_path / "out.jsonl", [{"prompt": "other", "row": 0, "reply": "x"}])
    with pytest.raises(validation.UsageError, match="line 1 is no reply to a row of the input"):
        reply_file.ReplyFile(path, ROWS)
    assert json.loads((tmp_path / "out.jsonl").read_text())["prompt"] == "other"
