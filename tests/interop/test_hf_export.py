"""The exported folder: opens in transformers, appears only when complete, also in a bucket."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hf_models import FLOAT32, VARIANTS, assert_equal_trees, one_device, random_llama, random_params

from tulu_jax.decode import sampler
from tulu_jax.interop import hf

CONFIG = hf.LlamaConfig(
    vocab_size=48, num_layers=3, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2,
    head_dim=4, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=64,
)  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
REPO = pathlib.Path(__file__).resolve().parents[2]


def save(folder, params=None, **changes):
    defaults = dict(dtype="float32", generation_config=IDS, write_tokenizer=None)
    hf.save(
        folder, random_params(CONFIG) if params is None else params, CONFIG, **defaults | changes
    )


def reload(folder):
    return hf.load(folder, hf.read_config(folder), shardings=one_device(), dtype="float32")


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
    ours = sampler.generate(
        config, FLOAT32, params, [prompt], max_new_tokens=24, eos_id=2, temperature=0.0,
        top_p=1.0, key=sampler.jax.random.key(0),
    )[0]  # fmt: skip
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
    assert ours == theirs[0, len(prompt) :].tolist()


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
    with pytest.raises(ValueError, match="exists; choose another folder, or pass overwrite=True"):
        save(target, doubled)
    assert (target / "model.safetensors").read_bytes() == first
    save(target, doubled, overwrite=True)
    assert_equal_trees(reload(target), doubled)
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_is_no_export_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not a Hugging Face folder and is not overwritten"):
        save(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    save(tmp_path / "out")
    assert_equal_trees(reload(tmp_path / "out"), random_params(CONFIG))


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
    while not list(tmp_path.glob("out.partial/model-00003-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path) == ["out.partial"]
    assert not (tmp_path / "out.partial" / "config.json").exists()
    with pytest.raises(ValueError, match="does not exist"):
        hf.read_config(target)

    save(target)  # and the next one cleans up
    assert os.listdir(tmp_path) == ["out"]
    assert_equal_trees(reload(target), random_params(CONFIG))


@pytest.fixture
def bucket(monkeypatch):
    """`gs://` as a file system in memory, behind the interface the real one has."""
    import fsspec
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = ("gcs", "gs")
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            path = path.removeprefix("gs://").removeprefix("gcs://").strip("/")
            return "/" + path if path else ""

    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    return Bucket.store


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
        for name in ("config.json", "generation_config.json", "model.safetensors")
    }
    whole = bucket["/models/out/model.safetensors"].getvalue()
    assert whole == (tmp_path / "single" / "model.safetensors").read_bytes()
    bucket["/models/out/model.safetensors"].truncate(len(whole) - 3)
    (problem,) = hf.check_weights(target, CONFIG)
    assert "is not a complete safetensors file" in problem
