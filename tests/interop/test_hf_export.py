"""The exported folder: opens in transformers, appears only when complete, also in a bucket."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from hf_models import FLOAT32, VARIANTS, assert_equal_trees, one_device, random_llama, random_params

from tulu_jax import atomic, process_identity
from tulu_jax.decode import decoder
from tulu_jax.decode.sampling import Sampling
from tulu_jax.interop import folder, hf

CONFIG = hf.LlamaConfig(
    vocab_size=48, num_layers=3, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2,
    head_dim=4, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=64,
)  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
REPO = pathlib.Path(__file__).resolve().parents[2]


def save(path, params=None, **changes):
    defaults = dict(dtype="float32", generation_config=IDS, write_tokenizer=None)
    hf.save(path, random_params(CONFIG) if params is None else params, CONFIG, **defaults | changes)


def reload(path):
    return hf.load(path, hf.read_config(path), shardings=one_device(), dtype="float32")


def left_by_a_killed_export(place, name, *, marked=True):
    """A folder in `place`, as an export to `name` by a process that is gone leaves it."""
    me = process_identity.current()  # whose twin of that pid started at tick 1
    left = place / f".{name}.{me.machine}-{me.pid}-1-{marked:08x}.tulu_jax_partial"
    left.mkdir()
    if marked:
        (left / "model.safetensors").touch()
        folder._list(folder.located(left))
    return left


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["grouped_tied", "wide_heads_theta"])
def test_the_export_opens_in_transformers_and_generates_what_we_do(tmp_path, variant, dtype):
    torch = pytest.importorskip("torch")
    import transformers

    random_llama(seed=3, **VARIANTS[variant]).save_pretrained(tmp_path / "theirs")
    config = hf.read_config(tmp_path / "theirs")
    params = hf.load(tmp_path / "theirs", config, shardings=one_device(), dtype=dtype)
    hf.save(
        tmp_path / "ours",
        params,
        config,
        dtype=dtype,
        generation_config=IDS,
        write_tokenizer=None,
        max_shard_bytes=20_000,
    )
    prompt = [1, 7, 30, 22]
    sampling = Sampling(max_new_tokens=24, stop_ids=(2,))
    (ours,) = decoder.Decoder(config, FLOAT32, page=8).generate(
        params, [prompt], sampling, jax.random.key(0)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.dtype == getattr(torch, dtype)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 0
    theirs = model.float().generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
    )
    assert ours.ids == theirs[0, len(prompt) :].tolist()


def test_a_trained_export_opens_with_its_tokenizer(tmp_path, shared_data):
    pytest.importorskip("torch")
    import transformers

    source = shared_data / "models" / "stories260K-hf"
    piece_model = shared_data / "models" / "stories260K" / "tok512.model"

    def write_tokenizer(folder):
        (folder / "tokenizer.model").write_bytes(piece_model.read_bytes())
        fields = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>"}
        fields |= {"eos_token": "</s>", "chat_template": "{{ messages[0]['content'] }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))

    config = hf.read_config(source)
    params = hf.load(source, config, shardings=one_device(), dtype="float32")
    hf.save(
        tmp_path / "out",
        params,
        config,
        dtype="float32",
        generation_config=IDS,
        write_tokenizer=write_tokenizer,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    text = json.loads((shared_data / "reference_vectors" / "stories260K_text.json").read_text())
    stored = np.load(shared_data / "reference_vectors" / "stories260K_hf_logits.npz")
    ids = tokenizer(text["text_0"], return_tensors="pt").input_ids
    assert ids[0].tolist() == stored["ids_0"].tolist()
    np.testing.assert_allclose(model(ids).logits[0].detach(), stored["logits_0"], atol=1e-4)
    hello = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(hello, tokenize=False) == "hello"


def test_an_existing_folder_is_refused_unless_told(tmp_path):
    target = tmp_path / "out"
    save(target)
    first = (target / "model.safetensors").read_bytes()
    doubled = {"model": hf.jax.tree.map(lambda x: 2 * x, random_params(CONFIG)["model"])}
    with pytest.raises(
        ValueError, match="exists; choose another folder, or replace it with --overwrite"
    ):
        save(target, doubled)
    assert (target / "model.safetensors").read_bytes() == first
    save(target, doubled, overwrite=True)
    assert_equal_trees(reload(target), doubled)
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_is_no_export_is_never_overwritten(tmp_path):
    """A model of somebody else is none either, nor an export beside which something was put."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"theirs holds config\.json, not listed in its"):
        save(theirs, overwrite=True)
    assert (theirs / "config.json").read_text() == "{}"
    save(ours)
    (ours / "thesis.tex").touch()
    (ours / "results").mkdir()
    with pytest.raises(ValueError, match=r"ours holds results, thesis\.tex, not listed in its"):
        save(ours, overwrite=True)
    assert (ours / "thesis.tex").exists() and (ours / "config.json").exists()


@pytest.mark.parametrize("text", ["", "[1]", '{"made_by": "x"}', '{"format": 1, "files": 3}'])
def test_a_manifest_of_others_makes_no_folder_ours(tmp_path, text):
    (tmp_path / folder.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"holds tulu_jax\.json, not listed"):
        save(tmp_path, overwrite=True)
    assert (tmp_path / folder.MANIFEST).read_text() == text


def test_what_lies_beside_an_export_stays(tmp_path):
    """Whatever its name: of it, only folders that an export marked are removed."""
    for name in ("out.partial", "out.replaced", ".partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
    unmarked = left_by_a_killed_export(tmp_path, "out", marked=False)
    (unmarked / "thesis.tex").touch()
    marked = left_by_a_killed_export(tmp_path, "out")
    other_target = left_by_a_killed_export(tmp_path, "other")
    save(tmp_path / "out")
    save(tmp_path / "out", overwrite=True)
    assert len(list(tmp_path.glob("*/thesis.tex"))) == 4 and not marked.exists()
    assert other_target.exists()


def test_two_exports_to_one_folder(tmp_path):
    target = tmp_path / "out"
    busy = f"out is being written by process {os.getpid()} of this host"
    with folder.finished(folder.located(target)) as first:
        (first / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=busy):
            save(target)
    assert {file.name for file in target.iterdir()} == {"config.json", folder.MANIFEST}


def test_a_folder_that_somebody_makes_meanwhile_stays(tmp_path):
    target = tmp_path / "out"
    with (
        pytest.raises(ValueError, match="out was made by somebody else meanwhile"),
        folder.finished(folder.located(target)),
    ):
        target.mkdir()
        (target / "thesis.tex").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == ["thesis.tex"]


def test_a_folder_that_exists_stays_the_same_folder(tmp_path):
    """It may be a mounted disk, which has `lost+found` and cannot be renamed."""
    target = tmp_path / "out"
    (target / "lost+found").mkdir(parents=True)
    left = left_by_a_killed_export(target, "out")
    inode = target.stat().st_ino
    save(target, max_shard_bytes=2000)
    doubled = {"model": hf.jax.tree.map(lambda x: 2 * x, random_params(CONFIG)["model"])}
    save(target, doubled, overwrite=True)
    assert_equal_trees(reload(target), doubled)
    assert target.stat().st_ino == inode
    files = {"config.json", "generation_config.json", "model.safetensors", folder.MANIFEST}
    assert set(os.listdir(target)) == files | {"lost+found"} and not left.exists()


def test_a_killed_replacement_can_be_done_again(tmp_path):
    target = tmp_path / "out"
    save(target, max_shard_bytes=2000)
    (target / "config.json").unlink()
    left = left_by_a_killed_export(target, "out")  # files were being moved up
    save(target, overwrite=True)
    assert_equal_trees(reload(target), random_params(CONFIG))
    assert not left.exists() and len(os.listdir(target)) == 4


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_names_is_filled(tmp_path, there):
    disk, link = tmp_path / "disk" / "out", tmp_path / "link"
    if there:
        disk.mkdir(parents=True)
    link.symlink_to(disk)
    save(link)
    save(link, overwrite=True)
    assert link.is_symlink() and not disk.is_symlink()
    assert_equal_trees(reload(disk), random_params(CONFIG))
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"] and os.listdir(disk.parent) == ["out"]


def test_a_target_that_cannot_be_written_is_refused_before_anything_is(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()

    def problem(target, num_bytes=1):
        (text,) = hf.folder.problems(
            hf.folder.located(target), overwrite=False, num_bytes=num_bytes
        )
        return text

    assert problem(file) == f"{file} is a file; choose another folder"
    assert f"{file} cannot be written to (Not a directory)" in problem(file / "out")
    assert "cannot be written to" in problem("/proc/out")  # to nobody, root included
    assert "GB free; the export takes 1000000000.0 GB" in problem(tmp_path / "out", 10**18)
    assert os.listdir(tmp_path) == ["file"]


def test_every_file_has_the_mode_that_the_umask_gives(tmp_path):
    old = os.umask(0o027)
    try:
        save(tmp_path / "out", max_shard_bytes=4000, write_tokenizer=lambda f: (f / "t").touch())
    finally:
        os.umask(old)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"pad_token_id": 48}, {}),
        ({"pad_token_id": -1, "bos_token_id": 1}, {"bos_token_id": 1}),
        ({"pad_token_id": None}, {"pad_token_id": None}),
        ({"eos_token_id": [2, 3, 50]}, {"eos_token_id": [2, 3]}),
        ({"eos_token_id": [48], "forced_bos_token_id": 99}, {}),
        ({"suppress_tokens": [0, 48], "max_new_tokens": 99}, {"suppress_tokens": [0]}),
    ],
)
def test_ids_beyond_the_vocabulary_are_not_copied(tmp_path, given, written, caplog):
    transformers = pytest.importorskip("transformers")
    with caplog.at_level("WARNING"):
        save(tmp_path / "out", generation_config=given)
    fields = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {k: v for k, v in fields.items() if k != "max_new_tokens"} == written
    left_out = [name for name in given if given[name] != fields.get(name)]
    assert all(name in caplog.text for name in left_out)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.pad_token_id is None
    assert model.generation_config.eos_token_id == written.get("eos_token_id")


def test_a_failed_export_leaves_nothing(tmp_path):
    def write_tokenizer(folder):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "out", write_tokenizer=write_tokenizer)
    assert os.listdir(tmp_path) == []


SLOW_EXPORT = """
import sys, time
import numpy as np
sys.path.insert(0, "tests/interop")
import hf_models, test_hf_export

class Slow(np.ndarray):
    def __getitem__(self, layer):
        time.sleep(0.2)
        return np.asarray(self)[layer]

params = hf_models.jax.tree.map(
    lambda x: np.asarray(x).view(Slow), hf_models.random_params(test_hf_export.CONFIG)
)
test_hf_export.save(sys.argv[1], params, max_shard_bytes=2000)
"""


def test_a_killed_export_leaves_nothing_that_looks_finished(tmp_path):
    target = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_EXPORT, target],
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*/model-00003-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (partial,) = tmp_path.iterdir()
    assert atomic.is_temporary(partial.name) and not (partial / "config.json").exists()
    with pytest.raises(ValueError, match="does not exist"):
        hf.read_config(target)

    save(target)  # and the next one cleans up
    assert os.listdir(tmp_path) == ["out"]
    assert_equal_trees(reload(target), random_params(CONFIG))


@pytest.fixture
def bucket(monkeypatch):
    """`gs://` as a file system in memory, behind the interface the real one has."""
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry

    class Bucket(MemoryFileSystem):
        protocol = ("gcs", "gs")
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            path = path.removeprefix("gs://").removeprefix("gcs://").strip("/")
            return "/" + path if path else ""

    with monkeypatch.context() as patch:  # those who come later in this process have the real one
        patch.setitem(_registry, "gcs", Bucket)
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield Bucket.store
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_a_bucket_serves_as_well_as_a_disk(tmp_path, bucket):
    def write_tokenizer(folder):
        (folder / "tokenizer.json").write_text("{}")

    params = random_params(CONFIG)
    target = "gs://models/out"
    save(target, params, max_shard_bytes=2000, write_tokenizer=write_tokenizer)
    save(tmp_path / "out", params, max_shard_bytes=2000, write_tokenizer=write_tokenizer)
    assert {name.removeprefix("/models/out/") for name in bucket} == set(
        os.listdir(tmp_path / "out")
    )
    assert hf.read_config(target) == CONFIG
    assert hf.check_weights(target, CONFIG) == []
    assert_equal_trees(reload(target), params)

    with pytest.raises(ValueError, match="exists"):
        save(target, params)
    save(tmp_path / "single", params)
    save(target, params, overwrite=True)
    assert set(bucket) == {
        f"/models/out/{name}"
        for name in (
            "config.json", "generation_config.json", "model.safetensors", folder.MANIFEST
        )
    }  # fmt: skip
    whole = bucket["/models/out/model.safetensors"].getvalue()
    assert whole == (tmp_path / "single" / "model.safetensors").read_bytes()
    bucket["/models/out/model.safetensors"].truncate(len(whole) - 3)
    (problem,) = hf.check_weights(target, CONFIG)
    assert "is not a complete safetensors file" in problem
