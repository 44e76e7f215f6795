"""Weights in and out: logits, bit-exact round trips, sharded files, meshes, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hf_models import FLOAT32, VARIANTS, assert_equal_trees, one_device, random_llama, random_params

from tulu_jax.interop import hf, weight_files
from tulu_jax.models import llama
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding as sharding_lib

IDS = {"bos_token_id": 1, "eos_token_id": 2}
TOLERANCE = 1e-4  # float32 sums in another order, through a few layers


def load(folder, *, dtype="float32"):
    config = hf.read_config(folder)
    return config, hf.load(folder, config, shardings=one_device(), dtype=dtype)


def our_logits(config, params, tokens):
    B, T = tokens.shape
    return llama.logits(
        config,
        FLOAT32,
        params,
        tokens=jnp.asarray(tokens),
        segment_ids=jnp.ones((B, T), jnp.int32),
        positions=jnp.tile(jnp.arange(T)[None], (B, 1)),
    )


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def all_weights(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype, name
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


@pytest.fixture
def checkpoint(tmp_path):
    """A grouped-query, untied model as safetensors, written without torch."""
    config = hf.LlamaConfig(
        vocab_size=48, num_layers=3, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2,
        head_dim=4, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=64,
    )  # fmt: skip
    save(tmp_path / "model", random_params(config), config)
    return tmp_path / "model"


def save(folder, params, config, **changes):
    defaults = dict(dtype="float32", generation_config=IDS, write_tokenizer=None)
    hf.save(folder, params, config, **defaults | changes)


def rewrite(folder, change):
    """Applies `change` to the dict of weights of a single-file checkpoint."""
    weights = all_weights(folder)
    change(weights)
    safetensors.numpy.save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant):
    pytest.importorskip("torch")
    model = random_llama(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40), dtype=np.int32)
    theirs = their_logits(model, tokens)
    assert theirs.std() > 0.5  # or the tolerance would say nothing
    np.testing.assert_allclose(our_logits(config, params, tokens), theirs, atol=TOLERANCE)


def test_logits_of_a_trained_model_equal_the_stored_ones(shared_data):
    config, params = load(shared_data / "models" / "stories260K-hf")
    stored = np.load(shared_data / "reference_vectors" / "stories260K_hf_logits.npz")
    ours = our_logits(config, params, stored["ids_0"][None])[0]
    np.testing.assert_allclose(ours, stored["logits_0"], atol=TOLERANCE)


def test_logits_of_a_trained_model_equal_transformers(shared_data):
    pytest.importorskip("torch")
    import transformers

    folder = shared_data / "models" / "stories260K-hf"
    config, params = load(folder)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 200), dtype=np.int32)
    theirs = their_logits(transformers.AutoModelForCausalLM.from_pretrained(folder), tokens)
    np.testing.assert_allclose(our_logits(config, params, tokens), theirs, atol=TOLERANCE)


@pytest.mark.parametrize("shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize("variant", ["grouped_tied", "wide_heads_theta"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_exact(tmp_path, dtype, variant, shard_size):
    torch = pytest.importorskip("torch")
    model = random_llama(**VARIANTS[variant]).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    config, params = load(tmp_path / "theirs", dtype=dtype)
    max_bytes = 10_000 if shard_size == "10KB" else hf.MAX_SHARD_BYTES
    save(tmp_path / "ours", params, config, dtype=dtype, max_shard_bytes=max_bytes)

    assert_same_weights(all_weights(tmp_path / "ours"), all_weights(tmp_path / "theirs"))
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (shard_size == "10KB")
    again, params_again = load(tmp_path / "ours", dtype=dtype)
    assert again == config
    assert_equal_trees(params_again, params)


def test_shards_stay_below_the_limit_and_the_index_covers_them(tmp_path, checkpoint):
    config, params = load(checkpoint)
    save(tmp_path / "out", params, config, max_shard_bytes=4000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        weights = safetensors.numpy.load_file(file)
        size = sum(weight.nbytes for weight in weights.values())
        assert size <= 4000 or len(weights) == 1
        assert all(index["weight_map"][name] == file.name for name in weights)
        total += size
    assert index["metadata"]["total_size"] == total == config.num_params * 4


@pytest.mark.parametrize("source", ["float16", "bfloat16"])
def test_half_precision_sources_are_exact_in_float32(tmp_path, checkpoint, source):
    narrow = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[source]
    rewrite(checkpoint, lambda weights: weights.update(
        {name: weight.astype(narrow) for name, weight in weights.items()}
    ))  # fmt: skip
    expected = all_weights(checkpoint)
    config, params = load(checkpoint)
    save(tmp_path / "out", params, config)
    found = all_weights(tmp_path / "out")
    assert_same_weights(found, {name: w.astype(np.float32) for name, w in expected.items()})


@pytest.mark.parametrize(
    "sizes",
    [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(context=2, fsdp=2, tensor=2), dict(data=8)],
)
def test_loading_onto_a_mesh_equals_loading_onto_one_device(checkpoint, tmp_path, sizes):
    config, expected = load(checkpoint)
    mesh = mesh_lib.make(mesh_lib.MeshConfig(**dict(fsdp=1) | sizes))
    shardings = sharding_lib.param_shardings(mesh, llama.abstract_params(config, "float32"))
    with jax.set_mesh(mesh):
        params = hf.load(checkpoint, config, shardings=shardings, dtype="float32")
    jax.tree.map(lambda x, s: pytest.fail("sharding") if x.sharding != s else 0, params, shardings)
    assert_equal_trees(params, expected)
    with jax.set_mesh(mesh):
        save(tmp_path / "out", params, config)
    assert_same_weights(all_weights(tmp_path / "out"), all_weights(checkpoint))


def test_every_row_of_a_file_is_read_once(checkpoint, monkeypatch):
    """Even where the parameter is replicated over all 8 devices."""
    config = hf.read_config(checkpoint)
    read = []
    rows = weight_files.WeightFiles.rows

    def counting(self, name, index):
        block = rows(self, name, index)
        read.append(block.size)
        return block

    monkeypatch.setattr(weight_files.WeightFiles, "rows", counting)
    mesh = mesh_lib.make(mesh_lib.MeshConfig(data=8, fsdp=1))
    shardings = sharding_lib.param_shardings(mesh, llama.abstract_params(config, "float32"))
    hf.load(checkpoint, config, shardings=shardings, dtype="float32")
    assert sum(read) == config.num_params
    assert max(read) == 48 * 16 // 8  # an eighth of the largest weight


def test_a_checkpoint_that_fits_has_no_problems(checkpoint):
    assert hf.check_weights(checkpoint, hf.read_config(checkpoint)) == []


def test_missing_unexpected_and_misshapen_weights_are_all_listed(checkpoint):
    def damage(weights):
        del weights["model.norm.weight"]
        for layer in (0, 1):
            del weights[f"model.layers.{layer}.mlp.up_proj.weight"]
        weights["model.layers.2.self_attn.k_proj.weight"] = np.zeros((16, 16), np.float32)
        weights["model.layers.1.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
        weights["score.weight"] = np.zeros((2, 16), np.float32)
        weights["lm_head.weight"] = np.zeros((48, 16), np.int8)

    config = hf.read_config(checkpoint)
    rewrite(checkpoint, damage)
    assert hf.check_weights(checkpoint, config) == [
        "model.layers.0-1.mlp.up_proj.weight is missing; expected shape [24, 16]",
        "model.layers.2.self_attn.k_proj.weight has shape [16, 16]; expected [8, 16]",
        "model.norm.weight is missing; expected shape [16]",
        "lm_head.weight is of type I8; expected F32, BF16 or F16",
        "model.layers.1.self_attn.q_proj.bias of shape [16] is not a weight of this model",
        "score.weight of shape [2, 16] is not a weight of this model",
    ]
    with pytest.raises(ValueError, match=r"do not fit the model:\n  1\. model(.|\n)*  6\. "):
        hf.load(checkpoint, config, shardings=one_device(), dtype="float32")


def test_another_vocabulary_is_refused(checkpoint):
    config = dataclasses.replace(hf.read_config(checkpoint), vocab_size=32000)
    assert hf.check_weights(checkpoint, config) == [
        "model.embed_tokens.weight has shape [48, 16]; expected [32000, 16]",
        "lm_head.weight has shape [48, 16]; expected [32000, 16]",
    ]


def test_rotary_buffers_are_ignored(checkpoint):
    rewrite(checkpoint, lambda weights: weights.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    ))  # fmt: skip
    load(checkpoint)


def test_a_redundant_head_of_a_tied_model_must_equal_the_embedding(tmp_path):
    config = hf.LlamaConfig(
        vocab_size=24, num_layers=1, embed_dim=8, mlp_dim=8, num_heads=2, num_kv_heads=2,
        head_dim=4, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=64,
    )  # fmt: skip
    save(tmp_path / "m", random_params(config), config)
    expected = load(tmp_path / "m")
    embedding = all_weights(tmp_path / "m")["model.embed_tokens.weight"]
    rewrite(tmp_path / "m", lambda w: w.update({"lm_head.weight": embedding.copy()}))
    assert_equal_trees(load(tmp_path / "m")[1], expected[1])
    rewrite(tmp_path / "m", lambda w: w.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load(tmp_path / "m")


def test_what_is_no_torch_archive_is_refused_with_the_remedy(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    (problem,) = hf.check_weights(checkpoint, hf.read_config(checkpoint))
    assert "pytorch_model.bin is not a complete torch archive" in problem
    assert "torch.load(weights_only=True)" in problem


def test_damaged_folders_are_named(checkpoint, tmp_path):
    config, params = load(checkpoint)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    (problem,) = hf.check_weights(checkpoint, config)
    assert f"{file} is not a complete safetensors file" in problem
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9000\n")
    (problem,) = hf.check_weights(checkpoint, config)
    assert f"{file}: found a Git LFS pointer, expected the file of 9,000 bytes" in problem
    file.unlink()
    (problem,) = hf.check_weights(checkpoint, config)
    assert "neither model.safetensors nor model.safetensors.index.json" in problem
    (problem,) = hf.check_weights(checkpoint / "nowhere", config)
    assert "is not a folder" in problem

    save(tmp_path / "sharded", params, config, max_shard_bytes=4000)
    removed = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    removed.unlink()
    problems = hf.check_weights(tmp_path / "sharded", config)
    assert problems[0].startswith(f"{removed} is missing")
    assert any("is missing; expected shape" in problem for problem in problems[1:])


@pytest.fixture
def both_forms(checkpoint):
    """A folder with a whole `model.safetensors` and, beside it, an older whole sharded form."""
    config, params = load(checkpoint)
    old = jax.tree.map(lambda leaf: 2 * leaf, params)
    save(checkpoint.parent / "old", old, config, max_shard_bytes=4000)
    for file in (checkpoint.parent / "old").glob("model*"):
        file.rename(checkpoint / file.name)
    return checkpoint, config, params


def test_an_index_beside_a_whole_file_is_refused_with_both_names(both_forms):
    folder, config, _ = both_forms
    (problem,) = (p for p in hf.check_weights(folder, config))
    assert "model.safetensors and the" in problem and "model.safetensors.index.json" in problem
    assert "remove" in problem and "model-00001-of-" in problem
    with pytest.raises(ValueError, match="both whole"):
        load(folder)


@pytest.mark.parametrize("left", ["none", "some", "a broken index"])
def test_a_leftover_index_does_not_hide_the_whole_file(both_forms, left, caplog):
    """As in transformers, which opens `model.safetensors` before it looks for an index."""
    folder, config, params = both_forms
    for file in sorted(folder.glob("model-*"))[left == "some" :]:
        file.unlink()
    if left == "a broken index":
        (folder / "model.safetensors.index.json").write_text("{")
    assert hf.check_weights(folder, config) == []
    with caplog.at_level("WARNING"):
        assert_equal_trees(load(folder)[1], params)
    assert "Not read" in caplog.text and "model.safetensors.index.json" in caplog.text


def test_files_beside_those_that_are_read_are_told(checkpoint, caplog):
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "consolidated.safetensors"):
        (checkpoint / name).write_bytes(b"not opened")
    (checkpoint / "training_args.bin").touch()
    with caplog.at_level("WARNING"):
        load(checkpoint)
    (record,) = (r for r in caplog.records if "Not read" in r.getMessage())
    found = "['consolidated.safetensors', 'model.fp16.safetensors', 'pytorch_model.bin']"
    assert found in record.getMessage()


def test_the_folder_of_an_adapter_is_refused(checkpoint):
    (checkpoint / "adapter_config.json").write_text("{}")
    (problem,) = hf.check_weights(checkpoint, hf.read_config(checkpoint))
    assert "PEFT adapter" in problem and "merge_and_unload" in problem


def test_weights_are_not_read_for_a_model_that_computes_otherwise(checkpoint):
    config = dataclasses.replace(hf.read_config(checkpoint), rope_theta=1e6, max_positions=1)
    with pytest.raises(ValueError, match=r"says rope_theta = 10000.0; the run's model has") as said:
        hf.load(checkpoint, config, shardings=one_device(), dtype="float32")
    assert "max_position" not in str(said.value)


def test_parameters_of_another_model_are_not_exported(checkpoint, tmp_path):
    config, params = load(checkpoint)
    with pytest.raises(ValueError, match=r"model/norm/scale: found \(16,\), expected \(32,\)"):
        save(tmp_path / "out", params, dataclasses.replace(config, embed_dim=32))
    assert not (tmp_path / "out").exists()


def test_leaves_may_be_memory_maps(checkpoint, tmp_path):
    config, params = load(checkpoint)
    maps = {}
    for path, leaf in jax.tree.flatten_with_path(params)[0]:
        file = tmp_path / f"{len(maps)}.npy"
        np.save(file, leaf)
        maps[path] = np.load(file, mmap_mode="r")
    lazy = jax.tree.map_with_path(lambda path, _: maps[path], params)
    save(tmp_path / "out", lazy, config)
    assert_same_weights(all_weights(tmp_path / "out"), all_weights(checkpoint))
