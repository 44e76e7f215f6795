"""Attacks on a finished cache: what is damaged is refused by name, and no other row is trained."""

import dataclasses
import os
import pathlib
import random
import re
import shutil

import builders
import pytest
from raw_rows import chats, write_jsonl

from tulu_jax import trainer, validation
from tulu_jax.data import cache_files, encode, loader


@pytest.fixture
def config(tokenizer_dir, tmp_path, add_task, monkeypatch) -> loader.DataConfig:
    """A task of 14 conversations, encoded in four shards, with one more that is left out."""
    monkeypatch.setattr(encode, "SHARD_ROWS", 4)
    without_answer = {"messages": [{"role": "user", "content": "alone"}]}
    write_jsonl(tmp_path / "rows.jsonl", [*chats(14), without_answer])
    add_task("a", {"train": "rows.jsonl"})
    return loader.DataConfig(
        train="a",
        tokenizer=tokenizer_dir,
        data_root=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
        max_length=64,
        packing="none",
    )


def opened(config) -> loader.Rows:
    return loader.prepare(config, split="train")


@pytest.fixture
def folder(config) -> pathlib.Path:
    (folder,) = {shard.file.parent for shard in opened(config).store.shards}
    return folder


def content(rows: loader.Rows) -> list:
    """All that is trained on, and where it is from."""
    store, indices = rows.store, range(rows.num_examples)
    sides = [[(a.tolist(), b.tolist()) for a, b in store.sides(i)] for i in indices]
    return [rows.stats, sides, [(store.name(i), store.about(i)) for i in indices]]


def assert_refused(config, file: pathlib.Path, found: str) -> None:
    advice = f"remove the folder {re.escape(str(file.parent))}, and its rows are encoded anew"
    with pytest.raises(validation.UsageError, match=f"{re.escape(str(file))}: {found}.*{advice}$"):
        opened(config)


def arrows(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.arrow"))


def test_no_flipped_bit_is_silent(config, folder):
    expected, rng = content(opened(config)), random.Random(0)
    files = [*arrows(folder), folder / cache_files.MANIFEST]
    refused = 0
    for _ in range(100):
        file = rng.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            assert content(opened(config)) == expected  # a space of the manifest became another
        except validation.UsageError as error:
            assert str(error).startswith(str(folder)) and "\n" not in str(error)
            refused += 1
        file.write_bytes(whole)
    assert refused >= 95
    assert content(opened(config)) == expected


def test_the_same_size_and_time_do_not_hide_a_flipped_bit(config, folder):
    file = arrows(folder)[1]
    stat, damaged = file.stat(), bytearray(file.read_bytes())
    damaged[-200] ^= 4
    file.write_bytes(damaged)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_refused(config, file, "found digest [0-9a-f]{16}, expected [0-9a-f]{16};")


def test_files_that_are_missing_added_cut_or_zeroed(config, folder):
    for file in arrows(folder):
        whole = file.read_bytes()
        file.unlink()
        assert_refused(config, file, "found no such file, expected the one that was written")
        file.write_bytes(whole[:-1])
        assert_refused(config, file, f"found {len(whole) - 1} bytes, expected {len(whole)};")
        file.write_bytes(b"")
        assert_refused(config, file, "found 0 bytes")
        file.write_bytes(bytes(len(whole)))
        assert_refused(config, file, "found digest")
        file.write_bytes(whole)
    added = folder / "examples-00004-0123456789abcdef.arrow"
    added.write_bytes(arrows(folder)[0].read_bytes())
    assert_refused(config, added, "found a file that was added")
    added.unlink()
    assert opened(config).num_examples == 14


def test_two_shards_that_changed_places(config, folder):
    """Both by their content, and by their numbers."""
    first, second = arrows(folder)[:2]
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert_refused(config, first, "found (digest|[0-9]+ bytes)")
    first.write_bytes(contents[0])
    second.write_bytes(contents[1])
    swapped = first.with_name(first.name.replace("00000", "00001"))
    first.rename(swapped)
    assert_refused(config, first, "found no such file")


def test_a_folder_under_the_name_of_another(config, folder):
    other = folder.with_name("0" * 32)
    folder.rename(other)
    write_jsonl(pathlib.Path(config.data_root) / "rows.jsonl", chats(9))
    (fresh,) = {shard.file.parent for shard in opened(config).store.shards}
    shutil.rmtree(fresh)
    other.rename(fresh)
    assert_refused(config, fresh / cache_files.MANIFEST, "found digest")


def test_another_count_in_the_manifest(config, folder):
    file = folder / cache_files.MANIFEST
    text = file.read_text()
    for there, other in (('"examples": 14', '"examples": 13'), ('"rows": 4', '"rows": 5')):
        assert there in text
        file.write_text(text.replace(there, other))
        assert_refused(config, file, "found digest")
    for broken in ("", "[]", "{}", text[:-3], "null", "[" * 100_000):
        file.write_text(broken)
        assert_refused(config, file, "found no list of files")


def test_what_was_left_out_is_verified_when_it_is_read(config, folder):
    (entry,) = cache_files.aside(folder)
    assert entry == {"id": "a/14", "reason": "no trained token"}
    file = folder / cache_files.ASIDE
    file.write_text(file.read_text().replace("a/14", "a/13"))
    with pytest.raises(validation.UsageError, match=r"aside\.jsonl: found digest"):
        cache_files.aside(folder)
    file.unlink()
    assert_refused(config, file, "found no such file")


def test_an_id_beyond_the_vocabulary(config, tokenizer, tmp_path):
    shards = opened(config).store.shards
    largest = max(shard.max_id for shard in shards)
    expected = {int(row["targets"].max()) for row in map(opened(config).in_order, range(14))}
    assert largest == max(expected)
    run = builders.replace(builders.train_config(tmp_path), data=config)
    trainer.Run(builders.replace(run, model__vocab_size=largest + 1)).open()
    with pytest.raises(
        validation.UsageError,
        match=rf"arrow: found the token id {largest}, expected ids below {largest}, the model's "
        "vocabulary; give the tokenizer that belongs to it",
    ):
        trainer.Run(builders.replace(run, model__vocab_size=largest)).open()
    small = dataclasses.replace(tokenizer, vocab_size=largest)
    encoding = encode.Encoding(
        tokenizer=small, chat="spec", max_length=64, truncation="cut", one_row=False
    )
    component = loader.split_components(config, "train")[0]
    with pytest.raises(validation.UsageError, match=rf"row a/\d+: found the token id {largest}"):
        encode.encode_task(
            component.task,
            config.drawing(component, "train"),
            encoding=encoding,
            cache_dir=str(tmp_path / "other"),
        )


def test_a_shard_that_changes_under_a_run_stops_it(config, folder):
    rows = opened(config)
    expected, files = content(rows), arrows(folder)
    for file in files:
        os.utime(file)  # written, and still the same
    assert content(rows) == expected
    options = {"batch_size": 2, "start_step": 0, "process_index": 0, "process_count": 1}
    stream = loader.batches(rows, num_steps=1000, workers=2, **options)
    next(stream)
    with files[1].open("r+b") as file:
        file.write(bytes(files[1].stat().st_size))
    with pytest.raises(validation.UsageError, match=rf"{files[1].name}: found digest .* remove"):
        for _ in range(100):
            next(stream)


def test_a_folder_that_is_removed_under_a_run_stays_mapped(config, folder):
    rows = opened(config)
    expected = content(rows)
    for file in folder.iterdir():
        file.unlink()
    assert content(rows) == expected


def test_a_killed_encoding_encodes_what_was_damaged_again(config, folder):
    expected, files = content(opened(config)), arrows(folder)
    wholes = [file.read_bytes() for file in files]
    (folder / cache_files.MANIFEST).unlink()
    (folder / cache_files.ASIDE).unlink()
    files[1].write_bytes(wholes[1][:-9] + b"x" + wholes[1][-8:])
    files[2].write_bytes(b"")
    kept = files[0].stat().st_mtime_ns
    assert content(opened(config)) == expected
    assert [file.read_bytes() for file in files] == wholes
    assert files[0].stat().st_mtime_ns == kept
