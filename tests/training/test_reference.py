"""The cache of reference log-probabilities: shards, kills, other runs, missing and broken pairs,
and files that are damaged."""

import itertools
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from tulu_jax import validation
from tulu_jax.training import reference

KEY = {"weights": "a1", "tokenizer": "b2", "template": "spec", "data": "c3"}
NAMES = [f"task/{i}" for i in range(7)]
LOGPS = np.random.default_rng(0).normal(-50, 9, (7, 2)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "reference_train"


def test_shards_are_found_again_whatever_their_order_in_the_data(folder):
    cache = reference.Cache(folder, KEY)
    cache.add(NAMES[3:5], LOGPS[3:5])
    cache.add(NAMES[:3], LOGPS[:3])
    again = reference.Cache(folder, KEY)
    assert [name in again for name in NAMES] == [True] * 5 + [False] * 2
    again.add(NAMES[5:], LOGPS[5:])
    found = reference.Cache(folder, KEY).gather(NAMES)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, LOGPS)
    np.testing.assert_array_equal(again.gather(NAMES[::-1]), LOGPS[::-1])


def test_a_shard_that_was_being_written_is_no_shard(folder):
    reference.Cache(folder, KEY).add(NAMES[:2], LOGPS[:2])
    (folder / ".00001.npz.tmp").write_bytes(b"PK torn")
    again = reference.Cache(folder, KEY)
    assert NAMES[1] in again and NAMES[2] not in again
    again.add(NAMES[2:], LOGPS[2:])
    np.testing.assert_array_equal(reference.Cache(folder, KEY).gather(NAMES), LOGPS)


def test_the_cache_of_another_run_is_refused_by_name(folder):
    reference.Cache(folder, KEY).add(NAMES, LOGPS)
    with pytest.raises(ValueError) as error:
        reference.Cache(folder, KEY | {"tokenizer": "b9", "template": "paper"})
    message = str(error.value)
    assert "tokenizer was 'b2' and is 'b9'; template was 'spec' and is 'paper'. Restore" in message
    assert "weights was" not in message and "remove the folder" in message
    with pytest.raises(ValueError, match="model was None and is"):
        reference.Cache(folder, KEY | {"model": "{}"})


def test_missing_pairs_are_named(folder):
    cache = reference.Cache(folder, KEY)
    cache.add(NAMES[:6], LOGPS[:6])
    with pytest.raises(ValueError, match=r"of 1 pair \(task/6\), of 7 in the data; remove the"):
        cache.gather(NAMES)
    with pytest.raises(ValueError, match=r"of 8 pairs \(x/0, x/1, x/2, x/3, x/4 and 3 more\)"):
        cache.gather([f"x/{i}" for i in range(8)])


def test_a_pair_that_is_not_finite_is_named_and_nothing_is_kept(folder):
    cache = reference.Cache(folder, KEY)
    broken = LOGPS.copy()
    broken[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"of 1 pair \(task/4\) are not finite"):
        cache.add(NAMES, broken)
    assert NAMES[0] not in reference.Cache(folder, KEY)


@pytest.fixture
def shards(folder) -> list[epath.Path]:
    """Three shards, of 3, 2 and 2 pairs."""
    cache = reference.Cache(folder, KEY)
    for start, stop in itertools.pairwise((0, 3, 5, 7)):
        cache.add(NAMES[start:stop], LOGPS[start:stop])
    return sorted(folder.glob("*.npz"))


def assert_refused(folder, file, found: str) -> None:
    with pytest.raises(validation.UsageError) as raised:
        reference.Cache(folder, KEY)
    message = str(raised.value)
    assert re.match(rf"{re.escape(str(file))}: found {found}.*; remove {folder}\S*, and", message)
    assert "\n" not in message


def test_no_flipped_bit_is_silent(folder, shards):
    rng, refused = random.Random(0), 0
    files = [*shards, folder / reference.KEY]
    for _ in range(100):
        file = rng.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(damaged))
        try:  # a space of the key may become another
            np.testing.assert_array_equal(reference.Cache(folder, KEY).gather(NAMES), LOGPS)
        except validation.UsageError as error:
            assert str(error).startswith(str(folder))
            refused += 1
        file.write_bytes(whole)
    assert refused >= 95
    np.testing.assert_array_equal(reference.Cache(folder, KEY).gather(NAMES), LOGPS)


def test_files_that_are_cut_zeroed_swapped_added_or_missing(folder, shards):
    contents = [file.read_bytes() for file in shards]
    for file, whole in zip(shards, contents, strict=True):
        for damaged in (whole[:-1], b"", bytes(len(whole))):
            file.write_bytes(damaged)
            assert_refused(folder, file, "digest [0-9a-f]{16}, expected [0-9a-f]{16}")
        file.write_bytes(whole)
    shards[1].write_bytes(contents[2])
    shards[2].write_bytes(contents[1])
    assert_refused(folder, shards[1], "digest")
    shards[1].unlink()
    shards[2].write_bytes(contents[2])
    again = reference.Cache(folder, KEY)  # what it held is computed anew
    assert [name in again for name in NAMES] == [True] * 3 + [False] * 2 + [True] * 2
    (folder / "00001.npz").write_bytes(contents[1])
    assert_refused(folder, folder / "00001.npz", "digest [0-9a-f]{16}, expected a name that ends")


def test_a_shard_of_another_run_is_refused(folder, shards):
    other = epath.Path(folder.parent) / "other"
    reference.Cache(other, KEY | {"weights": "z9"}).add(NAMES[:3], LOGPS[:3] + 1)
    (stranger,) = other.glob("*.npz")
    added = folder / stranger.name
    added.write_bytes(stranger.read_bytes())
    assert_refused(folder, added, "numbers for the key [0-9a-f]{16}, expected [0-9a-f]{16}, of key")
    added.unlink()
    (folder / reference.KEY).unlink()
    assert_refused(folder, folder / reference.KEY, "no such file")
    (folder / reference.KEY).write_bytes(b"{")
    assert_refused(folder, folder / reference.KEY, "no JSON object")


FILL = """
import sys
import numpy as np
from etils import epath
from tulu_jax.training import reference
cache = reference.Cache(epath.Path(sys.argv[1]), {"weights": "a1"})
print("open", flush=True)
sys.stdin.readline()
for start in range(0, 200, int(sys.argv[2])):
    ids = range(start, min(200, start + int(sys.argv[2])))
    logps = np.array([[i, -i] for i in ids], np.float32)
    cache.add([f"task/{i}" for i in ids], logps)
"""


def test_processes_that_fill_one_folder_side_by_side(folder):
    """Three real processes, two with the same shards and one with smaller ones."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, folder, size],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for size in ("8", "8", "5")
    ]
    assert [process.stdout.readline() for process in processes] == [b"open\n"] * 3
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.wait() for process in processes] == [0, 0, 0]
    cache = reference.Cache(folder, {"weights": "a1"})
    expected = np.array([[i, -i] for i in range(200)], np.float32)
    np.testing.assert_array_equal(cache.gather([f"task/{i}" for i in range(200)]), expected)
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]
    numbers = {int(file.name.partition("-")[0]) for file in folder.glob("*.npz")}
    assert numbers == set(range(40))  # of each number one file or more: an archive has its second
