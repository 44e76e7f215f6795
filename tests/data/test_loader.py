"""Batches: a pure function of (fingerprint, seed, k), over processes, threads and restarts."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from encoded_chats import encode_conversation

from tulu_jax.data import chat, data_checks, loader, store
from tulu_jax.data.sources import tiny_instructions

SFT_KEYS = ["loss_mask", "positions", "segment_ids", "targets", "tokens"]
ALONE = {"process_index": 0, "process_count": 1}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sft_config(tokenizer_dir, cache_dir) -> loader.DataConfig:
    return loader.DataConfig(
        train="tulu_tiny", tokenizer=tokenizer_dir, max_length=128, cache_dir=cache_dir, seed=3
    )


@pytest.fixture(scope="module")
def sft_rows(sft_config) -> loader.Rows:
    return loader.prepare(sft_config, split="train")


@pytest.fixture(scope="module")
def held_out(sft_config) -> loader.Rows:
    return loader.prepare(sft_config, split="validation")


@pytest.fixture(scope="module")
def pair_rows(tokenizer_dir, cache_dir) -> loader.Rows:
    config = loader.DataConfig(
        train="tulu_tiny_preference",
        tokenizer=tokenizer_dir,
        max_length=64,
        packing="none",
        cache_dir=cache_dir,
    )
    return loader.prepare(config, split="validation")


def read(rows, *, start=0, stop=4, workers=2, batch_size=8, index=0, count=1) -> list[dict]:
    return list(
        loader.batches(
            rows,
            batch_size=batch_size,
            start_step=start,
            num_steps=stop,
            process_index=index,
            process_count=count,
            workers=workers,
        )
    )


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_contract_of_a_supervised_batch(sft_rows):
    (batch,) = read(sft_rows, stop=1)
    assert sorted(batch) == SFT_KEYS
    assert all(value.shape == (8, 128) for value in batch.values())
    assert {str(batch[key].dtype) for key in SFT_KEYS if key != "loss_mask"} == {"int32"}
    assert batch["loss_mask"].dtype == bool
    assert not batch["loss_mask"][batch["segment_ids"] == 0].any()
    starts = np.diff(batch["segment_ids"], axis=1, prepend=0) > 0
    assert (batch["tokens"][starts] == 1).all() and (batch["positions"][starts] == 0).all()


def test_contract_of_a_preference_batch(pair_rows):
    (batch,) = read(pair_rows, stop=1)
    assert sorted(batch) == ["example", *SFT_KEYS]
    assert all(batch[key].shape == (8, 2, 64) for key in SFT_KEYS)
    assert batch["example"].shape == (8,) and batch["example"].dtype == np.int32
    tokenizer = chat.load_tokenizer(pair_rows.config.tokenizer)
    for i in range(8):
        chosen, rejected = (
            tokenizer.decode(batch["targets"][i, side][batch["loss_mask"][i, side]])
            for side in (loader.CHOSEN, loader.REJECTED)
        )
        assert chosen == f"Sure: {rejected}."
        in_order = pair_rows.in_order(int(batch["example"][i]))
        np.testing.assert_array_equal(in_order["tokens"], batch["tokens"][i])


def test_contract_of_a_packed_preference_batch(pair_rows):
    rows = loader.prepare(
        dataclasses.replace(pair_rows.config, packing="best_fit", max_length=128),
        split="validation",
    )
    (batch,) = read(rows, stop=1)
    assert sorted(batch) == ["branches", "example", *SFT_KEYS]
    assert all(batch[key].shape == (8, 128) for key in ["branches", *SFT_KEYS])
    assert batch["example"].shape == (8, rows.pairs_per_row) and batch["example"].dtype == np.int32
    assert set(np.unique(batch["branches"])) == {0, 1, 2}
    pairs = (batch["example"] >= 0).sum(axis=1)
    np.testing.assert_array_equal(batch["segment_ids"].max(axis=1), pairs)
    assert rows.rows_per_epoch < pair_rows.rows_per_epoch / 3
    tokenizer = chat.load_tokenizer(rows.config.tokenizer)
    for i in range(8):
        for segment, example in enumerate(batch["example"][i, : pairs[i]], 1):
            here = (batch["segment_ids"][i] == segment) & batch["loss_mask"][i]
            chosen, rejected = (
                tokenizer.decode(batch["targets"][i][here & (batch["branches"][i] == branch)])
                for branch in (1, 2)
            )
            assert chosen == f"Sure: {rejected}."
            assert rows.example_ids(i)[segment - 1] == rows.store.name(int(example))
    every = [batch["example"] for batch in loader.eval_batches(rows, batch_size=8, **ALONE)]
    ids = np.concatenate([example[example >= 0] for example in every])
    assert sorted(ids.tolist()) == list(range(rows.num_examples))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_read_the_slices_of_one_global_batch(sft_rows, count):
    whole = read(sft_rows)
    parts = [read(sft_rows, index=i, count=count) for i in range(count)]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in SFT_KEYS}
        for step in range(len(whole))
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_number_of_threads_changes_nothing(sft_rows, workers):
    assert_same(read(sft_rows, workers=workers, stop=12), read(sft_rows, stop=12))


def test_resuming_needs_the_step_alone(sft_config, sft_rows):
    """The stream goes on where it stopped (axolotl#406, MaxText with Tunix), also past an epoch."""
    last = sft_rows.rows_per_epoch // 64 + 3
    whole = read(sft_rows, stop=last, batch_size=64)
    reopened = loader.prepare(sft_config, split="train")
    for start in (1, last - 2):
        assert_same(read(reopened, start=start, stop=last, batch_size=64), whole[start:])
    assert read(reopened, start=last, stop=last) == []


DIGESTS = """
import hashlib, json, sys
from tulu_jax.data import loader
rows = loader.prepare(loader.DataConfig(**json.loads(sys.argv[1])), split="train")
start, stop, index, count, workers = map(int, sys.argv[2:])
options = {"start_step": start, "num_steps": stop, "workers": workers, "batch_size": 8}
for batch in loader.batches(rows, process_index=index, process_count=count, **options):
    for row in range(len(batch["tokens"])):
        content = b"".join(batch[key][row].tobytes() for key in sorted(batch))
        print(hashlib.sha256(content).hexdigest())
"""


@pytest.mark.parametrize("task", ["tulu_tiny", "tulu_tiny_preference"])
def test_restarted_processes_of_any_number_give_the_same_rows(sft_config, cache_dir, task):
    """Real processes, restarted at other steps, with other numbers of workers and of processes."""
    config = dataclasses.replace(sft_config, train=task, max_length=128)
    fields = json.dumps(dataclasses.asdict(config))

    def digests(*arguments) -> list[str]:
        command = [sys.executable, "-c", DIGESTS, fields, *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return run.stdout.split()

    whole = digests(0, 6, 0, 1, 2)
    assert len(set(whole)) == 48
    assert digests(4, 6, 0, 1, 0) == whole[32:]
    halves = [digests(2, 5, index, 2, 1 + 2 * index) for index in (0, 1)]
    assert [
        half[step * 4 + row] for step in range(3) for half in halves for row in range(4)
    ] == whole[16:40]


def test_an_epoch_visits_every_example_once(sft_rows):
    size = sft_rows.rows_per_epoch
    for epoch in (0, 1):
        rows = [sft_rows.examples(i) for i in range(epoch * size, (epoch + 1) * size)]
        assert sorted(np.concatenate(rows)) == list(range(sft_rows.num_examples))
    assert sft_rows.num_examples == 16000 and sft_rows.num_tokens == sft_rows.stats.tokens


def test_each_segment_is_its_conversation_encoded_alone(sft_rows):
    tokenizer = chat.load_tokenizer(sft_rows.config.tokenizer)
    conversations = tiny_instructions.sft_rows("train")
    for index in (0, 1, sft_rows.rows_per_epoch + 7):
        row = sft_rows.row(index)
        for segment, example_id in enumerate(sft_rows.example_ids(index), 1):
            number = int(example_id.removeprefix("tulu_tiny/"))
            alone = encode_conversation(conversations[number]["messages"], tokenizer, chat="spec")
            here = row["segment_ids"] == segment
            for key in ("tokens", "targets", "loss_mask"):
                np.testing.assert_array_equal(row[key][here], getattr(alone, key))


def test_rows_of_any_epoch_in_any_order(held_out):
    size = held_out.rows_per_epoch
    first = [held_out.example_ids(epoch * size) for epoch in range(6)]
    assert first == [held_out.example_ids(epoch * size) for epoch in reversed(range(6))][::-1]
    assert len({tuple(ids) for ids in first}) == 6


def test_seeds_differ_and_content_does_not(sft_config, sft_rows):
    other = loader.prepare(dataclasses.replace(sft_config, seed=4), split="train")
    assert other.fingerprint == sft_rows.fingerprint
    assert other.example_ids(0) != sft_rows.example_ids(0)
    assert sft_rows.example_ids(0)[0].startswith("tulu_tiny/")


def test_trained_tokens_of_an_epoch_are_the_counted_ones(held_out):
    batches = list(loader.eval_batches(held_out, batch_size=8, **ALONE))
    assert sum(b["loss_mask"].sum() for b in batches) == held_out.num_trained_tokens
    assert sum((b["segment_ids"] > 0).sum() for b in batches) == held_out.num_tokens


def test_eval_is_one_pass_in_a_fixed_order_padded_with_empty_rows(pair_rows):
    size = pair_rows.rows_per_epoch
    batches = list(loader.eval_batches(pair_rows, batch_size=50, **ALONE))
    examples = np.concatenate([b["example"] for b in batches])
    assert examples.tolist() == list(range(size)) + [loader.NO_EXAMPLE] * (-size % 50)
    assert len(batches) == loader.num_eval_batches(pair_rows, batch_size=50)
    assert not any(batches[-1][key][size % 50 :].any() for key in SFT_KEYS)
    halves = [
        list(loader.eval_batches(pair_rows, batch_size=50, process_index=i, process_count=2))
        for i in (0, 1)
    ]
    joined = [np.concatenate([a["example"], b["example"]]) for a, b in zip(*halves, strict=True)]
    assert np.concatenate(joined).tolist() == examples.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_is_not_the_end_of_the_data(sft_config, workers, monkeypatch):
    """MaxText with Tunix ends the run as if the data had ended; here the caller gets it."""
    rows = loader.prepare(sft_config, split="train")
    bad = int(rows.examples(3 * 8)[0])
    sides = store.ExampleStore.sides

    def sides_of_an_unreadable_example(self, index):
        if index == bad:
            raise OSError("the disk went away")
        return sides(self, index)

    monkeypatch.setattr(store.ExampleStore, "sides", sides_of_an_unreadable_example)
    stream = iter(
        loader.batches(rows, batch_size=8, start_step=0, num_steps=6, workers=workers, **ALONE)
    )
    for _ in range(3):
        next(stream)
    with pytest.raises(OSError, match="the disk went away"):
        next(stream)


def test_a_stream_can_be_left_in_the_middle(sft_rows):
    stream = iter(
        loader.batches(sft_rows, batch_size=8, start_step=0, num_steps=10**9, workers=2, **ALONE)
    )
    next(stream)
    del stream


def test_batch_that_processes_cannot_divide(sft_rows):
    with pytest.raises(ValueError, match=r"batch_size = 8, process 0 of 3: expected a batch size"):
        read(sft_rows, count=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": "tulu_tinny"},
            r"no mixture or task is named 'tulu_tinny'; did you mean 'tulu_t",
        ),
        ({"packing": "bestfit"}, r"packing = 'bestfit'.*did you mean 'best_fit'"),
        ({"truncation": "left"}, r"truncation = 'left': expected one of \['cut', 'drop', 's"),
        ({"chat": "papers"}, r"chat = 'papers': expected one of .*; did you mean 'paper'"),
        ({"holdout_every": 1}, r"holdout_every = 1: expected None, or 2 or more"),
        ({"max_length": 1}, r"max_length = 1: expected 2 or more"),
        (
            {"train": "tulu_tiny_preference", "truncation": "split"},
            r"truncation = 'split' with pairs, which cannot be split",
        ),
        ({"validation": "ultrafeedback_binarized"}, r"train and validation are of different kinds"),
    ],
)
def test_misspelt_configuration(sft_config, options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sft_config, **options)


def test_problems_of_a_run_are_listed_together(sft_config, tmp_path):
    config = dataclasses.replace(
        sft_config, train="lima", tokenizer=str(tmp_path), data_root=str(tmp_path)
    )
    assert list(data_checks.problems(sft_config, kind="sft")) == []
    found = list(data_checks.problems(config, kind="preference"))
    assert len(found) == 3
    assert "the objective trains on preference data; 'lima' is sft data" in found[0]
    assert "found no tokenizer" in found[1]
    assert found[2].startswith("lima (train): task 'lima': found no ")
    assert data_checks.vocab_size(config) is None


def test_importing_data_loads_no_heavy_library():
    heavy = [
        "datasets",
        "transformers",
        "grain",
        "tokenizers",
        "pyarrow",
        "torch",
        "tensorflow",
        "jax",
        "beartype",
    ]
    code = (
        "import sys, tulu_jax.data.loader, tulu_jax.data.tokenizer_training\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    root = pathlib.Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"
