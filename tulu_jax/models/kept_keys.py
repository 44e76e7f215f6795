"""The trunk with keys and values kept: those of packed prompts, and steps of one token a row."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Before:
    """What segments of packed rows begin with: `segment_ids` [B, P], 0 for nobody's, and their keys
    and values `cache` [L, B, P, K, H]; branch 0, which every branch of a segment sees."""

    segment_ids: Any
    cache: Any


def keys_and_values(
    config: LlamaConfig,
    execution: ExecutionConfig,
    params: llama.Params,
    *,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    branches: Int[Array, "B T"] | None = None,
    block: int | None,
    before: Before | None = None,
) -> llama.Cache:
    """`k` and `v` [L, B, T, K, H] of packed rows, in the compute dtype, for a decoder's cache;
    `block` is that of attention, None for the tuned one. `before` has what is computed already, for
    rows with `branches`."""

    def local(params, before, *rows):
        inputs = dataclasses.replace(llama.inputs_of(*rows), keep=True, block=block)
        if before is not None:
            inputs = _behind(inputs, before)
        return llama.trunk(config, execution, params)(inputs)[1]

    rows, whole = sharding.spec("batch", "length"), sharding.spec("batch", None)
    kept = sharding.spec("layers", "batch", "length", "kv_heads", "head_dim")
    cached = sharding.spec("layers", "batch", None, "kv_heads", "head_dim")
    begun = before and Before(segment_ids=whole, cache={"k": cached, "v": cached})
    branched = None if branches is None else rows
    specs = (sharding.param_specs(params), begun, rows, rows, rows, branched)
    run = sharding.per_device(local, specs, kept)
    return run(params, before, tokens, segment_ids, positions, branches)


def _behind(inputs: llama.Inputs, before: Before) -> llama.Inputs:
    """The same rows behind what some of their segments begin with."""
    joined = functools.partial(jnp.concatenate, axis=1)
    return dataclasses.replace(
        inputs,
        kv_segment_ids=joined([before.segment_ids, inputs.kv_segment_ids]),
        kv_branches=joined([jnp.zeros_like(before.segment_ids), inputs.kv_branches]),
        query_offset=before.segment_ids.shape[1] + inputs.query_offset,
        before=before.cache,
    )


def apart(config: LlamaConfig, execution: ExecutionConfig, params: llama.Params) -> list:
    """Each layer's module with parameters of its own, for `step`."""
    stacked = llama.trunk(config, execution, params).layers
    return [jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(config.num_layers)]


def step(
    config: LlamaConfig,
    execution: ExecutionConfig,
    params: llama.Params,
    cache: llama.Cached,
    attend: llama.Attend,
    *,
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    blocks: list | None = None,
) -> tuple[Float[Array, "B D"], llama.Cached]:
    """Normalised hidden states of one token a row, and the cache with its keys and values.

    `attend(q, k, v, cache, layer)` of queries [B, 1, N, H] and of their own keys and values
    [B, 1, K, H] in layer number `layer` gives what they see [B, 1, N, H], and the new cache:
    `paged_attention.attend`, `row_attention.attend` or a kernel in its place; `blocks` are
    those of `apart`, made before many steps, or None. XLA divides it over the ambient mesh.
    """
    model = llama.trunk(config, execution, params)
    hidden, cache = model.step(tokens[:, None], positions[:, None], cache, attend, blocks)
    return hidden[:, 0], cache
