"""Llama in Flax NNX, and the plain functions everything else calls.

Outside this folder a model is its `LlamaConfig` and a plain nested dict of arrays, whose paths are
Hugging Face's without the layer number: `model/layers/self_attn/q_proj/kernel` `[L, D, N, H]`.
Layers are stacked on axis 0 and run by `jax.lax.scan`.

Training runs the layers as each device sees them (`sharding.per_device`): B rows of its own, T / C
positions of a row over `context`, N / M heads and F / M of the MLP over `tensor`. Between blocks
the positions are divided over `tensor` as well, so norms and residuals exist once (sequence
parallelism, Korthikanti et al. 2022). Where a device has many positions they go through a layer in
two parts, so that one part is computed while the other is moved over `tensor`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from tulu_jax.models import attention as attention_lib
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.parallel import sharding

Params = dict[str, Any]
Cache = dict[str, jax.Array]

# What the remat policies of these names keep of each layer.
_ATTENTION = ("attention_q", "attention_k", "attention_v", "attention_out", "attention_lse")
SAVED = {
    "save_projections": (*_ATTENTION, "residual", "gate", "up"),
    "save_gate": (*_ATTENTION, "residual", "gate"),
    "save_attention": (*_ATTENTION, "residual"),
}
PART = 256  # positions of a row on a device that are worth a part
INIT_STDDEV = 0.02  # Llama's `initializer_range`


class Projection(nnx.Module):
    """An einsum with one kernel, computed in the dtype of its input.

    It takes and gives a list of parts. The kernel's `embed` axis is gathered for them, once; over
    `tensor` it stays divided.
    """

    def __init__(self, name: str, equation: str, shape: tuple[int, ...], *, rngs: nnx.Rngs):
        self.name, self.equation = f"model/layers/{name}/kernel", equation
        self.kernel = nnx.Param(INIT_STDDEV * jax.random.normal(rngs.params(), shape))

    def __call__(self, parts):
        kernel = self.kernel[...].astype(parts[0].dtype)
        kernel = sharding.whole(kernel, self.name, but=("heads", "kv_heads", "mlp"))
        return [jnp.einsum(self.equation, part, kernel) for part in parts]


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (x32 * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def rotary_angles(positions: Int[Array, "B T"], *, head_dim: int, theta: float):
    """cos and sin, each float32 [B, T, 1, H/2]; bfloat16 angles are wrong past ~256 positions."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, cos, sin):
    """Rotary embedding of [B, T, heads, H] in the half-split form Hugging Face weights expect."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class SelfAttention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = Projection("self_attn/q_proj", "BTD,DNH->BTNH", (D, N, H), rngs=rngs)
        self.k_proj = Projection("self_attn/k_proj", "BTD,DKH->BTKH", (D, K, H), rngs=rngs)
        self.v_proj = Projection("self_attn/v_proj", "BTD,DKH->BTKH", (D, K, H), rngs=rngs)
        self.o_proj = Projection("self_attn/o_proj", "BTNH,NHD->BTD", (N, H, D), rngs=rngs)

    def __call__(self, parts, *, angles, visibility, cache, query_offset):
        q = rotate(_joined(self.q_proj(parts)), *angles)
        k = rotate(_joined(self.k_proj(parts)), *angles)
        v = _joined(self.v_proj(parts))
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache["k"], k, query_offset, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache["v"], v, query_offset, axis=1)
            cache = {"k": k, "v": v}
        # Over `context` the queries stay sharded and keys and values are gathered.
        k, v = checkpoint_name(k, "key"), checkpoint_name(v, "value")
        k, v = sharding.gather(k, 1, "length"), sharding.gather(v, 1, "length")
        out = attention_lib.attend(q, k, v, visibility)
        return self.o_proj(_parted(out, len(parts))), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.mlp_dim
        self.gate_proj = Projection("mlp/gate_proj", "BTD,DF->BTF", (D, F), rngs=rngs)
        self.up_proj = Projection("mlp/up_proj", "BTD,DF->BTF", (D, F), rngs=rngs)
        self.down_proj = Projection("mlp/down_proj", "BTF,FD->BTD", (F, D), rngs=rngs)

    def __call__(self, parts):
        gates = [checkpoint_name(gate, "gate") for gate in self.gate_proj(parts)]
        ups = [checkpoint_name(up, "up") for up in self.up_proj(parts)]
        return self.down_proj([jax.nn.silu(g) * up for g, up in zip(gates, ups, strict=True)])


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.self_attn = SelfAttention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, parts, **attention_inputs):
        with jax.named_scope("attention"):
            normed = _gathered(self.input_layernorm, parts)
            outs, cache = self.self_attn(normed, **attention_inputs)
            parts = [checkpoint_name(part, "residual") for part in _added(parts, outs)]
        with jax.named_scope("mlp"):
            normed = _gathered(self.post_attention_layernorm, parts)
            parts = _added(parts, self.mlp(normed))
        return parts, cache


def _gathered(norm, parts):
    """Each part normalised, with the positions of all devices along `tensor`."""
    return [sharding.gather(norm(part), 1, "tensor") for part in parts]


def _added(parts, outs):
    """Each part plus its own positions of what the devices along `tensor` sum."""
    return [p + sharding.scatter_sum(o, 1, "tensor") for p, o in zip(parts, outs, strict=True)]


def _joined(parts):
    """Gathered parts [B, M · S, ...] as one array, in the order of the row."""
    if len(parts) == 1:
        return parts[0]
    tensor = sharding.axis_size("tensor")
    shards = [x.reshape(x.shape[0], tensor, 1, -1, *x.shape[2:]) for x in parts]
    x = jnp.concatenate(shards, axis=2)
    return x.reshape(x.shape[0], -1, *x.shape[4:])


def _parted(x, count: int):
    """`count` arrays that `_joined` would join to `x`."""
    if count == 1:
        return [x]
    tensor = sharding.axis_size("tensor")
    shards = x.reshape(x.shape[0], tensor, count, -1, *x.shape[2:])
    return [shards[:, :, n].reshape(x.shape[0], -1, *x.shape[2:]) for n in range(count)]


class Embedding(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = nnx.Param(INIT_STDDEV * jax.random.normal(rngs.params(), shape))

    def __call__(self, tokens, dtype):
        table = sharding.whole(self.embedding[...].astype(dtype), "model/embed_tokens/embedding")
        return table[tokens]


class Trunk(nnx.Module):
    """Everything but the output projection: tokens to normalised hidden states."""

    def __init__(self, config: LlamaConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs):
        self.config, self.execution = config, execution
        self.embed_tokens = Embedding(config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Block(config, rngs=rngs)

        self.layers = stacked(rngs)
        self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps)

    def __call__(
        self,
        tokens,
        segment_ids,
        positions,
        branches,
        kv_segment_ids,
        kv_branches,
        cache,
        query_offset,
    ):
        own = sharding.own(tokens, 1, "tensor")
        x = self.embed_tokens(own, jnp.dtype(self.execution.compute_dtype))
        inputs = dict(
            angles=rotary_angles(
                positions, head_dim=self.config.head_dim, theta=self.config.rope_theta
            ),
            visibility=attention_lib.prepare(
                segment_ids=segment_ids,
                kv_segment_ids=kv_segment_ids,
                branches=branches,
                kv_branches=kv_branches,
                query_offset=query_offset,
                implementation=attention_lib.choose(
                    self.execution.attention,
                    queries=tokens.shape[1],
                    keys=kv_segment_ids.shape[1],
                    platform=attention_lib.platform(),
                    dtype=x.dtype,
                ),
                heads=(
                    self.config.num_heads // sharding.axis_size("heads"),
                    self.config.num_kv_heads // sharding.axis_size("kv_heads"),
                    self.config.head_dim,
                ),
                dtype=x.dtype,
                block=self.execution.attention_block,
            ),
            query_offset=query_offset,
        )

        def body(parts, layer):
            block, layer_cache = layer
            return block(parts, cache=layer_cache, **inputs)

        if self.execution.remat and cache is None:
            policy = _remat_policy(self.execution.remat_policy)
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        halves = sharding.axis_size("tensor") > 1 and x.shape[1] >= 2 * PART and x.shape[1] % 2 == 0
        parts = jnp.split(x, 2, axis=1) if halves else [x]
        parts, cache = jax.lax.scan(body, parts, (self.layers, cache))
        return self.norm(jnp.concatenate(parts, axis=1)), cache


def _remat_policy(name: str):
    """A policy of `jax.checkpoint_policies`, or one of SAVED: keep what those matrix products made
    (and what attention needs), recompute what lies between them."""
    if name in SAVED:
        # Keys and values gathered over `context` are gathered again: each device keeps its own.
        own = {"attention_k": "key", "attention_v": "value"}
        own = own if sharding.axis_size("length") > 1 else {}
        return jax.checkpoint_policies.save_only_these_names(*(own.get(x, x) for x in SAVED[name]))
    return getattr(jax.checkpoint_policies, name)


class Head(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        shape = (config.embed_dim, config.vocab_size)
        self.kernel = nnx.Param(INIT_STDDEV * jax.random.normal(rngs.params(), shape))


class Llama(nnx.Module):
    def __init__(self, config: LlamaConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs):
        self.model = Trunk(config, execution, rngs=rngs)
        if not config.tie_embeddings:
            self.lm_head = Head(config, rngs=rngs)


@functools.lru_cache(maxsize=16)
def _abstract(config: LlamaConfig, execution: ExecutionConfig):
    """The graph definition and the abstract state of a model."""
    build = functools.partial(Llama, config, execution)
    return nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))


def init_params(config: LlamaConfig, key: jax.Array) -> Params:
    """Random float32 parameters: normal(0, 0.02) kernels, norms of one. `key` is a typed key."""
    return nnx.to_pure_dict(nnx.state(Llama(config, ExecutionConfig(), rngs=nnx.Rngs(key))))


def abstract_params(config: LlamaConfig, dtype: str) -> Params:
    """Shapes of the parameters as `jax.ShapeDtypeStruct`s of `dtype`; nothing is allocated."""
    _, state = _abstract(config, ExecutionConfig())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), nnx.to_pure_dict(state)
    )


def _trunk(config, execution, params, *inputs):
    graphdef, state = _abstract(config, execution)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the cached one must hold no tracer
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state).model(*inputs)


def hidden_states(
    config: LlamaConfig,
    execution: ExecutionConfig,
    params: Params,
    *,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    branches: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Normalised hidden states of packed rows, in the compute dtype; segments do not mix.

    Nor do the branches of a segment: branch b > 0 sees itself and branch 0, its prompt. None means
    that no segment branches.
    """

    def local(params, tokens, segment_ids, positions, branches):
        offset = sharding.axis_index("length") * tokens.shape[1]
        keys = [
            None if x is None else sharding.gather(x, 1, "length") for x in (segment_ids, branches)
        ]
        return _trunk(
            config, execution, params, tokens, segment_ids, positions, branches, *keys, None, offset
        )[0]

    rows = sharding.spec("batch", "length")
    run = sharding.per_device(
        local,
        (sharding.param_specs(params), rows, rows, rows, None if branches is None else rows),
        sharding.spec("batch", "positions", None),
    )
    return run(params, tokens, segment_ids, positions, branches)


def unembedding(params: Params) -> Float[Array, "V D"]:
    """The output projection, a row for each id: the transposed head, or the tied embedding."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"].T
    return params["model"]["embed_tokens"]["embedding"]


def over_positions(
    score: Callable,
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    *rows,
    add: bool,
) -> jax.Array:
    """`score(hidden, unembedding, *rows)` where each device has the positions that it holds of
    `hidden` and of `rows` [B, T], and the whole unembedding, gathered in the dtype of `hidden`.

    The result is [B, T] again, or with `add` a scalar, the sum over devices.
    """

    def local(hidden, unembedding, *rows):
        whole = sharding.whole(unembedding.astype(hidden.dtype), "model/embed_tokens/embedding")
        result = score(hidden, whole.astype(unembedding.dtype), *rows)
        return sharding.total(result) if add else result

    row = sharding.spec("batch", "positions")
    specs = (sharding.spec("batch", "positions", None), sharding.spec("vocab", "embed"))
    run = sharding.per_device(local, (*specs, *[row] * len(rows)), jax.P() if add else row)
    return run(hidden, unembedding, *rows)


def logits(
    config: LlamaConfig,
    execution: ExecutionConfig,
    params: Params,
    *,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T V"]:
    """float32 scores of every position, for tests and short rows; training uses chunked losses."""
    hidden = hidden_states(
        config,
        execution,
        params,
        tokens=tokens,
        segment_ids=segment_ids,
        positions=positions,
    )
    return project(hidden, params)


def project(hidden: Float[Array, "B T D"], params: Params) -> Float[Array, "B T V"]:
    """float32 logits of hidden states, multiplied in the dtype of `hidden`."""
    kernel = unembedding(params).astype(hidden.dtype)
    return jnp.einsum("BTD,VD->BTV", hidden, kernel, preferred_element_type=jnp.float32)


def empty_cache(config: LlamaConfig, batch: int, length: int, dtype: str) -> Cache:
    """Keys and values of `length` slots for each layer: [L, B, S, K, H] zeros."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def decode(
    config: LlamaConfig,
    execution: ExecutionConfig,
    params: Params,
    cache: Cache,
    *,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    slot: Int[Array, ""],
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states of T tokens written at cache slots `slot : slot + T`, and the new cache.

    `kv_segment_ids` marks the cache slots each row may read (0: never), the new ones included.
    Prefill is the call with T = prompt length at slot 0; a step is the call with T = 1.
    """
    return _trunk(
        config,
        execution,
        params,
        tokens,
        segment_ids,
        positions,
        None,
        kv_segment_ids,
        None,
        cache,
        slot,
    )
