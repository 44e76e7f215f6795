"""The encode cache: written once, keyed by its inputs, whole or absent; rows that do not fit."""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import resource
import subprocess
import sys

import pytest
from encoded_chats import encode_conversation
from raw_rows import chats, identity, messages, pair, write_jsonl

from tulu_jax.data import (
    cache_files,
    chat,
    data_checks,
    encode,
    examples,
    loader,
    registry,
    tokenizer_training,
)


@pytest.fixture
def config(tokenizer_dir, tmp_path, add_task) -> loader.DataConfig:
    """A task "a" of ten conversations in `rows.jsonl`, and where it is encoded to."""
    write_jsonl(tmp_path / "rows.jsonl", chats(10))
    add_task("a", {"train": "rows.jsonl"})
    return loader.DataConfig(
        train="a",
        tokenizer=tokenizer_dir,
        data_root=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
        max_length=64,
    )


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of rows of each call that tokenized anything."""
    calls, tokenize = [], chat.tokenize

    def counting(conversations, **options):
        calls.append(len(conversations))
        return tokenize(conversations, **options)

    monkeypatch.setattr(chat, "tokenize", counting)
    return calls


def train_rows(config, **changes) -> loader.Rows:
    return loader.prepare(dataclasses.replace(config, **changes), split="train")


def test_encoded_once(config, encoded):
    first = train_rows(config)
    again = train_rows(config)
    assert encoded == [10] and again.fingerprint == first.fingerprint
    assert again.stats == first.stats and (again.row(0)["tokens"] == first.row(0)["tokens"]).all()


def test_seed_and_packing_do_not_encode_again(config, encoded):
    first = train_rows(config)
    assert train_rows(config, seed=1).fingerprint == first.fingerprint
    assert train_rows(config, packing="none").fingerprint != first.fingerprint
    assert encoded == [10]


@pytest.mark.parametrize("changes", [{"max_length": 63}, {"truncation": "drop"}])
def test_another_length_or_rule_encodes_again(config, encoded, changes):
    first = train_rows(config)
    assert train_rows(config, **changes).fingerprint != first.fingerprint
    assert encoded == [10, 10]


def test_changed_rows_encode_again(config, encoded, tmp_path):
    first = train_rows(config)
    write_jsonl(tmp_path / "rows.jsonl", chats(9) + [{"messages": messages("question 9", "no")}])
    assert train_rows(config).fingerprint != first.fingerprint
    assert encoded == [10, 10]


def test_another_tokenizer_encodes_again(config, encoded, tmp_path):
    first = train_rows(config)
    other = str(tmp_path / "other")
    tokenizer_training.train_tokenizer("tulu_tiny", other, vocab_size=400)
    assert train_rows(config, tokenizer=other).fingerprint != first.fingerprint
    assert encoded == [10, 10]


def test_another_rule_of_the_task_encodes_again(config, encoded):
    train_rows(config)
    task = registry.TaskRegistry.get("a")
    registry.TaskRegistry.remove("a")
    registry.TaskRegistry.add(dataclasses.replace(task, sample=8))
    assert train_rows(config).num_examples == 8 and encoded == [10, 8]


@pytest.mark.parametrize("version", [None, "1"])
def test_a_converter_s_code_encodes_again_where_no_version_is_declared(
    config, encoded, tmp_path, monkeypatch, version
):
    monkeypatch.syspath_prepend(str(tmp_path))
    counts = []
    for line in ("return row", "return row  # as it is", "return dict(row)"):
        (tmp_path / "my_converter.py").write_text(f"def convert(row):\n    {line}\n")
        sys.modules.pop("my_converter", None)
        importlib.invalidate_caches()
        convert = importlib.import_module("my_converter").convert
        task = dataclasses.replace(registry.TaskRegistry.get("a"), convert=convert, version=version)
        registry.TaskRegistry.remove("a")
        registry.TaskRegistry.add(task)
        train_rows(config)
        counts.append(len(encoded))
    assert counts == ([1, 1, 1] if version else [1, 1, 2])


def test_a_validation_file_taken_away_encodes_again(config, tmp_path):
    """Held out of train, and train itself: the rows of one run are not those of the other."""
    write_jsonl(tmp_path / "own.jsonl", chats(3))
    kept = {}
    for sources in ({"train": "rows.jsonl", "validation": "own.jsonl"}, {"train": "rows.jsonl"}):
        task = registry.Task(name="b", kind="sft", sources=sources, convert=identity)
        rows = train_rows(config, train=task, holdout_every=5)
        kept[len(sources)] = {rows.store.name(i) for i in range(rows.num_examples)}
    assert len(kept[2]) == 10 and kept[1] == kept[2] - {"b/4", "b/9"}


def plain(row):
    return row


def other(row):
    return dict(row)


FILES = registry.Files(paths=("rows.jsonl",))
TASK = {
    "name": "a",
    "kind": "sft",
    "sources": {"train": FILES},
    "convert": plain,
    "filters": (),
    "sample": 8,
    "seed": 1,
    "expected": None,
    "version": None,
    "licence": "x",
    "origin": "x",
}
DRAWING = {"split": "train", "amount": 4, "seed": 2, "holdout_every": 5, "data_root": "."}
KEEP = registry.Filter(name="f", keep=plain)
ANOTHER_KEY = [  # every field that rows depend on, with other values that it may have
    ("name", "b"),
    ("kind", "preference"),
    ("sources", {"train": dataclasses.replace(FILES, paths=("other.jsonl",))}),
    ("sources", {"train": dataclasses.replace(FILES, paths=("rows.jsonl", "other.jsonl"))}),
    ("sources", {"train": dataclasses.replace(FILES, paths=("rows.tsv",))}),  # the same bytes
    ("sources", {"train": dataclasses.replace(FILES, where={"id": "x"})}),
    ("sources", {"train": FILES, "validation": "other.jsonl"}),
    ("sources", {"train": lambda: chats(10)}),
    ("convert", other),
    ("convert", functools.partial(plain)),
    ("filters", (KEEP,)),
    ("filters", (dataclasses.replace(KEEP, name="g"),)),
    ("filters", (dataclasses.replace(KEEP, keep=other),)),
    ("filters", (KEEP, KEEP)),
    ("sample", None),
    ("sample", 7),
    ("seed", 3),
    ("version", "2"),
    ("version", "3"),
]
ANOTHER_DRAWING = [
    ("split", "validation"),
    ("amount", None),
    ("amount", 5),
    ("amount", 0.5),
    ("amount", 1.0),
    ("seed", 9),
    ("holdout_every", 4),
    ("holdout_every", None),
]
ANOTHER_ENCODING = [
    ("chat", "paper"),
    ("max_length", 63),
    ("truncation", "drop"),
    ("one_row", True),
]
SAME_KEY = [("expected", 3), ("licence", "y"), ("origin", "y")]


def test_no_two_runs_whose_rows_may_differ_share_a_folder(tmp_path, tokenizer):
    """Every field of what makes rows is here: either another value is another key, or it is not."""
    for name, rows in (("rows.jsonl", chats(10)), ("other.jsonl", chats(9))):
        write_jsonl(tmp_path / name, rows)
    (tmp_path / "rows.tsv").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    encoding = encode.Encoding(
        tokenizer=tokenizer, chat="spec", max_length=64, truncation="cut", one_row=False
    )

    def key(task=(), drawing=(), encoded=()):
        wanted = registry.Task(**{**TASK, **dict(task)})
        drawn = examples.Drawing(**{**DRAWING, "data_root": str(tmp_path), **dict(drawing)})
        digest = examples.source_digest(wanted, drawn)
        return encode._fingerprint(digest, dataclasses.replace(encoding, **dict(encoded)))

    first = key()
    changed = {("task", *map(repr, c)): key(task=[c]) for c in ANOTHER_KEY}
    changed |= {("drawing", *map(repr, c)): key(drawing=[c]) for c in ANOTHER_DRAWING}
    changed |= {("encoding", *map(repr, c)): key(encoded=[c]) for c in ANOTHER_ENCODING}
    keys = [first, *changed.values()]
    assert [name for name, found in changed.items() if keys.count(found) > 1] == []
    assert {key(task=[c]) for c in SAME_KEY} == {key()} == {first}
    for kind, covered in (
        (registry.Task, ANOTHER_KEY + SAME_KEY),
        (examples.Drawing, [*ANOTHER_DRAWING, ("data_root", "")]),
        (encode.Encoding, [*ANOTHER_ENCODING, ("tokenizer", "")]),
    ):
        assert {name for name, _ in covered} == {f.name for f in dataclasses.fields(kind)}


def test_what_a_split_is_not_drawn_by_does_not_encode_again(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", chats(10))
    own = registry.Task(**{**TASK, "sources": {"train": FILES, "validation": FILES}})

    def key(task=own, **changes):
        return examples.source_digest(
            task, examples.Drawing(**{**DRAWING, "data_root": str(tmp_path), **changes})
        )

    assert key(holdout_every=None) == key(holdout_every=7)
    assert key(split="validation", amount=3, seed=4) == key(split="validation")
    assert key(dataclasses.replace(own, sample=None, seed=4), amount=None) == key(
        dataclasses.replace(own, sample=None), amount=None, seed=5
    )


def test_a_file_written_anew_with_size_and_time_as_before_is_seen(config, tmp_path):
    before, stat = train_rows(config), (tmp_path / "rows.jsonl").stat()
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("answer 3", "answer 4"))
    os.utime(tmp_path / "rows.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert train_rows(config).fingerprint != before.fingerprint


def test_finished_tasks_survive_a_failing_one(config, encoded, tmp_path, add_task):
    write_jsonl(tmp_path / "b.jsonl", [{"messages": []}])
    add_task("b", {"train": "b.jsonl"})
    registry.MixtureRegistry.add(registry.Mixture(name="ab", tasks={"a": None, "b": None}))
    try:
        with pytest.raises(ValueError, match=r"row b/0: found messages \[\]"):
            train_rows(config, train="ab")
        write_jsonl(tmp_path / "b.jsonl", chats(2))
        assert train_rows(config, train="ab").num_examples == 12
    finally:
        registry.MixtureRegistry.remove("ab")
    assert encoded == [10, 2]


ENCODE = """
import json, sys
from tulu_jax.data import encode, loader, registry
encode.SHARD_ROWS = 4
registry.TaskRegistry.add(
    registry.Task(
        name="a",
        kind="sft",
        sources={"train": "rows.jsonl"},
        convert=lambda row: row,
        licence="-",
        origin="-",
    )
)
rows = loader.prepare(loader.DataConfig(**json.loads(sys.argv[1])), split="train")
print(rows.fingerprint, rows.num_examples)
"""


def encode_in_a_process(config, **options) -> subprocess.Popen:
    fields = json.dumps({**dataclasses.asdict(config), "train": "a"})
    command = [sys.executable, "-c", ENCODE, fields]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_full_disk_leaves_whole_shards_and_the_next_run_goes_on(config, tmp_path):
    """A real process with a limit on the size of a file: its third shard does not fit."""
    rows = chats(10)
    rows[9]["messages"][1]["content"] = "hen fox " * 3000
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = dataclasses.replace(config, max_length=10000)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (12000, 12000))
    _, error = (process := encode_in_a_process(config, preexec_fn=limit)).communicate()
    assert process.returncode != 0
    assert "free some space, or set cache_dir to a larger disk, and start again" in error.decode()
    (folder,) = pathlib.Path(config.cache_dir).iterdir()
    names = sorted(file.name for file in folder.iterdir())
    assert [name[:15] for name in names] == ["examples-00000-", "examples-00001-"]
    written = [(folder / name).stat().st_mtime_ns for name in names]
    output, _ = encode_in_a_process(config).communicate()
    assert output.split()[1] == b"10"
    assert [(folder / name).stat().st_mtime_ns for name in names] == written


def test_two_processes_may_encode_the_same_rows(config, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", chats(400))
    processes = [encode_in_a_process(config) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert outputs[0] == outputs[1] and outputs[0].split()[1] == b"400"
    (folder,) = pathlib.Path(config.cache_dir).iterdir()
    assert len(cache_files.listing(folder).shards) == 100
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


def test_dropped_rows_are_kept_aside(config, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [*chats(2), LONG])
    rows = train_rows(config, truncation="drop")
    (folder,) = pathlib.Path(config.cache_dir).iterdir()
    aside = [json.loads(line) for line in (folder / "aside.jsonl").read_text().splitlines()]
    assert aside == [{"id": "a/2", "reason": "longer than max_length"}]
    assert rows.num_examples == 2


LONG = {"messages": messages("Say: hen fox", "hen fox " * 60)}
LATE = {"messages": messages("hen " * 200, "fox")}


def test_long_rows_are_cut_on_the_right_and_counted(config, tmp_path, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", [*chats(2), LONG, LATE])
    rows = train_rows(config, packing="none")
    assert (rows.num_examples, rows.stats.cut) == (3, 1)
    assert rows.stats.dropped == {"prompt fills the row": 1}
    whole = encode_conversation(LONG["messages"], tokenizer, chat="spec")
    cut = rows.in_order(2)
    assert (cut["tokens"] == whole.tokens[:64]).all()
    assert (cut["targets"] == whole.targets[:64]).all()
    assert (cut["loss_mask"] == whole.loss_mask[:64]).all()
    table = str(rows.stats)
    assert "left out: 1 × prompt fills the row" in table and "a       4" in table


def test_long_rows_are_dropped_and_counted(config, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [*chats(2), LONG, LATE])
    rows = train_rows(config, truncation="drop")
    assert (rows.num_examples, rows.stats.cut) == (2, 0)
    assert rows.stats.dropped == {"longer than max_length": 2}
    assert rows.example_ids(0) in (["a/0", "a/1"], ["a/1", "a/0"])


def test_a_row_with_no_assistant_turn_is_dropped(config, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [*chats(2), {"messages": messages("alone")}])
    assert train_rows(config).stats.dropped == {"no trained token": 1}


def test_no_examples_at_all(config, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages("alone")}])
    with pytest.raises(ValueError, match=r"'a' has no examples in its train split"):
        train_rows(config)
    assert loader.prepare(config, split="validation") is None
    held_out = dataclasses.replace(config, holdout_every=2)
    with pytest.raises(ValueError, match=r"'a' has no examples in its validation split"):
        loader.prepare(held_out, split="validation")


@pytest.mark.parametrize("split", ["test", "valid", "train[:3]"])
def test_an_unknown_split_is_refused(config, split):
    with pytest.raises(ValueError, match=r"no split is named .*; expected one of \('train', 'val"):
        loader.prepare(config, split=split)


@pytest.fixture
def two(config, tmp_path, add_task) -> loader.DataConfig:
    """A mixture of "a" and "b", both of ten rows without a validation split of their own."""
    write_jsonl(tmp_path / "b.jsonl", chats(10))
    add_task("b", {"train": "b.jsonl"})
    train = registry.Mixture(name="ab", tasks={"a": None, "b": None})
    return dataclasses.replace(config, train=train, holdout_every=5)


def held_out(config, **changes) -> dict[str, int]:
    """The number of train rows of each task that are not trained on."""
    config = dataclasses.replace(config, **changes)
    assert list(data_checks.problems(config, kind="sft")) == []
    assert loader.prepare(config, split="validation").num_examples
    tasks = loader.prepare(config, split="train").stats.tasks
    return {counts.task: counts.raw_rows - counts.examples for counts in tasks}


def test_rows_are_held_out_only_for_the_validation_split_that_they_go_to(two, tmp_path, add_task):
    write_jsonl(tmp_path / "own.jsonl", chats(3))
    own = add_task("own", {"train": "a.jsonl", "validation": "own.jsonl"})
    assert held_out(two) == {"a": 2, "b": 2}
    assert held_out(two, validation="b") == {"a": 0, "b": 2}
    for validation in ("own", own, str(tmp_path / "own.jsonl")):
        assert held_out(two, validation=validation) == {"a": 0, "b": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"validation": "b", "holdout_every": None},
            r"validation = 'b' has no validation split: its tasks have none of their own, and hold",
        ),
        ({"holdout_every": 11}, r"holdout_every = 11 holds nothing out of {'a': 10, 'b': 10} rows"),
        ({"validation": "b", "holdout_every": 11}, r"holds nothing out of {'b': 10} rows"),
    ],
)
def test_a_validation_split_without_rows_is_found_before_encoding(two, encoded, changes, message):
    (problem,) = data_checks.problems(dataclasses.replace(two, **changes), kind="sft")
    assert re.match(f".*{message}", problem) and encoded == []


def test_a_file_of_both_splits_is_found_before_encoding(config, add_task):
    task = add_task("both", {"train": "rows.jsonl", "validation": "rows.jsonl"})
    (problem,) = data_checks.problems(dataclasses.replace(config, train=task), kind="sft")
    assert "rows.jsonl is trained on (both) and is the validation split, too (both)" in problem


def test_unexpected_counts_are_refused_unless_told_to_go_on(config):
    task = registry.TaskRegistry.get("a")
    registry.TaskRegistry.remove("a")
    registry.TaskRegistry.add(dataclasses.replace(task, expected=12))
    mixture = registry.Mixture(name="m", tasks={"a": None}, expected=11)
    with pytest.raises(ValueError) as raised:
        train_rows(config, train=mixture)
    assert "a: found 10 examples, expected 12 (-2)" in str(raised.value)
    assert "m: found 10 examples in all, expected 11 (-1)" in str(raised.value)
    assert "accept_counts = True" in str(raised.value)
    assert train_rows(config, train=mixture, accept_counts=True).num_examples == 10


def test_pairs_are_cut_side_by_side(config, tmp_path, add_task):
    pairs = [
        pair("Say: hen", "hen", "fox"),
        pair("Say: fox", "fox " * 100, "hen"),
        pair("hen " * 100, "hen", "fox"),
        pair("Say: owl", "owl", "owl "),
    ]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    add_task("p", {"train": "pairs.jsonl"}, kind="preference")
    rows = train_rows(config, train="p", packing="none")
    assert (rows.kind, rows.num_examples, rows.stats.cut) == ("preference", 2, 1)
    assert rows.stats.dropped == {"identical sides": 1, "prompt fills the row": 1}
    assert rows.in_order(1)["segment_ids"].sum(axis=1).tolist()[0] == 64
    dropped = train_rows(config, train="p", packing="none", truncation="drop")
    assert dropped.stats.dropped == {"identical sides": 1, "longer than max_length": 2}


def test_real_mixtures_are_served(shared_data, tmp_path):
    for name, options in (("real_small_sft", {}), ("real_small_dpo", {"packing": "none"})):
        config = loader.DataConfig(
            train=name,
            holdout_every=20,
            tokenizer=str(shared_data / "models" / "stories260K" / "tok512.model"),
            data_root=str(shared_data),
            max_length=512,
            cache_dir=str(tmp_path),
            **options,
        )
        rows = loader.prepare(config, split="validation")
        kept = rows.num_examples + sum(rows.stats.dropped.values())
        assert kept + sum(t.not_drawn for t in rows.stats.tasks) == sum(
            t.raw_rows + t.added_parts for t in rows.stats.tasks
        )
        (batch,) = [
            b
            for b in loader.batches(
                rows,
                batch_size=4,
                start_step=5,
                num_steps=6,
                process_index=0,
                process_count=1,
                workers=1,
            )
        ]
        assert batch["tokens"].max() < 512 and batch["loss_mask"].any()


def test_repeated_upstream_ids_are_kept_and_counted(config, tmp_path):
    rows = chats(4)
    for row, upstream in zip(rows, ["x_1", "x_2", "x_1", "x_1"], strict=True):
        row["about"] = {"id": upstream}
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = train_rows(config)
    assert found.num_examples == 4 and found.stats.tasks[0].repeated_ids == 2
    assert "a: 2 examples have the upstream id of an earlier one; kept" in str(found.stats)
    assert len({found.store.name(i) for i in range(4)}) == 4
