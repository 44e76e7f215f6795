"""The real seqio library gives our examples, row for row, for every task and mixture with rows."""

import re

import numpy as np
import pytest
from encoded_chats import encode_conversation
from raw_rows import chats, messages, write_jsonl

from tulu_jax.data import chat, components, examples, loader, registry
from tulu_jax.data.sources import readers

seqio = pytest.importorskip("seqio", reason="the extra 'seqio' is not installed")
import tensorflow as tf  # noqa: E402

from tulu_jax.data import seqio_bridge  # noqa: E402 -- imports seqio

FIELDS = ("tokens", "targets", "loss_mask")
SIDES = {"sft": ("",), "preference": ("chosen_", "rejected_")}


@pytest.fixture(autouse=True)
def empty_registries():
    yield
    seqio.TaskRegistry.reset()
    seqio.MixtureRegistry.reset()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("seqio_cache"))


@pytest.fixture
def options(tokenizer_dir, tmp_path, cache_dir) -> dict:
    return {
        "tokenizer": tokenizer_dir,
        "max_length": 96,
        "data_root": str(tmp_path),
        "accept_counts": True,
        "cache_dir": cache_dir,
    }


def ours(name: str, split: str, options: dict) -> dict[str, list[np.ndarray]]:
    """The fields of what the loader serves as rows 0, 1, … of its fixed order, padding cut off."""
    rows = loader.prepare(loader.DataConfig(train=name, packing="none", **options), split=split)
    found = {prefix + field: [] for prefix in SIDES[rows.kind] for field in FIELDS}
    for index in range(rows.rows_per_epoch):
        row = rows.in_order(index)
        for side, prefix in enumerate(SIDES[rows.kind]):
            one = (
                row
                if rows.kind == "sft"
                else {f: values[side] for f, values in row.items() if f != "example"}
            )
            length = int((one["segment_ids"] > 0).sum())
            for field in FIELDS:
                found[prefix + field].append(one[field][:length])
    return found


def theirs(name: str, split: str, options: dict, **more):
    """The `tf.data.Dataset` that seqio gives."""
    provider = seqio.get_mixture_or_task(name)
    lengths = dict.fromkeys(provider.output_features, options["max_length"])
    return provider.get_dataset(sequence_length=lengths, split=split, shuffle=False, **more)


def rows_of(dataset) -> list[dict[str, np.ndarray]]:
    return list(dataset.as_numpy_iterator())


def check_same(name: str, options: dict) -> int:
    """Compares every split of `name`; the number of rows."""
    count = 0
    for split in seqio.get_mixture_or_task(name).splits:
        try:
            expected = ours(name, split, options)
        except (ValueError, FileNotFoundError) as error:
            with pytest.raises(type(error), match=re.escape(str(error).split("\n")[0])):
                theirs(name, split, options)
            continue
        batches = list(theirs(name, split, options).ragged_batch(1024))
        assert batches and batches[0].keys() == expected.keys()
        for field, rows in expected.items():
            lengths = np.concatenate([batch[field].row_lengths() for batch in batches])
            values = np.concatenate([batch[field].flat_values for batch in batches])
            assert values.dtype == rows[0].dtype
            np.testing.assert_array_equal(lengths, [len(row) for row in rows])
            np.testing.assert_array_equal(values, np.concatenate(rows))
        count += len(rows)
    return count


def has_rows(name: str, root: str) -> bool:
    def found(source) -> bool:
        if callable(source):
            return True
        paths = (source,) if isinstance(source, str) else source.paths
        return all(readers.find(f"{root}/{path}") for path in paths)

    return all(found(component.task.sources["train"]) for component in components.of(name))


@pytest.mark.parametrize("part", range(4))
def test_every_task_and_mixture_with_real_rows(shared_data, options, monkeypatch, tmp_path, part):
    llama = str(shared_data / "tokenizer" / "llama2")
    monkeypatch.setenv("TULU_JAX_LLAMA_TOKENIZER", llama)
    chat.load_tokenizer(llama).backend.save(str(tmp_path / "tokenizer.json"))  # loads faster
    options |= {
        "tokenizer": str(tmp_path),
        "data_root": str(shared_data),
        "max_length": 512,
        "holdout_every": 20,
    }
    seqio_bridge.register(**options)
    names = [
        name
        for name in registry.all_names()
        if has_rows(name, str(shared_data)) and not name.startswith("tulu_tiny")
    ]
    assert {"real_small_sft", "real_mixed_dpo", "sharegpt_sample", "flan_cot"} <= set(names)
    counts = {name: check_same(name, options) for name in names[part::4]}
    assert sum(count > 0 for count in counts.values()) > 4


def test_tulu_tiny(options):
    seqio_bridge.register(**options)
    assert check_same("tulu_tiny", options) > 16000
    assert check_same("tulu_tiny_preference", options) > 1500


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_published_mixtures(version, options, tmp_path):
    """A few rows of each component in the published layout: components, ablations, the whole."""
    mixture = f"tulu_{version}_sft"
    columns = [c.task.name.split(".", 1)[1] for c in components.of(mixture)]
    rows = [
        {"dataset": column, "id": f"{column}_{i}", "messages": messages(f"{column} {i}?", "Yes")}
        for i in range(4)
        for column in columns
    ]
    (tmp_path / f"tulu-{version}-sft-mixture").mkdir()
    write_jsonl(tmp_path / f"tulu-{version}-sft-mixture" / "train.jsonl", rows)
    seqio_bridge.register(**options)
    names = [name for name in registry.all_names() if has_rows(name, str(tmp_path))]
    published = [n for n in names if n.startswith(f"tulu_{version}") or n == "sharegpt_only"]
    assert mixture in published and len(published) > len(columns)
    assert {check_same(name, options) for name in published} >= {4, 4 * len(columns)}


def test_rows_are_the_encoded_conversations_themselves(options, tmp_path, add_task, tokenizer):
    """Against the chat encoder, without loader or cache."""
    rows = [*chats(5), {"messages": messages("a", "b", "c", "d " * 99)}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    task = add_task("encoded", {"train": "rows.jsonl"})
    seqio_bridge.register(**options)
    drawing = examples.Drawing(
        split="train", amount=None, seed=0, holdout_every=None, data_root=str(tmp_path)
    )
    loaded = examples.load_examples(task, drawing)
    for found, example in zip(
        rows_of(theirs("encoded", "train", options)), loaded.examples, strict=True
    ):
        encoded = encode_conversation(
            example["messages"], tokenizer, chat="spec", max_length=options["max_length"]
        )
        for field in FIELDS:
            np.testing.assert_array_equal(found[field], getattr(encoded, field))


@pytest.fixture
def ab(options, tmp_path, add_task):
    """Tasks "a" of 7 rows and "b" of 5, and the mixture "ab" that takes 4 of the first."""
    for name, count in (("a", 7), ("b", 5)):
        write_jsonl(tmp_path / f"{name}.jsonl", chats(count))
        add_task(name, {"train": f"{name}.jsonl"})
    registry.MixtureRegistry.add(registry.Mixture(name="ab", tasks={"a": 4, "b": None}))
    yield options
    registry.MixtureRegistry.remove("ab")


def test_a_mixture_that_draws_and_its_rates(ab):
    seqio_bridge.register(**ab)
    assert check_same("ab", ab) == 9
    by_rate = seqio.MixtureRegistry.get("ab.by_rate")
    assert {task.name: by_rate.get_rate(task) for task in by_rate.tasks} == {"a": 4.0, "b": 5.0}
    assert rows_of(theirs("ab.by_rate", "train", ab, num_epochs=1))


def test_epochs_shards_and_shuffling_are_seqio_s(ab):
    seqio_bridge.register(**ab)
    once = [row["tokens"].tolist() for row in rows_of(theirs("ab", "train", ab))]
    twice = [row["tokens"].tolist() for row in rows_of(theirs("ab", "train", ab, num_epochs=2))]
    assert twice == once * 2
    shards = [
        rows_of(theirs("ab", "train", ab, shard_info=seqio.ShardInfo(index=index, num_shards=2)))
        for index in range(2)
    ]
    assert [row["tokens"].tolist() for row in shards[1]] == once[1::2]
    dataset = seqio.get_mixture_or_task("ab").get_dataset(
        sequence_length=None, split="train", shuffle=True, seed=3
    )
    assert sorted(row["tokens"].tolist() for row in dataset.as_numpy_iterator()) == sorted(once)


def test_the_vocabulary_decodes(options, tokenizer):
    seqio_bridge.register(**options)
    vocabulary = seqio.get_mixture_or_task("tulu_tiny").output_features["tokens"].vocabulary
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (1, 2, 0)
    assert vocabulary.vocab_size == tokenizer.vocab_size
    ids = vocabulary.encode("The fox</s>\nhen")
    assert vocabulary.encode_tf("The fox</s>\nhen").numpy().tolist() == ids
    (mapped,) = tf.data.Dataset.from_tensors("The fox</s>\nhen").map(vocabulary.encode_tf)
    assert mapped.numpy().tolist() == ids
    assert vocabulary.decode(ids) == "The fox"
    batch = np.array([ids, ids[::-1]], np.int32)
    texts = [text.decode() for text in vocabulary.decode_tf(batch).numpy()]
    assert texts[0] == "The fox" and len(texts) == 2
    first = next(theirs("tulu_tiny", "train", options).as_numpy_iterator())
    answer = first["targets"][first["loss_mask"]]
    assert answer[-1] == tokenizer.eos_id
    assert vocabulary.decode(answer) == tokenizer.decode(answer[:-1])


@pytest.mark.parametrize("pack", [False, True])
def test_a_t5x_model_gets_every_row_with_its_mask(pack, options, tmp_path, add_task, tokenizer):
    """Through `seqio.get_dataset`; one row begins with id 0, which seqio takes for padding."""
    write_jsonl(tmp_path / "rows.jsonl", [*chats(9), {"messages": messages("<unk>", "x<unk>y")}])
    add_task("t5x", {"train": "rows.jsonl"})
    seqio_bridge.register(**options)
    rows = rows_of(theirs("t5x", "train", options))
    assert any((row["targets"] == 0).any() for row in rows)
    batches = seqio.get_dataset(
        "t5x",
        task_feature_lengths=dict.fromkeys(FIELDS, 96),
        dataset_split="train",
        shuffle=False,
        feature_converter=seqio_bridge.ChatFeatureConverter(pack=pack),
    ).as_numpy_iterator()
    names = dict(zip(FIELDS, ("input_tokens", "target_tokens", "loss_weights"), strict=True))
    found = []
    for batch in batches:
        if not pack:
            found.append({f: batch[f"decoder_{names[f]}"] for f in FIELDS})
            continue
        segments = batch["decoder_segment_ids"]
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            assert (batch["decoder_positions"][at] == np.arange(at.sum())).all()
            found.append({f: batch[f"decoder_{names[f]}"][at] for f in FIELDS})
        assert not any(batch[f"decoder_{names[f]}"][segments == 0].any() for f in FIELDS)
    assert len(found) == len(rows)
    for converted, row in zip(found, rows, strict=True):
        for field in FIELDS:
            padded = np.zeros(len(converted[field]), np.int32)
            padded[: len(row[field])] = row[field]
            np.testing.assert_array_equal(converted[field], padded)


def test_lengths_of_a_t5x_model_must_agree(options):
    seqio_bridge.register(**options)
    with pytest.raises(ValueError, match="expected one length for all"):
        seqio.get_dataset(
            "tulu_tiny",
            task_feature_lengths={"tokens": 96, "targets": 96, "loss_mask": 95},
            dataset_split="validation",
            shuffle=False,
            feature_converter=seqio_bridge.ChatFeatureConverter(),
        )


def test_registering_again(ab, add_task):
    seqio_bridge.register(**ab)
    before = seqio.get_mixture_or_task("a")
    seqio_bridge.register(**ab)
    assert seqio.get_mixture_or_task("a") is before
    add_task("late", {"train": "a.jsonl"})
    seqio_bridge.register(**ab)
    assert check_same("late", ab) == 7
    with pytest.raises(ValueError, match=r"max_length = 64, before 96\. seqio keeps one task a"):
        seqio_bridge.register(**{**ab, "max_length": 64})


def test_names_that_are_taken_and_names_that_are_not_there(options):
    seqio.TaskRegistry.add(
        "lima",
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=("train",)),
        output_features={},
    )
    with pytest.raises(ValueError, match="seqio has other tasks or mixtures named lima"):
        seqio_bridge.register(**options)
    assert "dolly" not in seqio.TaskRegistry.names()
    seqio.TaskRegistry.reset()
    seqio_bridge.register(**options)
    with pytest.raises(ValueError, match="limma"):
        seqio.get_mixture_or_task("limma")
    with pytest.raises(FileNotFoundError, match=r"en_100_tree\.jsonl; it comes from GitHub"):
        theirs("oasst1_sample", "train", options)


@pytest.mark.parametrize("split", ["test", "valid", "train[:3]", "validation"])
def test_a_split_that_there_is_not(ab, split):
    """seqio hands any text on to the source."""
    seqio_bridge.register(**{**ab, "holdout_every": None})
    with pytest.raises(ValueError, match=rf"'a' has no split '{re.escape(split)}'; expected one"):
        theirs("a", split, ab)
    with pytest.raises(ValueError, match=re.escape(split)):
        theirs("ab.by_rate", split, ab)


def test_bad_arguments(options):
    with pytest.raises(ValueError, match=r"chat = 'plain'"):
        seqio_bridge.register(**{**options, "chat": "plain"})
    with pytest.raises(FileNotFoundError, match="found no tokenizer"):
        seqio_bridge.register(**{**options, "tokenizer": "nowhere"})
    seqio_bridge.register(**{**options, "truncation": "split"})
    with pytest.raises(ValueError, match="'split' with pairs, which cannot be split"):
        theirs("tulu_tiny_preference", "train", options)
