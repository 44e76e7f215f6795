"""Whether a converted model computes what it did: our logits against those of `transformers`.

Both run layer by layer, in float32 from the same rounded weights, so one layer is in memory at a
time. What is held against what: a checkpoint of ours, and published weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from tulu_jax import validation
from tulu_jax.interop import layout as layout_lib
from tulu_jax.interop import reference_logits, sources
from tulu_jax.models import llama
from tulu_jax.models.config import SCORE, ExecutionConfig, LlamaConfig

ROWS, LENGTH = 2, 48
TOLERANCE = 5e-3  # of a standard deviation of the logits: float32 sums in other orders, 80 layers
_EXECUTION = ExecutionConfig(compute_dtype="float32", attention="xla", remat=False)


def check(params: llama.Params, published: str, config: LlamaConfig, *, dtype: str) -> None:
    """Compares the logits of random tokens. `params` are read a layer at a time, as `hf.save` reads
    them, and rounded to `dtype`, that of the weights `published`.

    Raises `UsageError` if the two differ by more than rounding.
    """
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    theirs = reference_logits.logits(sources.opened(published, config), config, tokens)
    ours = _logits(params, config, tokens, np.dtype(dtype))
    difference, deviation = float(np.abs(ours - theirs).max()), float(theirs.std())
    if not difference <= TOLERANCE * deviation:
        raise validation.UsageError(
            f"the logits of {published} by transformers and of the checkpoint by this project "
            f"differ by up to {difference:.3g}; expected at most {TOLERANCE * deviation:.3g}. Do "
            "not use what was converted; convert it again, and report this if it comes again"
        )
    logging.info(
        "Logits of %d tokens equal those of transformers to %.2g, of a standard deviation of %.2g",
        *(tokens.size, difference, deviation),
    )


def _logits(params: llama.Params, config: LlamaConfig, tokens, dtype: np.dtype) -> np.ndarray:
    layouts = layout_lib.layouts(config)

    def rounded(layout: layout_lib.Layout, parameter: Any, layer: int) -> np.ndarray:
        weight = np.asarray(parameter[layer] if layout.stacked else parameter)
        return weight.astype(dtype).astype(np.float32)

    model, of_model = params["model"], layouts["model"]
    table = rounded(of_model["embed_tokens"]["embedding"], model["embed_tokens"]["embedding"], 0)
    hidden = jnp.asarray(table[tokens])
    through = jax.jit(functools.partial(llama.through_layer, config, _EXECUTION))
    for layer in tqdm.trange(config.num_layers, desc="verify"):
        one = jax.tree.map(
            functools.partial(rounded, layer=layer), of_model["layers"], model["layers"]
        )
        hidden = through(one, hidden)
    norm = jnp.asarray(rounded(of_model["norm"]["scale"], model["norm"]["scale"], 0))
    hidden = llama.last_norm(config, norm, hidden)
    if config.tie_embeddings and config.head != SCORE:
        return np.asarray(hidden) @ table.T
    head = rounded(layouts[config.head]["kernel"], params[config.head]["kernel"], 0)
    return np.asarray(hidden) @ head
