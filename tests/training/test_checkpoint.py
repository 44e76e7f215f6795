"""A damaged checkpoint is named, with one that is whole, whichever file is damaged and how."""

import dataclasses
import shutil

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax import validation
from tulu_jax.training import checkpoint
from tulu_jax.training.state import TrainState

SIZE = 64
ABOUT = {
    "params": {"kernel": [SIZE, SIZE]},
    "weights": "w",
    "must_match": {"model": dataclasses.asdict(builders.MODEL)},
}


def state(step):
    values = np.random.default_rng(step).normal(size=(2, SIZE, SIZE)).astype(np.float32)
    return TrainState(
        step=jnp.int32(step),
        params={"kernel": jnp.asarray(values[0])},
        opt_state={"m": jnp.asarray(values[1])},
    )


def abstract():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints of steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    checkpoints = checkpoint.Checkpoints(str(workdir), checkpoint.CheckpointConfig(every=4))
    for step in (4, 8):
        checkpoints.save(step, state(step), ABOUT, {})
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def largest(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


DAMAGES = {
    "state is gone": lambda step: shutil.rmtree(step / "state"),
    "the database's nodes are gone": lambda step: shutil.rmtree(step / "state" / "d"),
    "an array's data is gone": lambda step: largest(step).unlink(),
    "an array's data is cut": lambda step: half(largest(step)),
    "the tree's metadata is gone": lambda step: (step / "state/_METADATA").unlink(),
    "the tree's metadata is cut": lambda step: half(step / "state/_METADATA"),
    "the tree's metadata has a wrong byte": lambda step: flip(step / "state/_METADATA"),
    "the manifest is empty": lambda step: (step / "state/manifest.ocdbt").write_bytes(b""),
    "the manifest has a wrong byte": lambda step: flip(step / "state/manifest.ocdbt"),
}


def refusal(read, *arguments):
    with pytest.raises(validation.UsageError) as error:
        read(*arguments)
    said = str(error.value)
    assert "\n" not in said and "Traceback" not in said and len(said) < 1000
    return said


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_names_its_folder_and_the_step_that_is_whole(workdir, damage):
    folder = workdir / "checkpoints/8"
    DAMAGES[damage](folder)
    checkpoints = checkpoint.Checkpoints(str(workdir), checkpoint.CheckpointConfig(every=4))
    said = refusal(checkpoints.restore, 8, abstract())
    assert f"step 8 in {folder} cannot be read (" in said
    assert "That of step 4 is whole." in said and f"move {folder} out of that folder" in said
    shutil.move(folder, workdir / "damaged")
    checkpoints = checkpoint.Checkpoints(str(workdir), checkpoint.CheckpointConfig(every=4))
    step = checkpoints.latest_step()
    np.testing.assert_array_equal(
        checkpoints.restore(step, abstract()).params["kernel"], state(4).params["kernel"]
    )


def test_parameters_alone_and_what_is_said_of_them(workdir):
    """What generate, evaluate, convert and a base read."""
    half(workdir / "checkpoints/8/about/metadata")
    assert "That of step 4 is whole." in refusal(
        checkpoint.load_params, str(workdir), builders.MODEL, abstract().params
    )
    DAMAGES["the database's nodes are gone"](workdir / "checkpoints/4")
    said = refusal(checkpoint.Checkpoints(str(workdir)).restore_params, 4, abstract().params)
    assert "step 4" in said and "Those of steps [8] cannot be read either." in said
    shutil.rmtree(workdir / "checkpoints/8")
    said = refusal(checkpoint.Checkpoints(str(workdir)).restore_params, 4, abstract().params)
    assert "There is no other." in said


def test_parameters_of_another_function_are_refused(workdir):
    other = builders.replace(builders.MODEL, rope_theta=1e6, norm_eps=1e-6)
    with pytest.raises(validation.UsageError) as refused:
        checkpoint.load_params(str(workdir), other, abstract().params)
    said = str(refused.value)
    assert "trained with rope_theta = 10000.0; this run's model has 1000000.0" in said
    assert "trained with norm_eps = 1e-05; this run's model has 1e-06" in said


def test_a_step_that_is_not_there(workdir, tmp_path):
    checkpoints = checkpoint.Checkpoints(str(workdir))
    assert (checkpoints.require(None), checkpoints.require(4)) == (8, 4)
    said = refusal(checkpoints.require, 5)
    assert "no checkpoint of step 5 in" in said and "found steps [4, 8]" in said
    for place in ("nothing", "a file"):
        (tmp_path / "a file").write_text("")
        said = refusal(checkpoint.Checkpoints(str(tmp_path / place)).require, None)
        assert "there is no checkpoint in" in said and "train first" in said


def test_the_best_is_kept_by_a_run_that_goes_on(tmp_path):
    config = checkpoint.CheckpointConfig(every=1, keep=1, best="eval/loss")
    for step, loss in ((1, 2.0), (2, 3.0), (3, 4.0)):
        checkpoints = checkpoint.Checkpoints(str(tmp_path), config)
        checkpoints.save(step, state(step), ABOUT, {"eval/loss": loss, "eval/kl": np.inf})
        checkpoints.close()
    assert checkpoints.steps() == [1, 3]
    file = tmp_path / "checkpoints/1/metrics/metrics"
    assert "Infinity" not in file.read_text()
    half(file)
    with pytest.raises(validation.UsageError, match=r"is damaged .* move .*/checkpoints/1 out of"):
        checkpoint.Checkpoints(str(tmp_path), config)


@pytest.mark.parametrize("losses", [(2.0, np.nan, 3.0), (np.nan, 2.0, 3.0)])
def test_what_is_not_finite_is_never_the_best(tmp_path, losses):
    config = checkpoint.CheckpointConfig(every=1, keep=1, best="eval/loss")
    checkpoints = checkpoint.Checkpoints(str(tmp_path), config)
    for step, loss in enumerate(losses, 1):
        checkpoints.save(step, state(step), ABOUT, {"eval/loss": loss, "eval/kl": 0.0})
    checkpoints.close()
    assert checkpoints.steps() == [losses.index(2.0) + 1, 3]
