"""Tasks and mixtures: names, splits, numbers of rows, and rows that break the rules."""

import pytest
from raw_rows import chats, messages, pair, write_jsonl

from tulu_jax.data import examples, registry


@pytest.fixture
def mixture():
    added = []

    def add(name: str, tasks: dict) -> None:
        registry.MixtureRegistry.add(registry.Mixture(name=name, tasks=tasks))
        added.append(name)

    yield add
    for name in added:
        registry.MixtureRegistry.remove(name)


def load(task, *, split="train", rows=None, seed=0, data_root=None):
    return examples.load_examples(task, split=split, rows=rows, seed=seed, data_root=data_root)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"named 'real_smal_sft'; did you mean 'real_small_sft'"):
        registry.get_mixture_or_task("real_smal_sft")


def test_a_name_is_taken_once(add_task):
    add_task("t", {"train": chats})
    with pytest.raises(ValueError, match=r"a task named 't' is already registered"):
        add_task("t", {"train": chats})


def test_mixture_names_tasks_and_numbers_of_rows(add_task, mixture):
    add_task("a", {"train": lambda: chats(30)}, holdout_every=None)
    add_task("b", {"train": lambda: chats(30)}, holdout_every=None)
    mixture("m", {"a": 7, "b": None})
    parts = [load(task, rows=rows, seed=seed) for task, rows, seed in registry.components("m")]
    assert [len(part.examples) for part in parts] == [7, 30]
    assert parts[0].ids == sorted(parts[0].ids, key=lambda i: int(i.split("/")[1]))
    again = registry.components("m")[0]
    assert load(again[0], rows=again[1], seed=again[2]).ids == parts[0].ids
    assert load(again[0], rows=again[1], seed=1).ids != parts[0].ids


def test_mixture_of_both_kinds_is_refused(add_task, mixture):
    add_task("a", {"train": lambda: chats(3)})
    add_task("b", {"train": lambda: []}, kind="preference")
    mixture("m", {"a": None, "b": None})
    with pytest.raises(ValueError, match=r"mixture 'm' has tasks of different kinds"):
        registry.components("m")


def test_more_rows_than_there_are(add_task):
    task = add_task("a", {"train": lambda: chats(40)})
    with pytest.raises(ValueError, match=r"task 'a': 50 rows are asked for, but .* has 38"):
        load(task, rows=50)


def test_hold_out_is_every_twentieth_row_by_number(add_task):
    task = add_task("a", {"train": lambda: chats(45)})
    assert load(task, split="validation").ids == ["a/19", "a/39"]
    assert len(load(task).ids) == 43 and "a/19" not in load(task).ids


def test_a_validation_source_of_its_own(add_task):
    task = add_task("a", {"train": lambda: chats(20), "validation": lambda: chats(3)})
    assert load(task, split="validation").ids == [f"a.validation/{i}" for i in range(3)]
    assert len(load(task).ids) == 20


def test_sample_is_drawn_from_the_raw_rows_with_the_seed(add_task):
    task = add_task("a", {"train": lambda: chats(40)}, sample=5, holdout_every=None)
    assert len(load(task).ids) == 5 and load(task).ids == load(task).ids
    assert load(task).not_drawn == 35


def test_filters_and_converters_drop_by_reason(add_task):
    short = registry.Filter(name="too short", keep=lambda e: len(e["messages"][0]["content"]) > 10)

    def convert(row):
        is_three = row["messages"][0]["content"] == "question 3"
        return registry.Dropped("is three") if is_three else row

    task = add_task(
        "a", {"train": lambda: chats(12)}, convert=convert, filters=(short,), holdout_every=None
    )
    loaded = load(task)
    assert loaded.dropped == {"is three": 1, "too short": 9} and loaded.ids == ["a/10", "a/11"]


def test_pairs_that_say_nothing_are_dropped(add_task):
    rows = [pair("p", "a", "b"), pair("p", "a", " a\n"), pair("p", " ", "b"), pair("p", "a", "")]
    task = add_task("a", {"train": lambda: rows}, kind="preference")
    assert load(task).dropped == {"identical sides": 1, "empty side": 2}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"row a/1: found messages \[\]; expected a non-empty list"),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            r"row a/1, message 0: unknown role 'human'; expected one of \('system', 'user'",
        ),
        ({"text": "x"}, r"row a/1: converted to \['text'\]; expected \['messages'\]"),
        ({"messages": "x"}, r"row a/1: found messages 'x'; expected a non-empty list"),
        ({"messages": [{"role": "user", "content": None}]}, r"content is a NoneType; expected a"),
    ],
)
def test_bad_row_is_named(add_task, tmp_path, row, message):
    write_jsonl(tmp_path / "r.jsonl", [*chats(1), row])
    task = add_task("a", {"train": "r.jsonl"})
    with pytest.raises(ValueError, match=message):
        load(task, data_root=str(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": messages("p")}, r"converted to \['prompt'\]; expected \['chosen', 'prompt'"),
        (pair("p", "a", "b") | {"chosen": messages("x")}, r"a side ends with role 'user'"),
        (
            pair("p", "a", "b") | {"rejected": messages("x", "b")},
            r"row a/0: the sides differ before their last message",
        ),
    ],
)
def test_bad_pair_is_named(add_task, row, message):
    task = add_task("a", {"train": lambda: [row]}, kind="preference")
    with pytest.raises(ValueError, match=message):
        load(task)


def test_relative_path_without_a_data_root(add_task):
    task = add_task("a", {"train": "r.jsonl"})
    with pytest.raises(ValueError, match=r"reads 'r.jsonl' below the data root, and none is given"):
        load(task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dpo"}, r"kind = 'dpo': expected one of \['preference', 'sft'\]"),
        ({"holdout_every": 1}, r"a: holdout_every = 1; expected None or 2 up"),
        ({"sample": 0}, r"a: sample = 0; expected a positive number of rows"),
        ({"sources": {"test": "x"}}, r"a: sources has no 'train'"),
    ],
)
def test_task_that_breaks_its_rules(add_task, options, message):
    with pytest.raises(ValueError, match=message):
        add_task("a", **({"sources": {"train": "x"}} | options))
