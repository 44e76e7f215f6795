"""Files of own rows, named by their path or by a task without a converter: from rows to batches."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_rows import chats, messages, write_jsonl

from tulu_jax.audit import card, check, show
from tulu_jax.data import data_checks, loader, registry
from tulu_jax.data.sources import own

ANSWERS = {"chosen": "hen", "rejected": "fox"}
SAID = {side: [{"role": "assistant", "content": text}] for side, text in ANSWERS.items()}
WHOLE = {side: messages("Say", text) for side, text in ANSWERS.items()}
SYSTEM = [{"role": "system", "content": "Be brief."}]
TURNS = [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "hen"}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with an empty data root `data` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.fixture
def config(tokenizer_dir, folder):
    def made(train, **options) -> loader.DataConfig:
        options = {"max_length": 64, "data_root": str(folder / "data")} | options
        return loader.DataConfig(train=train, tokenizer=tokenizer_dir, **options)

    return made


def ids(rows: loader.Rows) -> list[str]:
    return [rows.store.name(index) for index in range(rows.num_examples)]


def first_batch(rows: loader.Rows) -> loader.Batch:
    one = {"batch_size": 2, "start_step": 0, "num_steps": 1, "workers": 0}
    return next(loader.batches(rows, process_index=0, process_count=1, **one))


def test_from_a_file_to_batches(config, folder):
    write_jsonl(folder / "my.jsonl", chats(20))
    data = config("my.jsonl", holdout_every=5, max_length=128)
    assert data.kind == "sft" and list(data_checks.problems(data, kind="sft")) == []
    train, validation = (loader.prepare(data, split=split) for split in registry.SPLITS)
    assert ids(validation) == [f"my.jsonl/{i}" for i in (4, 9, 14, 19)] and train.num_examples == 16
    (counts,) = train.stats.tasks
    assert (counts.raw_rows, counts.not_drawn, counts.expected) == (20, 4, None)
    assert first_batch(train)["loss_mask"].any()
    assert not any(outcome.difference for outcome in check.check(data))
    (row,) = show.shown_rows(validation, first=0, count=1, split="validation")
    assert sorted(segment.example for segment in row.segments) == sorted(ids(validation))
    built = card.build(data, {"train": train}, batch_size=2, prompts=None)
    (task,) = built.numbers["tasks"]
    assert (task["task"], task["licence"], task["origin"]) == (
        "my.jsonl",
        "not stated",
        "not stated",
    )


def test_pairs_from_a_file_to_batches(config, folder):
    write_jsonl(folder / "my.jsonl", [{"prompt": f"Say {i}", **ANSWERS} for i in range(6)])
    data = config("my.jsonl", holdout_every=3)
    assert data.kind == "preference" and list(data_checks.problems(data, kind="preference")) == []
    train, validation = (loader.prepare(data, split=split) for split in registry.SPLITS)
    assert (train.num_examples, validation.num_examples) == (4, 2)
    assert set(first_batch(train)["branches"].reshape(-1).tolist()) == {0, 1, 2}
    (problem,) = data_checks.problems(data, kind="sft")
    assert "the objective trains on sft data; 'my.jsonl' is preference data" in problem
    built = card.build(data, {"train": train}, batch_size=2, prompts=None)
    assert built.numbers["mixture"] == "my.jsonl"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_kind_of_file(config, folder, suffix):
    path, lines = folder / f"my{suffix}", "".join(json.dumps(row) + "\n" for row in chats(3))
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(chats(3)), path)
    else:
        text = json.dumps(chats(3)) if suffix == ".json" else lines
        path.write_bytes(gzip.compress(text.encode()) if suffix[-1] == "z" else text.encode())
    assert loader.prepare(config(path.name), split="train").num_examples == 3


def test_where_a_path_may_lead(config, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home").mkdir()
    for name in ("here.jsonl", "data/root.jsonl", "home/home.jsonl", "a-1.jsonl", "a-2.jsonl"):
        write_jsonl(folder / name, chats(2))
    counts = {
        name: loader.prepare(config(name), split="train").num_examples
        for name in (
            "here.jsonl",
            "root.jsonl",
            "~/home.jsonl",
            f"{folder}/here.jsonl",
            "a-*.jsonl",
        )
    }
    assert list(counts.values()) == [2, 2, 2, 2, 4]
    write_jsonl(folder / "data" / "here.jsonl", chats(3))
    with pytest.raises(ValueError, match=r"'here\.jsonl' is /\S+ in the working directory and /\S"):
        loader.prepare(config("here.jsonl"), split="train")


def test_no_name_and_no_file(config, folder):
    write_jsonl(folder / "my.jsonl", chats(2))
    (folder / "my.csv").write_text("a,b")
    with pytest.raises(ValueError) as raised:
        config("my.jsnl")
    for part in (
        "train: no mixture or task is named 'my.jsnl'",
        f"there is no such file: looked for {folder}/my.jsnl and {folder}/data/my.jsnl",
        "did you mean 'my.jsonl'?",
    ):
        assert part in str(raised.value)
    with pytest.raises(ValueError, match=r"'limma'; did you mean 'lima'\?.* there is no such file"):
        config("limma")
    with pytest.raises(ValueError, match=r"my\.csv: cannot read this kind of file; expected one"):
        config("my.csv")
    with pytest.raises(ValueError, match=r"data is a folder; expected files"):
        config("data")


def test_a_misspelt_name_asks_no_bucket(config):
    """Which would take half a minute, and name the bucket instead of the name."""
    with pytest.raises(ValueError, match=r"no mixture or task is named 'limma'"):
        config("limma", data_root="gs://no-such-bucket/data")


def test_a_second_file_is_the_validation_split(config, folder):
    write_jsonl(folder / "my.jsonl", chats(10))
    write_jsonl(folder / "val.jsonl", chats(3))
    data = config("my.jsonl", validation="val.jsonl", holdout_every=5)
    assert list(data_checks.problems(data, kind="sft")) == []
    train, validation = (loader.prepare(data, split=split) for split in registry.SPLITS)
    assert (train.num_examples, validation.num_examples) == (10, 3)


def test_the_file_that_is_trained_on_is_no_validation_split(config, folder):
    write_jsonl(folder / "my.jsonl", chats(10))
    (folder / "alias.jsonl").symlink_to(folder / "my.jsonl")
    for validation in ("my.jsonl", "./my.jsonl", "alias.jsonl"):
        (problem,) = data_checks.problems(config("my.jsonl", validation=validation), kind="sft")
        assert f"{folder}/my.jsonl is trained on (my.jsonl) and is the validation split, too" in (
            problem
        )


def test_files_and_names_in_one_mixture(config, folder):
    write_jsonl(folder / "my.jsonl", chats(10))
    mixture = registry.Mixture(name="both", tasks={"my.jsonl": 4, "tulu_tiny": 6})
    rows = loader.prepare(config(mixture, max_length=128), split="train")
    assert [counts.examples for counts in rows.stats.tasks] == [4, 6]


def test_a_task_without_kind_and_converter(config, folder):
    write_jsonl(folder / "my.jsonl", chats(10))
    write_jsonl(folder / "data" / "val.jsonl", chats(2))
    sources = {"train": "my.jsonl", "validation": "val.jsonl"}
    data = config(registry.Task(name="mine", sources=sources, sample=4))
    found = [loader.prepare(data, split=split).num_examples for split in registry.SPLITS]
    assert data.kind == "sft" and found == [4, 2]
    rows = registry.Task(name="mine", sources={"train": lambda: chats(3)})
    assert loader.prepare(config(rows), split="train").num_examples == 3
    with pytest.raises(ValueError, match=r"mine: kind is missing; with a converter, expected one"):
        registry.Task(name="mine", sources=sources, convert=own.pair)


def test_a_file_that_becomes_one_of_pairs(config, folder):
    write_jsonl(folder / "my.jsonl", chats(2))
    assert config("my.jsonl").kind == "sft"
    write_jsonl(folder / "my.jsonl", [{"prompt": "Say", **ANSWERS}])
    assert config("my.jsonl").kind == "preference"


def test_malformed_rows_are_named_by_file_and_line(config, folder):
    rows = [*chats(3), {"messages": "x"}, {"messages": [{"role": "user"}]}, {"text": "x"}]
    write_jsonl(folder / "my.jsonl", rows)
    with pytest.raises(ValueError) as raised:
        loader.prepare(config("my.jsonl"), split="train")
    for line, said in (
        (4, "row my.jsonl/3: messages is 'x'; expected a list of messages"),
        (5, "row my.jsonl/4: messages, message 0: content is None; expected a string"),
        (6, "row my.jsonl/5: found columns ['text']; expected one of ('messages', 'conv"),
    ):
        assert said in str(raised.value) and f"({folder}/my.jsonl, line {line})" in str(
            raised.value
        )


def test_a_first_row_of_neither_kind(config, folder):
    write_jsonl(folder / "my.jsonl", [{"instruction": "x", "output": "y"}])
    with pytest.raises(ValueError) as raised:
        loader.prepare(config("my.jsonl"), split="train")
    assert f"{folder}/my.jsonl, line 1: found columns ['instruction', 'output']" in str(
        raised.value
    )
    (folder / "my.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"my\.jsonl, line 1: malformed JSON"):
        loader.prepare(config("my.jsonl"), split="train")


PAIR = {"prompt": messages("Say"), **SAID}
PAIRS = {
    "texts": ({"prompt": "Say", **ANSWERS}, PAIR),
    "messages": (PAIR, PAIR),
    "a text, then messages": ({"prompt": "Say", **SAID}, PAIR),
    "one message a side": (
        {"prompt": "Say", **{side: said[0] for side, said in SAID.items()}},
        PAIR,
    ),
    "whole conversations": (WHOLE, PAIR),
    "null prompt": ({"prompt": None, **WHOLE}, PAIR),
    "whole conversations and the prompt's text": ({"prompt": "Say", **WHOLE}, PAIR),
    "whole conversations and the prompt": ({"prompt": messages("Say"), **WHOLE}, PAIR),
    "a system turn": (
        {"prompt": SYSTEM + messages("Say"), **ANSWERS},
        {**PAIR, "prompt": SYSTEM + messages("Say")},
    ),
    "several turns": (
        {"prompt": messages("Say", "No.", "Say"), **ANSWERS},
        {**PAIR, "prompt": messages("Say", "No.", "Say")},
    ),
    "ShareGPT": (
        {
            "conversations": TURNS[:1],
            **{side: {"from": "gpt", "value": text} for side, text in ANSWERS.items()},
        },
        PAIR,
    ),
    "scores": (
        {"prompt": "Say", **ANSWERS, "score_chosen": 8.0, "model": "x"},
        {**PAIR, "about": {"score_chosen": 8.0}},
    ),
}


@pytest.mark.parametrize("layout", PAIRS)
def test_layouts_of_pairs(layout):
    row, expected = PAIRS[layout]
    assert own.kind_of(row) == "preference" and own.pair(row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": messages("a", "b")}, {"messages": messages("a", "b")}),
        ({"messages": messages("a", "b"), "prompt": "a"}, {"messages": messages("a", "b")}),
        ({"conversations": TURNS}, {"messages": messages("Say", "hen")}),
        ({"conversations": messages("a", "b")}, {"messages": messages("a", "b")}),
        (
            {"messages": [{**m, "tool_calls": None, "weight": 1} for m in messages("a", "b")]},
            {"messages": messages("a", "b")},
        ),
        (
            {"messages": messages("a", "b"), "id": "x", "date": "y"},
            {"messages": messages("a", "b"), "about": {"id": "x"}},
        ),
    ],
)
def test_layouts_of_conversations(row, expected):
    assert own.kind_of(row) == "sft" and own.conversation(row) == expected


@pytest.mark.parametrize(
    ("convert", "row", "message"),
    [
        (own.pair, ANSWERS, r"no prompt, and the sides begin with an answer; found columns"),
        (own.pair, {"prompt": "Other", **WHOLE}, r"the prompt is not part of the conversations"),
        (own.pair, {"prompt": "Say", "chosen": "x"}, r"missing column 'rejected'"),
        (own.pair, {"prompt": 3, **ANSWERS}, r"prompt is 3; expected a text, a message or mess"),
        (own.pair, {**WHOLE, "rejected": SAID["rejected"]}, r"chosen begins with role 'user', rej"),
        (
            own.pair,
            {"chosen": messages("a", "x"), "rejected": messages("b", "x")},
            r"prompts of ch",
        ),
        (own.conversation, {"messages": [], "id": "x"}, r"messages is \[\]; expected a list of"),
        (own.conversation, {"messages": ["x"]}, r"messages, message 0: is 'x'; expected 'role'"),
        (own.conversation, {"messages": [{"role": "user", "content": None}]}, r"content is None"),
        (
            own.conversation,
            {"messages": [{"role": "assistant", "content": "x", "weight": 0}]},
            r"found \['weight'\], which would be lost",
        ),
        (
            own.conversation,
            {"messages": messages("a"), "conversations": TURNS},
            r"expected one of \('messages', 'conversations'\)",
        ),
    ],
)
def test_rows_that_are_neither(convert, row, message):
    with pytest.raises(ValueError, match=message):
        convert(row)
