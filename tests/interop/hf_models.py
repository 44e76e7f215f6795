"""Small random Hugging Face Llamas for the tests."""

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig

FLOAT32 = ExecutionConfig(compute_dtype="float32", attention="xla", remat=False)
BASE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)
VARIANTS = {
    "untied": {},
    "tied": dict(tie_word_embeddings=True),
    "grouped": dict(num_key_value_heads=2),
    "grouped_tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "wide_heads_theta": dict(
        head_dim=12,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-3,
    ),
}


def random_llama(seed: int = 0, **changes):
    """A `LlamaForCausalLM` whose every weight, norms included, is random and not small."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**BASE | changes, initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def random_params(config) -> dict:
    """Standard normal parameters, made by numpy."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        llama.abstract_params(config, "float32"),
    )


def one_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def assert_equal_trees(found, expected) -> None:
    """Same structure, dtypes and bits."""

    def compare(path, a, b):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))

    jax.tree.map_with_path(compare, found, expected)
