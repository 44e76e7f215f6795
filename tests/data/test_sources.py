"""Readers and converters: what each takes, and what each says of bad input."""

import gzip
import json

import pytest
from raw_rows import messages

from tulu_jax.data import examples, registry
from tulu_jax.data.sources import instruct, preference, readers

GOOD = '{"a": 1}\n'


def read(path) -> list[dict]:
    return list(readers.read_rows(str(path)))


def test_every_kind_of_file(tmp_path):
    rows = [{"text": "é 💡"}, {"text": "two\nlines"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "r.jsonl").write_text(lines)
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "r.tsv").write_text("q\ta\\nb\tr\nq2\ta2\tr2\n")
    assert read(tmp_path / "r.jsonl") == read(tmp_path / "r.json") == rows
    assert read(tmp_path / "r.jsonl.gz") == rows
    assert read(tmp_path / "r.tsv") == [
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
        read(path)


def test_missing_file_says_where_it_belongs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"r.jsonl: no such file; place it there"):
        read(tmp_path / "r.jsonl")


def test_alpaca_with_and_without_input():
    row = {"instruction": "Add. ", "input": "1, 2\n", "output": "3"}
    assert instruct.alpaca(row) == {"messages": messages("Add.\n\n1, 2", "3")}
    assert instruct.alpaca(row | {"input": " "}) == {"messages": messages("Add.", "3")}
    with pytest.raises(ValueError, match=r"missing column 'output'; found \['input', 'instr"):
        instruct.alpaca({"instruction": "", "input": ""})
    with pytest.raises(ValueError, match=r"column 'input' is a NoneType; expected a string"):
        instruct.alpaca(row | {"input": None})


def test_lima_loses_an_odd_last_turn():
    assert instruct.lima({"conversations": ["a", "b", "c"]}) == {"messages": messages("a", "b")}
    assert instruct.lima({"conversations": ["a"]}) == registry.Dropped("fewer than two turns")
    with pytest.raises(ValueError, match=r"expected 'conversations', a list of texts"):
        instruct.lima({"conversations": "a"})


def node(text: str, *replies: dict, role: str = "assistant", **more) -> dict:
    return {"text": text, "role": role, "replies": list(replies), **more}


def quality(value: float) -> dict:
    return {"labels": {"quality": {"value": value, "count": 3}}}


def test_open_assistant_follows_the_best_replies():
    tree = node(
        "q",
        node("deleted", deleted=True, **quality(1.0)),
        node("unlabelled"),
        node("fine", **quality(0.5)),
        node(
            "best",
            node("thanks", node("welcome"), node("later"), role="prompter"),
            **quality(0.75),
        ),
        role="prompter",
    )
    found = instruct.oasst_tree({"prompt": tree})
    assert found == {"messages": messages("q", "best", "thanks", "welcome")}


def test_open_assistant_without_labels_takes_first_replies_and_drops_open_ends():
    tree = node("q", node("first"), node("second", node("?", role="prompter")), role="prompter")
    assert instruct.oasst_tree({"prompt": tree}) == {"messages": messages("q", "first")}
    tree["replies"].reverse()
    assert instruct.oasst_tree({"prompt": tree}) == registry.Dropped(
        "best replies end with the prompter"
    )


def test_ultrafeedback_drops_ties_and_refuses_inverted_scores():
    row = {
        "prompt": "p",
        "chosen": "good",
        "rejected": "bad",
        "metadata": {"score_chosen": 9.0, "score_rejected": 8.0},
    }
    found = preference.ultrafeedback_binarized(row)
    assert found["prompt"] == messages("p")
    assert [found[side][0]["content"] for side in ("chosen", "rejected")] == ["good", "bad"]
    tied = row | {"metadata": {"score_chosen": 8.0, "score_rejected": 8.0}}
    assert preference.ultrafeedback_binarized(tied) == registry.Dropped("equal scores")
    inverted = row | {"metadata": {"score_chosen": 7.0, "score_rejected": 8.0}}
    with pytest.raises(ValueError, match=r"chosen scores 7.0, rejected 8.0"):
        preference.ultrafeedback_binarized(inverted)


REAL = {  # raw rows; train examples; dropped
    "lima": (400, 380, {}),
    "gpt4_alpaca": (666, 633, {}),
    "code_alpaca": (1345, 1278, {}),
    "stanford_alpaca": (1600, 1520, {}),
    "dolly": (400, 380, {}),
    "oasst1_sample": (67, 38, {"best replies end with the prompter": 26}),
    "ultrafeedback_binarized": (500, 358, {"equal scores": 41, "identical sides": 1}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_rows_are_all_accounted_for(shared_data, name):
    ((task, rows, seed),) = registry.components(name)
    raw, kept, dropped = REAL[name]
    options = {"rows": rows, "seed": seed, "data_root": str(shared_data)}
    train = examples.load_examples(task, split="train", **options)
    assert (train.raw_rows, len(train.examples), train.dropped) == (raw, kept, dropped)
    assert train.not_drawn + kept + sum(dropped.values()) == raw
    validation = examples.load_examples(task, split="validation", **options)
    assert validation.raw_rows == raw and not set(validation.ids) & set(train.ids)
    held_out = len(validation.examples) + sum(validation.dropped.values())
    every = task.holdout_every
    assert held_out == raw // every == train.not_drawn
    assert all(int(row_id.split("/")[1]) % every == every - 1 for row_id in validation.ids)
