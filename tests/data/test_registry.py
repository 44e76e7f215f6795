"""Tasks and mixtures: names, splits, numbers of rows, and rows that break the rules."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_rows import chats, messages, pair, write_jsonl

from tulu_jax.data import components, examples, registry


@pytest.fixture
def mixture():
    added = []

    def add(name: str, tasks: dict) -> None:
        registry.MixtureRegistry.add(registry.Mixture(name=name, tasks=tasks))
        added.append(name)

    yield add
    for name in added:
        registry.MixtureRegistry.remove(name)


def load(task, *, split="train", rows=None, seed=0, data_root=None, holdout_every=None):
    drawing = examples.Drawing(
        split=split, amount=rows, seed=seed, holdout_every=holdout_every, data_root=data_root
    )
    return examples.load_examples(task, drawing)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"named 'real_smal_sft'; did you mean 'real_small_sft'"):
        registry.get_mixture_or_task("real_smal_sft")


def test_every_task_of_this_project_declares_a_version():
    tasks = map(registry.TaskRegistry.get, registry.TaskRegistry.names())
    assert [task.name for task in tasks if not task.version] == []


def test_a_name_is_taken_once(add_task):
    add_task("t", {"train": chats})
    with pytest.raises(ValueError, match=r"a task named 't' is already registered"):
        add_task("t", {"train": chats})


def test_mixture_names_tasks_and_numbers_of_rows(add_task, mixture):
    add_task("a", {"train": lambda: chats(30)})
    add_task("b", {"train": lambda: chats(30)})
    mixture("m", {"a": 7, "b": None})
    parts = [load(c.task, rows=c.amount, seed=c.seed) for c in components.of("m")]
    assert [len(part.examples) for part in parts] == [7, 30]
    assert parts[0].ids == sorted(parts[0].ids, key=lambda i: int(i.split("/")[1]))
    again = components.of("m")[0]
    assert load(again.task, rows=again.amount, seed=again.seed).ids == parts[0].ids
    assert load(again.task, rows=again.amount, seed=1).ids != parts[0].ids


def test_mixtures_nest_by_fractions_and_need_no_name_in_the_registry(add_task, mixture):
    add_task("a", {"train": lambda: chats(30)})
    add_task("b", {"train": lambda: chats(30)})
    mixture("ab", {"a": 10, "b": None})
    wanted = registry.Mixture(name="mine", tasks={"ab": 0.5}, seed=7)
    found = components.of(wanted)
    assert [(c.task.name, c.amount, c.seed) for c in found] == [("a", 5, 42), ("b", 0.5, 42)]
    assert [len(load(c.task, rows=c.amount).ids) for c in found] == [5, 15]
    assert components.kind_of(wanted) == "sft" and registry.name_of(wanted) == "mine"


def test_problems_of_a_mixture_are_listed_together(add_task, mixture):
    add_task("a", {"train": lambda: chats(30)})
    mixture("only_a", {"a": None})
    wanted = registry.Mixture(name="mine", tasks={"a": None, "only_a": 7, "limma": 1})
    with pytest.raises(ValueError) as raised:
        components.of(wanted)
    for part in (
        "7 rows of the mixture 'only_a' are asked for; of a mixture inside a mixture, take None",
        "no mixture or task is named 'limma'; did you mean 'lima'",
        "mixture 'mine' has tasks more than once: ['a']",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize("amount", [0, -1, 0.0, 1.5])
def test_amounts_are_all_rows_or_a_fraction(amount):
    with pytest.raises(ValueError, match=rf"m: {amount} of 'a'; expected None \(all\), a positive"):
        registry.Mixture(name="m", tasks={"a": amount})


def test_mixture_of_both_kinds_is_refused(add_task, mixture):
    add_task("a", {"train": lambda: chats(3)})
    add_task("b", {"train": lambda: []}, kind="preference")
    mixture("m", {"a": None, "b": None})
    with pytest.raises(ValueError, match=r"mixture 'm' has tasks of different kinds"):
        components.of("m")


def test_more_rows_than_there_are(add_task):
    task = add_task("a", {"train": lambda: chats(40)})
    with pytest.raises(ValueError, match=r"task 'a': 50 rows are asked for, but .* has 38"):
        load(task, rows=50, holdout_every=20)


def test_hold_out_is_every_twentieth_row_by_number(add_task):
    task = add_task("a", {"train": lambda: chats(45)})
    assert load(task, split="validation", holdout_every=20).ids == ["a/19", "a/39"]
    train = load(task, holdout_every=20)
    assert len(train.ids) == 43 and "a/19" not in train.ids and train.found == 45
    assert load(task, split="validation").ids == [] and len(load(task).ids) == 45


def test_a_validation_source_of_its_own(add_task):
    task = add_task("a", {"train": lambda: chats(20), "validation": lambda: chats(3)})
    assert load(task, split="validation").ids == [f"a.validation/{i}" for i in range(3)]
    assert len(load(task).ids) == 20


@pytest.mark.parametrize("split", ["test", "valid", "train[:3]", "Train", ""])
def test_an_unknown_split_is_no_train_split(add_task, split):
    task = add_task("a", {"train": lambda: chats(20), "validation": lambda: chats(3)})
    expected = rf"no split is named '{re.escape(split)}'; expected one of \('train', 'validation'\)"
    for ask in (
        lambda: load(task, split=split),
        lambda: task.source(split),
        lambda: list(examples.raw_rows(task, split, None)),
        lambda: examples.check_first_row(task, split=split, data_root=None),
        lambda: components.of("a", split=split),
    ):
        with pytest.raises(ValueError, match=expected):
            ask()


def test_sample_is_drawn_from_the_raw_rows_with_the_seed(add_task):
    task = add_task("a", {"train": lambda: chats(40)}, sample=5)
    assert len(load(task).ids) == 5 and load(task).ids == load(task).ids
    assert (load(task).not_drawn, load(task).found) == (35, 5)


def test_a_row_may_give_several_examples_each_accounted_for(add_task):
    def convert(row):
        count = int(row["messages"][0]["content"].split()[-1])
        parts = [row] * count + [registry.Dropped("last of a row")]
        return parts if count else registry.Dropped("empty")

    loaded = load(add_task("a", {"train": lambda: chats(4)}, convert=convert))
    assert loaded.ids == ["a/1.0", "a/2.0", "a/2.1", "a/3.0", "a/3.1", "a/3.2"]
    assert loaded.dropped == {"last of a row": 3, "empty": 1}
    assert (loaded.raw_rows, loaded.added_parts, loaded.not_drawn, loaded.found) == (4, 6, 0, 6)
    assert [entry["id"] for entry in loaded.aside] == ["a/0", "a/1.1", "a/2.2", "a/3.3"]


def test_malformed_rows_are_counted_and_the_first_named(add_task):
    rows = chats(20) + [{"messages": []}] * 7
    task = add_task("a", {"train": lambda: rows})
    with pytest.raises(
        ValueError, match=r"'a': 7 of 27 rows are malformed:\n  row a/20: f"
    ) as raised:
        load(task)
    assert str(raised.value).endswith(
        "row a/24: found messages []; expected a non-empty list\n  and 2 more"
    )


def test_files_by_glob_and_column(add_task, tmp_path):
    rows = [{**row, "dataset": "xy"[i % 2]} for i, row in enumerate(chats(6))]
    write_jsonl(tmp_path / "p-2.jsonl", rows[4:])
    write_jsonl(tmp_path / "p-1.jsonl", rows[:4])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")

    def convert(row):
        return {"messages": row["messages"], "about": {"dataset": row["dataset"]}}

    for name, path in (("a", "p-*.jsonl"), ("b", "*.parquet")):
        files = registry.Files(paths=(path,), where={"dataset": "y"})
        task = add_task(name, {"train": files}, convert=convert)
        loaded = load(task, data_root=str(tmp_path))
        assert loaded.ids == [f"{name}/{i}" for i in range(3)]
        assert [e["messages"][0]["content"] for e in loaded.examples] == [
            f"question {i}" for i in (1, 3, 5)
        ]
        assert {e["about"]["dataset"] for e in loaded.examples} == {"y"}


def test_a_hub_that_cannot_be_reached(add_task, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    task = add_task("a", {"train": registry.Files(paths=("x/*.parquet",), hub="nobody/nothing")})
    with pytest.raises(FileNotFoundError) as raised:
        load(task, data_root=str(tmp_path))
    for part in (
        f"found no {tmp_path}/x/*.parquet, and the hub set 'nobody/nothing', split train could not",
        "Download its files, place them as",
        "data_root (--gin.DATA_ROOT)",
    ):
        assert part in str(raised.value)


def test_a_missing_file_says_where_it_comes_from(add_task, tmp_path):
    task = add_task("a", {"train": "x.jsonl"}, origin="a far place")
    with pytest.raises(FileNotFoundError, match=r"found no .*x.jsonl; it comes from a far place"):
        load(task, data_root=str(tmp_path))


def test_filters_and_converters_drop_by_reason(add_task):
    short = registry.Filter(name="too short", keep=lambda e: len(e["messages"][0]["content"]) > 10)

    def convert(row):
        is_three = row["messages"][0]["content"] == "question 3"
        return registry.Dropped("is three") if is_three else row

    task = add_task("a", {"train": lambda: chats(12)}, convert=convert, filters=(short,))
    loaded = load(task)
    assert loaded.dropped == {"is three": 1, "too short": 9} and loaded.ids == ["a/10", "a/11"]
    aside = {entry["id"]: entry for entry in loaded.aside}
    assert aside["a/3"] == {"id": "a/3", "reason": "is three"}
    assert aside["a/4"]["example"] == chats(5)[4]


def test_pairs_that_say_nothing_are_dropped(add_task):
    rows = [pair("p", "a", "b"), pair("p", "a", " a\n"), pair("p", " ", "b"), pair("p", "a", "")]
    rows += [pair("p", "b", "a"), pair("p", "a", "b"), pair("q", "a", "b")]
    task = add_task("a", {"train": lambda: rows}, kind="preference")
    assert load(task).dropped == {"identical sides": 1, "empty side": 2, "duplicate pair": 1}
    assert load(task).ids == ["a/0", "a/4", "a/6"]


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
        (pair("p", "a", "b") | {"chosen": messages("x")}, r"chosen ends with role 'user'"),
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
        ({"sample": 0}, r"a: sample = 0; expected a positive number of rows"),
        ({"sources": {"test": "x"}}, r"a: sources has no 'train'"),
    ],
)
def test_task_that_breaks_its_rules(add_task, options, message):
    with pytest.raises(ValueError, match=message):
        add_task("a", **({"sources": {"train": "x"}} | options))
