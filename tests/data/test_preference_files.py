"""Preference tasks on files: upstream layouts, real rows, and rows with anything in them."""

import copy
import gzip
import json
import pathlib

import hypothesis
import pyarrow
import pytest
from hypothesis import strategies as st
from preference_rows import LAYOUTS, drawing, of_rows
from pyarrow import parquet

from tulu_jax.data import examples, preferences, registry

UPSTREAM = {  # task: layout of its rows, files of the train split, files of the validation split
    "ultrafeedback_h4_first": (
        "h4",
        ["data/train_prefs-00000-of-00001-17309c769bfe5733.parquet"],
        ["data/test_prefs-00000-of-00001-b403a43ee1c9b23c.parquet"],
    ),
    "ultrafeedback_h4_second": (
        "h4",
        ["data/train_prefs-00000-of-00001.parquet"],
        ["data/test_prefs-00000-of-00001.parquet"],
    ),
    "ultrafeedback_ai2_cleaned": (
        "h4",
        ["data/train_prefs-00000-of-00001.parquet"],
        ["data/test_prefs-00000-of-00001.parquet"],
    ),
    "ultrafeedback_argilla_cleaned": ("argilla", ["data/train-00000-of-00001.parquet"], []),
    "ultrafeedback_raw": ("ultrafeedback", ["evol_instruct.jsonl", "flan.jsonl"], []),
    "hh_rlhf": (
        "hh",
        [f"{part}/train.jsonl.gz" for part in preferences.HH_PARTS],
        [f"{part}/test.jsonl.gz" for part in preferences.HH_PARTS],
    ),
    "nectar": ("nectar", ["data/rlaif.parquet"], []),
    "orca_dpo_pairs": ("orca", ["orca_rlhf.jsonl"], []),
    "stack_exchange_paired": (
        "stack_exchange",
        ["data/reward/train-00000-of-00002.parquet", "data/reward/train-00001-of-00002.parquet"],
        [],
    ),
}


def write(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


@pytest.mark.parametrize("folder", UPSTREAM)
def test_files_of_the_upstream_layout_are_read(folder, tmp_path):
    layout, train, validation = UPSTREAM[folder]
    row = LAYOUTS[layout][1]
    for name in train + validation:
        write(tmp_path / "preference_raw" / folder / name, [row])
    tasks = ["ultrafeedback_first"] if folder == "ultrafeedback_raw" else [folder]
    for task in map(registry.TaskRegistry.get, tasks):
        for split, files in {"train": train, "validation": validation}.items():
            if not files:
                continue
            found = examples.load_examples(task, drawing(split=split, data_root=str(tmp_path)))
            assert found.raw_rows == len(files)
            assert len(found.examples) == min(len(files), 1)  # the others are the same pair


def test_the_first_revision_keeps_its_ties_and_the_second_drops_them(tmp_path):
    tied = LAYOUTS["h4"][1] | {"score_chosen": 8.0, "score_rejected": 8.0}
    for name, kept in (("ultrafeedback_h4_first", 1), ("ultrafeedback_h4_second", 0)):
        write(tmp_path / "preference_raw" / name / "data" / "train_prefs-0.parquet", [tied])
        task = registry.TaskRegistry.get(name)
        found = examples.load_examples(task, drawing(data_root=str(tmp_path)))
        assert len(found.examples) == kept and sum(found.dropped.values()) == 1 - kept


def test_missing_files_say_what_to_download(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it is asked on
    task = registry.TaskRegistry.get("ultrafeedback_h4_first")
    with pytest.raises(FileNotFoundError, match=rf"train_prefs-.*revision {preferences.H4_FIRST}"):
        examples.load_examples(task, drawing(data_root=str(tmp_path)))


REAL = {  # raw rows; examples; dropped
    "ultrafeedback_binarized": (
        500,
        445,
        {"equal scores": 53, "empty side": 1, "identical sides": 1},
    ),
    "hh_rlhf_sample": (400, 399, {"empty side": 1}),
    "orca_dpo_pairs_sample": (190, 190, {}),
    "stack_exchange_sample": (17, 17, {}),
    "sharegpt_pairs_sample": (200, 198, {"duplicate pair": 2}),
    "alpaca_pairs_sample": (400, 398, {"identical sides": 2}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_rows_are_all_accounted_for(shared_data, name):
    task = registry.TaskRegistry.get(name)
    found = examples.load_examples(task, drawing(data_root=str(shared_data)))
    assert (found.raw_rows, len(found.examples), found.dropped) == REAL[name]
    assert len(found.aside) == sum(found.dropped.values()) and found.not_drawn == 0
    assert all(example["prompt"][-1]["role"] == "user" for example in found.examples)


def test_real_held_out_pairs_are_in_no_train_pair(shared_data):
    task = registry.TaskRegistry.get("ultrafeedback_binarized")
    options = {"data_root": str(shared_data), "holdout_every": 5}
    train = examples.load_examples(task, drawing(**options))
    held_out = examples.load_examples(task, drawing(split="validation", **options))
    assert not set(train.ids) & set(held_out.ids)
    assert len(train.examples) + len(held_out.examples) == REAL["ultrafeedback_binarized"][1]


SURROGATE = st.characters()  # lone surrogates among them
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(SURROGATE, max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
COLUMNS = sorted({column for _, row in LAYOUTS.values() for column in row})
ROWS = st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=8), JSON, max_size=8)


TEXTS = st.text(SURROGATE, max_size=12) | st.sampled_from(
    [
        "",
        " \n",
        "p",
        "good",
        "bad",
        "\n\nHuman: p\n\nAssistant: ",
        "\n\nHuman:",
        "N/A",
        "system",
        "gpt",
    ]
)
NUMBERS = st.sampled_from([0, 1, 1.0, 2.0, 3, 8.0, 10.0, -1.5])


def mutated(draw, value):
    """`value` with one thing in it replaced (by its like, or by anything), removed or repeated."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 3)):
        value = copy.copy(value)
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        change = draw(st.sampled_from(["inside", "inside", "remove", "repeat"]))
        if change == "remove":
            del value[key]
        elif change == "repeat" and isinstance(value, list):
            value.append(value[key])
        else:
            value[key] = mutated(draw, value[key])
        return value
    alike = TEXTS if isinstance(value, str) else NUMBERS if isinstance(value, int | float) else JSON
    return draw(alike if draw(st.integers(0, 3)) else JSON)


def check_all_accounted_for(convert, row: dict) -> None:
    try:
        found = of_rows(convert, [row])
    except ValueError as error:
        assert "1 of 1 rows are malformed" in str(error)
        return
    assert 1 + found.added_parts == len(found.examples) + sum(found.dropped.values())
    assert found.not_drawn == 0


@pytest.mark.parametrize("name", LAYOUTS)
@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(data=st.data())
def test_any_row_gives_examples_a_reason_or_a_named_error(name, data):
    convert, row = LAYOUTS[name]
    check_all_accounted_for(convert, data.draw(ROWS))
    for _ in range(data.draw(st.integers(1, 3))):
        row = mutated(data.draw, row)
        if not isinstance(row, dict):
            return
        check_all_accounted_for(convert, row)


def real_rows(shared_data) -> list[tuple]:
    """(converter, row) of the first row of every real file."""
    folder = shared_data / "preference_raw"
    raw = json.loads((folder / "ultrafeedback" / "raw_schema_example.json").read_text())
    rows = [(LAYOUTS["ultrafeedback_aspects"][0], raw)]
    for name in REAL:
        task = registry.TaskRegistry.get(name)
        rows.append((task.convert, next(examples.raw_rows(task, "train", str(shared_data)))))
    return rows


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(data=st.data())
def test_mutated_real_rows(shared_data, data):
    convert, row = data.draw(st.sampled_from(real_rows(shared_data)))
    row = mutated(data.draw, row)
    if isinstance(row, dict):
        check_all_accounted_for(convert, row)
