"""A small random Llama that speaks tulu_tiny's tokenizer: as an engine, and as a folder."""

import pathlib

import builders
import jax
import numpy as np

from tulu_jax.data import chat
from tulu_jax.decode.decoder import Decoder
from tulu_jax.interop import hf, tokenizer_export
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig
from tulu_jax.serving import engine


def params(seed: int = 0) -> dict:
    """Random parameters whose model says something else at every place."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), "float32"),
        llama.abstract_params(builders.MODEL, "float32"),
    )


def own_engine(tokenizer, *, seed: int = 0) -> engine.OwnEngine:
    decoder = Decoder(builders.MODEL, ExecutionConfig(compute_dtype="float32"), slots=4, steps=8)
    return engine.OwnEngine(decoder, params(seed), tokenizer, mesh=None)


def save(folder: pathlib.Path, tokenizer: chat.ChatTokenizer, *, seed: int = 0) -> pathlib.Path:
    """That model as a Hugging Face folder, with TÜLU's chat template."""
    hf.save(
        folder, params(seed), builders.MODEL, dtype="float32", generation_config={},
        write_tokenizer=lambda path: tokenizer_export.save(
            tokenizer.backend, str(path), max_length=None, mode="spec"
        ),
    )  # fmt: skip
    return folder
