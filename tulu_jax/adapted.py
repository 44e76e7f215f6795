"""What a run of adapters trained: an adapter for PEFT, or one model with the adapter merged.

QLoRA trains beside a base in few bits. The paper merges into that base as it was seen, dequantised;
merging into the weights before they were quantised is another model. Both are named, and `gaps`
measures both against the model that was trained.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from tulu_jax import base as base_lib
from tulu_jax import step as step_lib
from tulu_jax import trained, validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.models import llama, lora
from tulu_jax.models.config import SCORE
from tulu_jax.parallel import sharding
from tulu_jax.quant import nf4
from tulu_jax.recipe import TrainConfig
from tulu_jax.training.state import Frozen

MERGES = ("dequantised", "full")


def merged(config: TrainConfig, params: llama.Params, into: str, mesh) -> llama.Params:
    """`params` of `trained.load`, with adapters, as one model in `param_dtype`.

    `into` is 'dequantised', the base as it was trained beside, or 'full', the weights that were
    quantised, which are loaded again.
    """
    trains = lora.only(params) | {name: params[name] for name in (SCORE,) if name in params}
    if into == "full" and config.quant is not None:
        logging.info("Loading base = %r in full precision", config.base)
        params = base_lib.policy_params(dataclasses.replace(config, quant=None), mesh)
        params = step_lib.split(config, params)[1].base
    like = llama.abstract_params(config.trained_model, config.param_dtype)
    shardings = sharding.param_shardings(mesh, like)
    frozen = {name: leaves for name, leaves in lora.without(params).items() if name != SCORE}

    def run(frozen, trains):
        kernels = nf4.dequantise_params(frozen, {name: like[name] for name in frozen})
        whole = Frozen(base=kernels).whole(trains)
        return lora.merge(config.adapter, whole, config.param_dtype)

    return jax.jit(run, out_shardings=shardings)(frozen, trains)


def check(config: TrainConfig, step: int | None, prompts: list[str]) -> list[str]:
    """`gaps` of the checkpoint of `step`, or the latest."""
    if config.objective.head == SCORE:
        raise validation.UsageError(
            "--check compares log-probabilities, which a reward model has not; go without it"
        )
    mesh, params = trained.load(config, step=trained.saved_step(config, step))
    with jax.set_mesh(mesh):
        return gaps(config, params, prompts, mesh)


def gaps(config: TrainConfig, params: llama.Params, prompts: list[str], mesh) -> list[str]:
    """A line for each way to merge: how far its next-token log-probabilities are from those of the
    model that was trained, over all positions of `prompts`, in nats, and how often both find the
    same token likeliest."""
    with validation.reading():
        tokenizer = chat_lib.load_tokenizer(trained.tokenizer_path(config))
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    expected = _log_probs(config, params, rows)
    lines = []
    for into in MERGES if config.quant is not None else ("full",):
        found = _log_probs(config, merged(config, params, into, mesh), rows)
        apart = [np.abs(a - b) for a, b in zip(found, expected, strict=True)]
        same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(found, expected, strict=True)]
        lines.append(
            f"merged into the {into} base: log-probabilities differ by "
            f"{np.mean([x.mean() for x in apart]):.2g} on average and "
            f"{max(x.max() for x in apart):.2g} at most; the likeliest token is the same at "
            f"{100 * np.concatenate(same).mean():.1f} % of {len(np.concatenate(same))} positions"
        )
    return lines


def _log_probs(config: TrainConfig, params: llama.Params, rows: list[list[int]]):
    """float32 [T, V] of each row, in copies for all devices and padded: any mesh divides them."""
    devices, length = jax.device_count(), max(map(len, rows))
    length += -length % devices
    execution = dataclasses.replace(config.execution, attention="xla")

    @jax.jit
    def score(params, tokens, segment_ids):
        places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
        batch = dict(tokens=tokens, segment_ids=segment_ids, positions=places)
        logits = llama.logits(config.model, execution, params, **batch)
        return sharding.replicate(jax.nn.log_softmax(logits[:1]))

    found = []
    for row in rows:
        tokens, segment_ids = np.zeros((2, devices, length), np.int32)
        tokens[:, : len(row)], segment_ids[:, : len(row)] = row, 1
        found.append(np.asarray(score(params, tokens, segment_ids))[0, : len(row)])
    return found
