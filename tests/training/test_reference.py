"""The cache of reference log-probabilities: shards, kills, other runs, missing and broken pairs."""

import numpy as np
import pytest
from etils import epath

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
