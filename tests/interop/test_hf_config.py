"""`config.json`: what is read, what is refused, and that transformers reads what we write."""

import json

import pytest

from tulu_jax.interop import hf
from tulu_jax.interop import layout as layout_lib
from tulu_jax.models import config as config_lib

LLAMA = dict(
    model_type="llama",
    vocab_size=32000,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=5,
    num_attention_heads=8,
)


def read(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return hf.read_config(folder)


def test_absent_fields_mean_what_transformers_reads_in_them(tmp_path):
    config = read(tmp_path, **LLAMA)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig(**LLAMA)
    assert config.num_kv_heads == theirs.num_key_value_heads == 8
    assert config.head_dim == theirs.head_dim == 8
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.max_positions == theirs.max_position_embeddings


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1000000},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
        {"rope_scaling": {"type": "default"}, "rope_theta": 1e6},
    ],
)
def test_every_place_of_the_rope_base(tmp_path, fields):
    assert read(tmp_path, **LLAMA, **fields).rope_theta == 1e6


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = {'type': 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "'rope_type': 'llama3'"),
        ({"attention_bias": True}, "attention_bias = True: expected False"),
        ({"mlp_bias": True}, "mlp_bias = True: expected False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': expected 'silu'"),
        ({"model_type": "mistral"}, "model_type = 'mistral': expected 'llama'"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2: expected 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: expected 1"),
        ({"sliding_window": 4096}, "sliding_window = 4096: expected None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: expected a positive whole number"),
        ({"num_key_value_heads": 3}, "num_heads = 8 is not a multiple of num_kv_heads = 3"),
        ({"vocab_size": "32000"}, "vocab_size = '32000': expected a positive whole number"),
    ],
)
def test_unsupported_fields_are_refused_by_name(tmp_path, fields, found):
    with pytest.raises(ValueError) as refusal:
        read(tmp_path, **LLAMA | fields)
    assert found in str(refusal.value)
    assert str(tmp_path / "config.json") in str(refusal.value)


def test_all_problems_are_listed_at_once(tmp_path):
    with pytest.raises(ValueError) as refusal:
        read(tmp_path, **LLAMA | dict(hidden_act="gelu", mlp_bias=True, model_type="qwen2"))
    for name in ("hidden_act", "mlp_bias", "model_type"):
        assert name in str(refusal.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\nsize 7\n")
    with pytest.raises(ValueError, match=r"config\.json: found a Git LFS pointer"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("name", sorted(config_lib.NAMED))
def test_published_models_have_hugging_faces_names_and_shapes(tmp_path, name):
    torch = pytest.importorskip("torch")
    import transformers

    config = config_lib.NAMED[name]
    (tmp_path / "config.json").write_text(json.dumps(hf.write_config(config)))
    assert hf.read_config(tmp_path) == config
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path))
    theirs = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert layout_lib.expected_weights(config) == theirs
    rope = model.config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"]) == (config.rope_theta, "default")
    assert model.config.rms_norm_eps == config.norm_eps
    assert model.config.max_position_embeddings == config.max_positions
