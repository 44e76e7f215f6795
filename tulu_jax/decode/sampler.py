"""Batched generation: one prefill, then a loop of single-token steps over a key/value cache.

Prompts are padded on the left, so the rows of a batch share the cache slot of each step; padding
has segment 0 and is seen by nobody, and positions start at 0 with the first real token. Lengths
and the number of rows are rounded up, so that few programs are compiled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from tulu_jax import validation
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.parallel.sharding import AXIS_RULES, constrain

SMALLEST, LARGEST_DOUBLING = 16, 256


def generate(
    config: LlamaConfig,
    execution: ExecutionConfig,
    params: llama.Params,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float,
    top_p: float,
    key: Key[Array, ""],
) -> list[list[int]]:
    """The continuation of each prompt: up to `max_new_tokens` ids, the last `eos_id` if it ended.

    Temperature 0 takes the most likely token. Otherwise tokens are drawn at `temperature` from the
    smallest set of likeliest tokens whose probability reaches `top_p`; a row's draws depend on
    `key` and its place in `prompts` alone. Under `jax.set_mesh`, `params` may be sharded. Raises
    `ValueError` for an empty prompt, an id outside the vocabulary or a setting out of range.
    """
    _check(
        prompts,
        vocab_size=config.vocab_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    if not prompts:
        return []
    tokens, segment_ids = _left_padded(prompts)
    new_tokens, lengths = _generate(
        params,
        tokens,
        segment_ids,
        config=config,
        execution=execution,
        num_slots=bucket(max_new_tokens),
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        sampling=None if temperature == 0 else (temperature, top_p, key),
    )
    rows = zip(np.asarray(new_tokens), np.asarray(lengths), strict=True)
    return [row[:length].tolist() for row, length in rows][: len(prompts)]


def bucket(length: int) -> int:
    """The padded length: the next power of two up to 256, then the next multiple of 256."""
    if length > LARGEST_DOUBLING:
        return -(-length // LARGEST_DOUBLING) * LARGEST_DOUBLING
    return max(SMALLEST, 1 << (length - 1).bit_length())


def _check(prompts, *, vocab_size: int, max_new_tokens: int, temperature: float, top_p: float):
    problems = [f"prompt {i} is empty" for i, prompt in enumerate(prompts) if not prompt]
    problems += [
        f"prompt {i} has the id {max(prompt)}; the model's vocabulary has {vocab_size}"
        for i, prompt in enumerate(prompts)
        if prompt and max(prompt) >= vocab_size
    ]
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens = {max_new_tokens}: expected at least 1")
    if temperature < 0:
        problems.append(f"temperature = {temperature}: expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        problems.append(f"top_p = {top_p}: expected more than 0 and at most 1")
    if problems:
        raise validation.UsageError("cannot generate: " + "; ".join(problems))


def _left_padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """tokens and segment_ids, int32 [B, P]; rows beyond the prompts are padding only."""
    mesh = jax.sharding.get_abstract_mesh().shape
    ways = int(np.prod([mesh.get(axis, 1) for axis in AXIS_RULES["batch"]]))
    rows = 1 << (len(prompts) - 1).bit_length()
    rows = -(-rows // ways) * ways
    length = bucket(max(map(len, prompts)))
    tokens, segment_ids = np.zeros((2, rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
    return tokens, segment_ids


@functools.partial(jax.jit, static_argnames=("config", "execution", "num_slots"))
def _generate(
    params: llama.Params,
    tokens: Int[Array, "B P"],
    segment_ids: Int[Array, "B P"],
    *,
    config: LlamaConfig,
    execution: ExecutionConfig,
    num_slots: int,
    max_new_tokens: Int[Array, ""],
    eos_id: Int[Array, ""],
    sampling: tuple[Float[Array, ""], Float[Array, ""], Key[Array, ""]] | None,
) -> tuple[Int[Array, "B M"], Int[Array, "B"]]:
    """New tokens in M = `num_slots` columns, and how many of them each row has."""
    (B, P), M = tokens.shape, num_slots
    params = _in_compute_dtype(params, execution.compute_dtype)
    lengths = segment_ids.sum(axis=1)
    row_segment = segment_ids.max(axis=1, keepdims=True)  # 0 for rows of padding only
    # Slots after the current one are hidden by causality, so this holds for every step.
    kv_segment_ids = jnp.concatenate([segment_ids, jnp.broadcast_to(row_segment, (B, M))], axis=1)
    forward = functools.partial(_next_logits, config, params, kv_segment_ids=kv_segment_ids)
    # A step computes one row of scores a head: the dense form is the least work.
    step_execution = dataclasses.replace(execution, attention="xla")

    def emit(i, logits, new_tokens, counts, ended):
        next_tokens = _choose(logits, i, sampling)
        new_tokens = new_tokens.at[:, i].set(next_tokens)
        return new_tokens, counts + ~ended, ended | (next_tokens == eos_id)

    def step(state):
        i, cache, *rows = state
        logits, cache = forward(
            step_execution,
            cache,
            tokens=jax.lax.dynamic_slice_in_dim(rows[0], i - 1, 1, axis=1),
            segment_ids=row_segment,
            positions=(lengths + i - 1)[:, None],
            slot=P + i - 1,
        )
        return i + 1, cache, *emit(i, logits, *rows)

    def unfinished(state):
        i, *_, ended = state
        return (i < max_new_tokens) & ~ended.all()

    logits, cache = forward(
        execution,
        _empty_cache(config, B, P + M, execution.compute_dtype),
        tokens=tokens,
        segment_ids=segment_ids,
        positions=jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0),
        slot=jnp.int32(0),
    )
    rows = (jnp.zeros((B, M), jnp.int32), jnp.zeros(B, jnp.int32), lengths == 0)
    state = (jnp.int32(1), cache, *emit(0, logits, *rows))
    *_, new_tokens, counts, _ = jax.lax.while_loop(unfinished, step, state)
    return constrain(new_tokens, None, None), constrain(counts, None)  # whole on every process


def _next_logits(config, params, execution, cache, *, slot, **inputs):
    """float32 logits [B, V] after the last of the tokens given, and the new cache."""
    hidden, cache = llama.decode(config, execution, params, cache, slot=slot, **inputs)
    return llama.project(hidden[:, -1:], params)[:, 0], cache


def _empty_cache(config: LlamaConfig, batch: int, length: int, dtype: str) -> llama.Cache:
    cache = llama.empty_cache(config, batch, length, dtype)
    return {
        name: constrain(x, "layers", "batch", None, "kv_heads", None) for name, x in cache.items()
    }


def _in_compute_dtype(params: llama.Params, dtype: str) -> llama.Params:
    """Matrices in the dtype they are multiplied in, once rather than in each step; norms as is."""

    def cast(path, leaf):
        is_norm = path[-1].key == "scale"
        return leaf if is_norm else leaf.astype(dtype)

    return jax.tree.map_with_path(cast, params)


def _choose(logits: Float[Array, "B V"], step, sampling) -> Int[Array, "B"]:
    """The next token of every row."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_p, key = sampling
    logits = logits / temperature
    logits = jnp.where(nucleus(logits, top_p), logits, -jnp.inf)
    key = jax.random.fold_in(key, step)
    rows = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(rows, logits).astype(jnp.int32)


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""] | float) -> Bool[Array, "B V"]:
    """The likeliest tokens up to the one that reaches `top_p`, and those as likely as it.

    Holtzman et al. 2020.
    """
    descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
    return logits >= jnp.take_along_axis(descending, last, axis=-1)
