"""`config.json`: what is read, what is refused, and that transformers reads what we write."""

import json
import random
import re

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
        ({"rope_theta": None}, "rope_theta = None: expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "found NaN; expected a finite number"),
        ({"rope_scaling": {"rope_type": None}}, "rope_scaling = {'rope_type': None}"),
        ({"hidden_size": 60}, "hidden_size = 60 is not a multiple of num_attention_heads = 8"),
        ({"attention_chunk_size": 64}, "attention_chunk_size = 64: expected None"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights = 'other.safe"),
        ({"layer_types": ["sliding_attention"] * 5}, "layer_types = ['sliding_attention'"),
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


PLACES = {
    "pretraining_tp": (1, 2, None),
    "rope_scaling": (
        None, {}, {"type": "default"}, {"rope_type": "default", "rope_theta": 7e4},
        {"factor": 2.0}, {"type": "linear", "factor": 1.0}, {"type": "linear", "factor": 2.0},
        {"rope_type": "default", "type": "linear"}, {"type": None}, {"type": "dynamic"},
    ),
    "rope_parameters": (
        None, {}, {"rope_theta": 5e5}, {"type": "default", "rope_theta": 2e4},
        {"rope_type": "default"}, {"rope_type": None}, {"rope_theta": None}, {"factor": 4.0},
    ),
    "rope_theta": (1e4, 1e6, 500000, None, "10000"),
    "rms_norm_eps": (1e-5, 1e-6, None, "1e-5"),
    "num_key_value_heads": (None, 2, 8, 3, 16),
    "head_dim": (None, 12, 8),
    "tie_word_embeddings": (True, False),
    "hidden_act": ("silu", "swish", "gelu"),
    "attention_bias": (False, True),
    "mlp_bias": (False, True),
    "dtype": ("bfloat16", None),
    "torch_dtype": ("float16", None),
    "max_position_embeddings": (128, 8192),
    "hidden_size": (64, 96, 60),
    "unheard_of": (1, {"a": 2}),
}  # fmt: skip


def test_every_config_means_what_it_does_to_transformers_or_is_refused(tmp_path):
    """Drawn fields: the same values in each place, the same rotary angles, or a refusal."""
    torch = pytest.importorskip("torch")
    import transformers
    from transformers.models.llama import modeling_llama

    rng, loaded = random.Random(0), 0
    for _ in range(400):
        drawn = {name: rng.choice(values) for name, values in PLACES.items() if rng.random() < 0.2}
        try:
            ours = read(tmp_path, **LLAMA | drawn)
        except ValueError as refusal:
            assert re.search(rf"\b({'|'.join(drawn)}|num_heads)\b.* = ", str(refusal)), drawn
            continue
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        rotary = modeling_llama.LlamaRotaryEmbedding(theirs)
        exponents = torch.arange(0, ours.head_dim, 2).float() / ours.head_dim
        torch.testing.assert_close(rotary.inv_freq, ours.rope_theta**-exponents)
        assert (rotary.attention_scaling, theirs.hidden_act) in [(1.0, "silu"), (1.0, "swish")]
        assert not theirs.attention_bias and not theirs.mlp_bias
        assert (ours.head_dim, ours.num_kv_heads) == (theirs.head_dim, theirs.num_key_value_heads)
        assert (ours.norm_eps, ours.embed_dim) == (theirs.rms_norm_eps, theirs.hidden_size)
        assert ours.tie_embeddings == theirs.tie_word_embeddings
        assert ours.max_positions == theirs.max_position_embeddings
        loaded += 1
    assert 100 < loaded < 300


@pytest.mark.parametrize(
    "fields",
    [
        {"pretraining_tp": 2},
        {"rope_scaling": {}},
        {"rope_parameters": {"rope_theta": 1e4}},
        {"rope_parameters": {}},
        {"rope_scaling": {"factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"head_dim": None, "num_key_value_heads": None},
        {"dtype": "bfloat16", "unheard_of": {"a": 1}},
    ],
)
def test_what_transformers_takes_for_a_plain_llama_is_one(tmp_path, fields):
    assert read(tmp_path, **LLAMA | fields) == read(tmp_path, **LLAMA)


def test_a_config_that_computes_otherwise_is_told_by_field(tmp_path):
    model = read(tmp_path, **LLAMA | dict(rms_norm_eps=1e-5, max_position_embeddings=4096))
    assert hf.config_problems(tmp_path, model) == []
    read(tmp_path, **LLAMA | dict(rms_norm_eps=9.999999747378752e-06, max_position_embeddings=8192))
    assert hf.config_problems(tmp_path, model) == []  # the same float32; positions are unbounded
    read(tmp_path, **LLAMA | dict(rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True))
    file = tmp_path / "config.json"
    end = ". Take the model of that value in the gin file, or mend config.json if it is wrong"
    assert hf.config_problems(tmp_path, model) == [
        f"{file} says rope_theta = 1000000.0; the run's model has rope_theta = 10000.0{end}",
        f"{file} says rms_norm_eps = 1e-06; the run's model has norm_eps = 1e-05{end}",
        f"{file} says tie_word_embeddings = True; the run's model has tie_embeddings = False{end}",
    ]
    file.write_text(json.dumps(LLAMA | dict(rope_scaling={"type": "linear", "factor": 2.0})))
    (problem,) = hf.config_problems(tmp_path, model)
    assert problem.startswith(f"{file} says rope_scaling = {{'type': 'linear'")


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
