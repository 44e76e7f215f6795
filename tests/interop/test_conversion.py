"""Both ways a weight at a time: what is written restores, is compared, and goes on after a kill."""

import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

import builders
import jax
import numpy as np
import pytest
from hf_models import assert_equal_trees, one_device, random_params

from tulu_jax import conversion, step, trained, trainer, validation
from tulu_jax.interop import folder, hf, shards
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.training import checkpoint, checkpoint_arrays, state, unfinished
from tulu_jax.training.state import TrainState

MODEL = builders.MODEL
REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_dir):
    """A config whose base is a random model, with the checkpoint of step 0 in its workdir."""
    place = tmp_path_factory.mktemp("run")
    params = random_params(MODEL)
    hf.save(
        place / "base", params, MODEL, dtype="float32", generation_config={}, write_tokenizer=None
    )
    config = builders.train_config(place, tokenizer=tokenizer_dir, base=str(place / "base"))
    conversion.write_first_step(config, "")
    return config, params


def restored(config):
    mesh = mesh_lib.make(mesh_lib.MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        abstract, _ = step.abstract_state(config, mesh)
        return checkpoint.Checkpoints(config.workdir).restore(0, abstract)


def export(config, out, **options):
    given = dict(step=None, dtype="float32", overwrite=False)
    conversion.export(config, str(out), **given | options)


def test_the_first_step_is_what_a_run_makes_of_its_base(run):
    """The state and what is said of it, digests included, which restoring compares."""
    config, params = run
    found = restored(config)
    assert_equal_trees(found.params, params)
    theirs = builders.replace(config, workdir=config.workdir + "-by-the-run")
    trainer.Run(theirs).save_initial()
    assert_equal_trees(found, restored(theirs))
    folders = [checkpoint.Checkpoints(c.workdir).folder / "0" for c in (config, theirs)]
    ours, expected = (json.loads((f / "digests.json").read_text())["arrays"] for f in folders)
    assert ours == expected
    abouts = [checkpoint.Checkpoints(c.workdir).about(0) for c in (config, theirs)]
    assert abouts[0] == abouts[1] and abouts[0]["weights"] == state.fingerprint(params)


def test_what_is_exported_again_is_the_base(run, tmp_path):
    """Bit for bit, with the digest of each weight in the manifest, and a card that says what it
    is made of."""
    config, params = run
    export(config, tmp_path / "out", max_shard_bytes=40_000)
    exported = hf.load(tmp_path / "out", MODEL, shardings=one_device(), dtype="float32")
    assert_equal_trees(exported, params)
    manifest = json.loads((tmp_path / "out" / folder.MANIFEST).read_text())
    assert folder.UNFINISHED not in manifest and len(manifest["weights"]) == 2 * 9 + 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert config.base in card and "tulu_tiny" in card and "| learning_rate | 0.001 |" in card
    assert "None were measured." in card


def test_checkpoints_whose_chunks_reach_over_layers_are_read_too(run, tmp_path, monkeypatch):
    """As those of before were cut, and with chunks of few layers at a time."""
    config, params = run
    old = builders.replace(config, workdir=str(tmp_path / "run"))
    monkeypatch.setattr(checkpoint_arrays, "storage", lambda ocp, state: None)
    trainer.Run(old).save_initial()
    for size in (checkpoint_arrays.BLOCKS, 1):
        monkeypatch.setattr(checkpoint_arrays, "BLOCKS", size)
        export(old, tmp_path / f"out{size}")
        exported = hf.load(tmp_path / f"out{size}", MODEL, shardings=one_device(), dtype="float32")
        assert_equal_trees(exported, params)


def flipped(workdir, tmp_path):
    """A copy of a workdir with one bit flipped in its largest file."""
    copy = pathlib.Path(shutil.copytree(workdir, tmp_path / "copy"))
    file = max((f for f in copy.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    return copy


def test_one_flipped_bit_writes_nothing(run, tmp_path):
    config, _ = run
    damaged = builders.replace(config, workdir=str(flipped(config.workdir, tmp_path)))
    # Which array has the bit depends on how the file was written.
    said = r"cannot be read \(array params/(model|lm_head)/\S+ is float32 \w+, was saved as float32"
    with pytest.raises(checkpoint.DamagedError, match=said):
        export(damaged, tmp_path / "out")
    assert os.listdir(tmp_path) == ["copy"]


def test_another_function_objective_or_tokenizer_is_refused(run, tmp_path):
    config, params = run
    about = checkpoint.Checkpoints(config.workdir).about(0)
    about["must_match"]["tokenizer"] = trained.tokenizer_digest(config.data.tokenizer)
    config = builders.replace(config, workdir=str(tmp_path / "run"))
    saved = checkpoint.Checkpoints(config.workdir, config.checkpoint)
    saved.save(4, TrainState(step=np.int32(4), params=params, opt_state={}), about, {})
    saved.close()
    export(config, tmp_path / "right")
    vocabulary = json.loads((pathlib.Path(config.data.tokenizer) / "tokenizer.json").read_text())
    pieces = vocabulary["model"]["vocab"]
    one, other = list(pieces)[300:302]
    pieces[one], pieces[other] = pieces[other], pieces[one]
    swapped = tmp_path / "tokenizer.json"
    swapped.write_text(json.dumps(vocabulary))
    dpo = builders.train_config(tmp_path, dpo_stage=True).objective
    for change, said in (
        ({"model__rope_theta": 5e5}, "trained with rope_theta = 10000.0; this run's model has 5"),
        ({"model__norm_eps": 1e-6}, "trained with norm_eps = 1e-05"),
        ({"objective": dpo}, "was made with objective"),
        ({"data__tokenizer": str(swapped)}, "other texts have these ids"),
    ):
        with pytest.raises(validation.UsageError, match=said):
            export(builders.replace(config, **change), tmp_path / "wrong")
    trained.keep_tokenizer(config, replace=False)
    export(config, tmp_path / "of the workdir")
    (tmp_path / "run" / trained.KEPT_TOKENIZER).write_text(swapped.read_text())
    with pytest.raises(validation.UsageError, match=r"run/tokenizer\.json has the digest"):
        export(config, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_base_that_is_not_finite_is_named(tmp_path, tokenizer_dir):
    params = random_params(MODEL)
    bad = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    params["model"]["layers"]["mlp"]["up_proj"]["kernel"] = bad.at[1, 3, 4].set(np.nan)
    hf.save(
        tmp_path / "base", params, MODEL, dtype="float32", generation_config={},
        write_tokenizer=None,
    )  # fmt: skip
    config = builders.train_config(tmp_path, tokenizer=tokenizer_dir, base=str(tmp_path / "base"))
    said = r"model\.layers\.1\.mlp\.up_proj\.weight in model\.safetensors is not finite"
    with pytest.raises(validation.UsageError, match=said):
        conversion.write_first_step(config, "")
    assert checkpoint.Checkpoints(config.workdir).steps() == []


KILLED = """
import os, signal, sys
import pickle
from tulu_jax import conversion
from tulu_jax.interop import shards
write, count = shards.write, 0
def writing(*arguments):
    global count
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
shards.write = writing
config = pickle.loads(bytes.fromhex(sys.argv[1]))
conversion.export(
    config, sys.argv[2], step=None, dtype="float32", overwrite=False, max_shard_bytes=40_000
)
"""


def test_a_killed_export_goes_on_behind_its_last_whole_file(run, tmp_path, monkeypatch):
    """Files that are whole stay, one that was damaged meanwhile is written again."""
    config, params = run
    command = [sys.executable, "-c", KILLED, pickle.dumps(config).hex(), str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (left,) = tmp_path.iterdir()
    whole = sorted(left.glob("*.safetensors"))
    assert len(whole) == 3
    times = {file.name: file.stat().st_mtime_ns for file in whole}
    content = bytearray(whole[1].read_bytes())
    content[-1] ^= 1
    whole[1].write_bytes(content)
    written, write = [], shards.write
    monkeypatch.setattr(shards, "write", lambda *a: written.append(a[1].file) or write(*a))
    export(config, tmp_path / "out", max_shard_bytes=40_000)
    assert os.listdir(tmp_path) == ["out"]
    assert whole[1].name in written and not {whole[0].name, whole[2].name} & set(written)
    for file in (whole[0], whole[2]):
        assert (tmp_path / "out" / file.name).stat().st_mtime_ns == times[file.name]
    exported = hf.load(tmp_path / "out", MODEL, shardings=one_device(), dtype="float32")
    assert_equal_trees(exported, params)


KILLED_INWARD = """
import os, pickle, signal, sys
from tulu_jax import conversion
from tulu_jax.training import unfinished
add, count = unfinished.Unfinished.add, 0
def adding(*arguments):
    global count
    add(*arguments)
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
unfinished.Unfinished.add = adding
conversion.write_first_step(pickle.loads(bytes.fromhex(sys.argv[1])), "")
"""


def killed_inward(config, pieces: int) -> None:
    command = [sys.executable, "-c", KILLED_INWARD, pickle.dumps(config).hex(), str(pieces)]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


@pytest.fixture
def inward(run, tmp_path):
    """A config whose step 0 was being written when its process was killed, with 7 pieces there."""
    config = builders.replace(run[0], workdir=str(tmp_path / "killed"))
    killed_inward(config, 7)
    assert os.listdir(tmp_path / "killed" / "checkpoints") == ["0.orbax-checkpoint-tmp"]
    return config


def written_now(monkeypatch) -> list[tuple[str, int]]:
    """The pieces that this process writes."""
    names, add = [], unfinished.Unfinished.add

    def adding(self, array, layer, digest):
        names.append((array, layer))
        add(self, array, layer, digest)

    monkeypatch.setattr(unfinished.Unfinished, "add", adding)
    return names


def begun_again(config, params):
    """Converts, and compares what a run would restore."""
    conversion.write_first_step(config, "")
    workdir = pathlib.Path(config.workdir)
    assert not (workdir / unfinished.FOLDER).exists()
    checkpoints = checkpoint.Checkpoints(config.workdir)
    assert checkpoints.steps() == [0]
    assert_equal_trees(restored(config).params, params)


def test_a_killed_conversion_goes_on_behind_what_it_wrote(run, inward, monkeypatch):
    """Twice killed, a piece damaged meanwhile."""
    killed_inward(inward, 5)
    journal = pathlib.Path(inward.workdir) / unfinished.FOLDER / "written.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 1 + 12
    line = json.loads(lines[3])
    line["digest"][0] ^= 1
    journal.write_text("\n".join([*lines[:3], json.dumps(line), *lines[4:], '{"cut']))
    names = written_now(monkeypatch)
    begun_again(inward, run[1])
    pieces = sum(
        len(leaf) if "layers" in jax.tree_util.keystr(path) else 1
        for path, leaf in jax.tree.leaves_with_path(run[1])
    )
    assert (line["array"], line["layer"]) in names and len(names) == pieces - 11


def test_what_was_written_of_another_base_is_left_behind(run, inward, tmp_path, monkeypatch):
    """The weights' file was written anew; and the index of the arrays is gone."""
    base = shutil.copytree(inward.base, tmp_path / "base")
    other = builders.replace(inward, base=str(base))
    names = written_now(monkeypatch)
    begun_again(other, run[1])
    before = len(names)
    shutil.rmtree(inward.workdir)
    killed_inward(inward, 7)
    (index,) = pathlib.Path(inward.workdir).glob("checkpoints/*/state*/*/manifest.ocdbt")
    index.write_bytes(index.read_bytes()[:20])
    begun_again(inward, run[1])
    assert len(names) == 2 * before


def test_a_run_removes_what_a_killed_conversion_left(inward):
    workdir = pathlib.Path(inward.workdir)
    assert (workdir / unfinished.FOLDER).exists()
    trainer.Run(inward).save_initial()
    assert not (workdir / unfinished.FOLDER).exists()
    assert os.listdir(workdir / "checkpoints") == ["0"]


def test_logits_are_compared_layer_by_layer(run, tmp_path):
    """An export and the base; and what is not the same model is found."""
    pytest.importorskip("torch")
    config, params = run
    conversion.verify(config, config.base, step=0)
    export(config, tmp_path / "out", dtype="bfloat16")
    conversion.verify(config, str(tmp_path / "out"), step=None)
    layers = params["model"]["layers"]["mlp"]
    kernel = layers["up_proj"]["kernel"]
    other = jax.tree.map(lambda leaf: leaf, params)
    other["model"]["layers"]["mlp"]["up_proj"]["kernel"] = kernel.at[1, 0].set(kernel[1, 1])
    hf.save(
        tmp_path / "other", other, MODEL, dtype="float32", generation_config={},
        write_tokenizer=None,
    )  # fmt: skip
    with pytest.raises(validation.UsageError, match="differ by up to"):
        conversion.verify(config, str(tmp_path / "other"), step=0)
