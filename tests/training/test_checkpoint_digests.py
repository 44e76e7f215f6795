"""A checkpoint tells whether it is what was saved: arrays on any mesh, every bit of its files."""

import json
import random
import shutil

import builders
import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tulu_jax import base as base_lib
from tulu_jax import trained, trainer, validation
from tulu_jax.training import checkpoint, checkpoint_digests
from tulu_jax.training.state import TrainState

SIZE = 64
ABOUT = {"params": {}, "weights": "w", "must_match": {}}


def state(seed):
    random_values = np.random.default_rng(seed).normal(size=(3, SIZE, SIZE)).astype(np.float32)
    kernel, mu, nu = map(jnp.asarray, random_values)
    return TrainState(
        step=jnp.int32(seed),
        params={"layers": {"kernel": kernel, "scale": jnp.ones(SIZE, jnp.bfloat16)}},
        opt_state=({"mu": mu, "nu": nu}, jnp.int32(seed)),
    )


def abstract():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )


def save(workdir, steps, config=None):
    config = config or checkpoint.CheckpointConfig(every=1, keep=9)
    checkpoints = checkpoint.Checkpoints(str(workdir), config)
    for step in steps:
        checkpoints.save(step, state(step), ABOUT, {})
    checkpoints.close()
    return workdir / "checkpoints"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "run", [8])


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run/checkpoints")


def sums(array):
    return [int(value) for value in checkpoint_digests.of_arrays({"x": array})["x"][1]]


def sums_in_numpy(array):
    """The twin of the digest of an array, in 64 bits."""
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").astype(np.uint64).ravel()
    low, place = np.uint64(2**32 - 1), np.arange(bits.size, dtype=np.uint64)
    x = bits ^ (place * np.uint64(0x9E3779B1) & low)
    x = (x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B) & low
    x = (x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35) & low
    x = x ^ (x >> np.uint64(16))
    weighted = x * (2 * place + 1 & low) & low
    return [int(x.sum() & low), int(weighted.sum() & low)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_the_digest_of_an_array_is_the_same_on_every_mesh(dtype):
    array = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 6)) * 99, dtype)
    expected = sums_in_numpy(np.asarray(array))
    assert sums(array) == expected
    for shape, spec in (((8,), ("a",)), ((2, 2), ("a", "b")), ((2, 2), (None, ("a", "b")))):
        names = ("a", "b")[: len(shape)]
        mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
        placed = jax.device_put(array, jax.NamedSharding(mesh, PartitionSpec(*spec)))
        assert sums(placed) == expected


def test_the_digest_of_an_array_tells_small_and_regular_changes():
    array = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)
    whole, bits = sums(array), np.ascontiguousarray(array).view(np.uint32)
    changed = [np.roll(array, 1, axis=0), -array, array[::-1].copy(), np.zeros_like(array)]
    for place in range(0, array.size, 7):
        for bit in (0, 15, 31):
            one = bits.copy()
            one.flat[place] ^= np.uint32(1 << bit)
            changed.append(one.view(np.float32))
    two = bits.copy()
    two[:2] ^= np.uint32(1 << 31)  # an even number of signs
    changed.append(two.view(np.float32))
    assert not [other for other in changed if sums(other) == whole]


def flip(file, place, bit):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def flips(folder, count):
    """`count` times, in turn: one bit is flipped in a file of the state, and is put back."""
    rng = random.Random(0)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
    sizes = [file.stat().st_size for file in files]
    for _ in range(count):
        [file] = rng.choices(files, sizes)
        place, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        flip(file, place, bit)
        yield file
        flip(file, place, bit)


@pytest.mark.parametrize("what", ["state", "parameters"])
def test_one_flipped_bit_is_found_in_every_try(folder, what):
    checkpoints = checkpoint.Checkpoints(str(folder.parent))
    whole, found = abstract(), 0
    for file in flips(folder / "8/state", 100):
        with pytest.raises(checkpoint.DamagedError) as refused:
            if what == "state":
                checkpoints.restore(8, whole)
            else:
                checkpoints.restore_params(8, whole.params)
        said = str(refused.value)
        found += "step 8 in" in said and str(file.relative_to(folder / "8")) in said
    assert found == 100
    restored = checkpoints.restore(8, whole)
    jax.tree.map(np.testing.assert_array_equal, restored, state(8))


def test_without_digests_of_files_those_of_arrays_let_no_other_value_through(folder):
    """As in a bucket, whose files have a size alone."""
    path = folder / "8" / checkpoint_digests.FILE
    recorded = json.loads(path.read_text())
    recorded["files"] = {name: [size, None] for name, (size, _) in recorded["files"].items()}
    path.write_text(json.dumps(recorded))
    checkpoints, refused = checkpoint.Checkpoints(str(folder.parent)), 0
    for _ in flips(folder / "8/state", 30):
        try:
            restored = checkpoints.restore(8, abstract())
        except checkpoint.DamagedError:
            refused += 1
        else:  # the bit was of no value, such as of a copy of the tree that nothing reads
            jax.tree.map(np.testing.assert_array_equal, restored, state(8))
    assert refused > 15


def test_the_array_is_named_whose_values_are_others(folder):
    path = folder / "8" / checkpoint_digests.FILE
    recorded = json.loads(path.read_text())
    name = "opt_state/0/nu"
    recorded["arrays"][name] = "float32 0123456789abcdef"
    path.write_text(json.dumps(recorded))
    checkpoints = checkpoint.Checkpoints(str(folder.parent))
    with pytest.raises(checkpoint.DamagedError, match=f"array {name} is .* saved as float32 0123"):
        checkpoints.restore(8, abstract())
    assert name in " ".join(checkpoints.damages(8, sizes_only=False))
    checkpoints.restore_params(8, abstract().params)  # has none of it


def test_parameters_are_compared_before_they_are_cast(folder):
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
        abstract().params,
    )
    found = checkpoint.Checkpoints(str(folder.parent)).restore_params(8, like)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state(8).params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_checkpoint_of_before_is_read_with_a_word(folder, caplog):
    (folder / "8" / checkpoint_digests.FILE).unlink()
    checkpoints = checkpoint.Checkpoints(str(folder.parent))
    with caplog.at_level("WARNING"):
        checkpoints.restore(8, abstract())
    assert [line for line in caplog.messages if "cannot be verified" in line] == [
        f"{folder}/8 cannot be verified: it was saved without digests"
    ]
    assert checkpoints.damages(8, sizes_only=False) is None


def test_digests_of_a_later_version_are_refused(folder):
    path = folder / "8" / checkpoint_digests.FILE
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(checkpoint.DamagedError, match=r"digests.json is not of version 1"):
        checkpoint.Checkpoints(str(folder.parent)).restore(8, abstract())


def test_folders_of_others_among_the_steps_are_let_be(tmp_path, caplog):
    folder = save(tmp_path / "run", [1])
    (folder / "2").mkdir()
    (folder / "3").mkdir()
    (folder / "3/notes.txt").write_text("mine")
    with caplog.at_level("WARNING"):
        assert checkpoint.Checkpoints(str(tmp_path / "run")).steps() == [1]
    assert f"{folder}/3 is left as it is: it holds no checkpoint" in caplog.messages
    save(tmp_path / "run", [3, 4], checkpoint.CheckpointConfig(every=1, keep=1))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3.foreign", "4"]
    assert (folder / "3.foreign/notes.txt").read_text() == "mine"


def test_multiples_are_kept_beside_the_last(tmp_path):
    config = checkpoint.CheckpointConfig(every=1, keep=1, keep_every=3)
    save(tmp_path / "run", range(1, 9), config)
    assert checkpoint.Checkpoints(str(tmp_path / "run")).steps() == [3, 6, 8]
    with pytest.raises(validation.UsageError, match="keep_every = 3: expected a multiple of every"):
        checkpoint.CheckpointConfig(every=2, keep_every=3)


def test_the_command_lists_steps_and_what_is_damaged(tmp_path, capsys):
    folder = save(tmp_path / "run", [1, 2, 3])

    def listed(*flags):
        status = commands.run("checkpoints", f"--workdir={tmp_path}/run", *flags)
        header, *lines = capsys.readouterr().out.splitlines()
        assert header.split() == ["step", "size", "age", "health"]
        return status, [line.split(None, 5) for line in lines]

    status, lines = listed("--verify")
    assert status == 0 and [(line[0], line[-1]) for line in lines] == [
        (str(step), "verified") for step in (1, 2, 3)
    ]
    (folder / "1" / checkpoint_digests.FILE).unlink()
    file = max((folder / "2/state").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    flip(file, file.stat().st_size // 2, 3)
    assert listed()[0] == 0  # sizes alone
    status, lines = listed("--verify")
    assert status == 1 and lines[0][-1].startswith("unverified: saved without")
    assert lines[1][-1].startswith(f"damaged: file {file.relative_to(folder / '2')} has digest")
    file.unlink()
    status, lines = listed()
    assert status == 1 and lines[1][-1].endswith("is gone")
    assert commands.run("checkpoints", f"--workdir={tmp_path}/none") == 2
    assert "train first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"version": 2, "arrays": {}, "files": {}}', "damaged: digests.json is not of version 1"),
        ('{"version": 1}', "damaged: digests.json does not list arrays and files"),
        ('{"version": 1, "arrays": {}, "files": {"/etc/passwd": [1, null]}}', "does not list"),
        ('{"version": 1, "arrays": {}, "files": {"a/../../b": [1, null]}}', "does not list"),
        ("[" * 9999, "damaged: RecursionError"),
        ("", "damaged: "),
    ],
)
def test_digests_that_are_none_are_damage_in_a_line(folder, capsys, content, said):
    (folder / "8" / checkpoint_digests.FILE).write_text(content)
    for flags in ((), ("--verify",)):
        status = commands.run("checkpoints", f"--workdir={folder.parent}/", *flags)
        told = capsys.readouterr()
        assert status == 1 and said in told.out.splitlines()[-1] and "Traceback" not in told.err
    with pytest.raises(checkpoint.DamagedError, match="step 8 in"):
        checkpoint.Checkpoints(str(folder.parent)).restore(8, abstract())


def test_the_command_on_what_is_no_workdir(tmp_path, capsys):
    (tmp_path / "a file").write_text("")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/7").write_text("a file that is called like a step")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoints").write_text("")
    for name in ("a file", "run", "other", "none", "run/checkpoints"):
        status = commands.run("checkpoints", f"--workdir={tmp_path / name}")
        told = capsys.readouterr()
        assert status == 2 and "there is no checkpoint in" in told.err, name
        assert "Traceback" not in told.err
    assert commands.run("checkpoints") == 2
    assert "no --workdir" in capsys.readouterr().err


def test_a_run_stops_at_a_damaged_checkpoint_or_goes_back_to_a_whole_one(tmp_path, tokenizer_dir):
    """It names what is damaged, keeps it aside, and its losses are those of the first time."""
    config = builders.train_config(tmp_path, tokenizer=tokenizer_dir)
    expected = trainer.Run(config).train()
    folder = tmp_path / "run/checkpoints"
    file = max((folder / "8/state").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    flip(file, file.stat().st_size // 3, 5)
    with pytest.raises(checkpoint.DamagedError, match=r"step 8 in .* step 4 is whole") as refused:
        trainer.Run(config).train()
    assert str(file.relative_to(folder / "8")) in str(refused.value)
    params = base_lib.abstract_params(config, trainer.Run(config).mesh)
    for read in (
        lambda: trained.load(config, step=8),  # convert, generate, evaluate
        lambda: base_lib.load(config.workdir, config.model, params),
    ):
        with pytest.raises(checkpoint.DamagedError, match="step 8 in"):
            read()
    assert trainer.Run(config, on_damage="newest_whole").train() == expected
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8", "8.damaged"]
    for step in (4, 8):
        shutil.rmtree(folder / f"{step}/state")
    with pytest.raises(checkpoint.DamagedError):
        trainer.Run(config, on_damage="newest_whole").train()
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8", "8.damaged"]
