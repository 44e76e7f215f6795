"""Llama in Flax NNX, and the plain functions everything else calls.

Outside this folder a model is its `LlamaConfig` and a plain nested dict of arrays, whose paths are
Hugging Face's without the layer number: `model/layers/self_attn/q_proj/kernel` `[L, D, N, H]`.
Layers are stacked on axis 0 and run by `jax.lax.scan`.

Training runs the layers as each device sees them (`sharding.per_device`): B rows of its own, T / C
positions of a row over `context`, N / M heads and F / M of the MLP over `tensor`. Between blocks
the positions are divided over `tensor` as well, so norms and residuals exist once (sequence
parallelism, Korthikanti et al. 2022).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt

from tulu_jax.kernels import target
from tulu_jax.models import attention as attention_lib
from tulu_jax.models import layers, lora, streamed_layers
from tulu_jax.models.config import LM_HEAD, SCORE, ExecutionConfig, LlamaConfig
from tulu_jax.parallel import balance, sharding

Params = dict[str, Any]
Cache = dict[str, jax.Array]  # keys and values, `k` and `v`
Cached = Cache | tuple[Cache, ...]  # of all layers, or of each
Attend = Callable[[jax.Array, jax.Array, jax.Array, Cached, Any], tuple[jax.Array, Cached]]

NOISE = "noise"  # the field of a batch that `lora.noise` makes
PARTS = ("model", LM_HEAD, SCORE)  # of the parameters, at the top


class Embedding(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = nnx.Param(layers.INIT_STDDEV * jax.random.normal(rngs.params(), shape))

    def __call__(self, tokens, dtype):
        table = sharding.whole(self.embedding[...].astype(dtype), "model/embed_tokens/embedding")
        return table[tokens]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a device's trunk runs on: rows of queries, [B, T] each, and of the keys they may see,
    [B, S]; query t is at the place t + `query_offset` among the keys, which is an offset for each
    where rows are `balanced` (`parallel/balance.py`). Branches None: no segment branches; `noise`
    [B, T, 3] (`lora.by_position`) None: no dropout. `keep`: keys and values are asked for,
    [L, B, T, K, H]. `block` is that of attention, None as the execution has it. `before`: keys and
    values [L, B, P, K, H] in front of the rows' own, None: nothing is."""

    tokens: Any
    segment_ids: Any
    positions: Any
    branches: Any = None
    kv_segment_ids: Any
    kv_branches: Any = None
    query_offset: Any
    noise: Any = None
    keep: bool = False
    balanced: bool = False
    block: int | None = None
    before: Cache | None = None


class Trunk(nnx.Module):
    """Everything but the output projection: tokens to normalised hidden states."""

    def __init__(self, config: LlamaConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs):
        self.config, self.execution = config, execution
        self.embed_tokens = Embedding(config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return layers.Block(
                config,
                adapter=execution.adapter,
                gather_dtype=execution.gather_dtype,
                apart=bool(execution.products_apart),
                pairs_first=bool(execution.pairs_first),
                rngs=rngs,
            )

        self.layers = stacked(rngs)
        self.norm = layers.RMSNorm(config.embed_dim, eps=config.norm_eps)

    def __call__(self, inputs: Inputs):
        own = sharding.own(inputs.tokens, 1, "tensor")
        x = self.embed_tokens(own, jnp.dtype(self.execution.compute_dtype))
        x, kept = self.through(x, inputs)
        return self.norm(x), kept

    def step(self, tokens, positions, cache: Cached, attend: Attend, blocks):
        """Hidden states [B, 1, D] of one token a row, [B, 1], and the new cache. With `blocks` of
        `apart` layers are compiled one by one, with None in a loop; on TPUs kernels multiply where
        they can (`streamed_layers.py`).

        Every device multiplies its part of each weight, where that lies: the residual is divided
        as weights are over `context`, and what attention has seen is whole there.
        """
        x = self.embed_tokens(tokens, jnp.dtype(self.execution.compute_dtype))
        angles = self.angles(positions)

        def body(carry, layer):
            x, cache = carry
            block, number = layer

            def see(q, k, v):
                seen, after = attend(q, k, v, cache, number)
                return sharding.constrain(seen, "batch", None, "heads", None), after

            x = sharding.constrain(x, "batch", None, "residual")
            x, cache = block(x, angles=angles, attend=see, row_parts=1)
            return (sharding.constrain(x, "batch", None, "residual"), cache), None

        for number, block in enumerate(blocks or ()):
            (x, cache), _ = body((x, cache), (block, number))
        if blocks is not None:
            return self.norm(x), cache
        if rings := streamed_layers.rings(self.layers, x):
            x, cache = streamed_layers.run(self.layers, x, angles, cache, attend, rings)
        else:
            numbered = (self.layers, jnp.arange(self.config.num_layers))
            (x, cache), _ = jax.lax.scan(body, (x, cache), numbered)
        return self.norm(x), cache

    def through(self, x, inputs: Inputs):
        """Hidden states behind the layers, and with `inputs.keep` their keys and values."""
        seen = self.seen(inputs, x.dtype)

        def body(x, layer):
            block, number, before = layer
            noise = None if number is None else layers.Noise(number, [inputs.noise])
            attend = functools.partial(seen["attend"], before=before)
            return block(x, noise=noise, **seen | {"attend": attend})

        if self.execution.remat and not inputs.keep:
            policy = layers.remat_policy(self.execution.remat_policy)
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        drops = inputs.noise is not None
        numbers = jnp.arange(self.config.num_layers) if drops else None
        return jax.lax.scan(body, x, (self.layers, numbers, inputs.before))

    def angles(self, positions):
        return layers.rotary_angles(
            positions, head_dim=self.config.head_dim, theta=self.config.rope_theta
        )

    def seen(self, inputs: Inputs, dtype) -> dict[str, Any]:
        """What every layer takes beside its activations of `dtype`."""
        visibility = attention_lib.prepare(
            segment_ids=inputs.segment_ids,
            kv_segment_ids=inputs.kv_segment_ids,
            branches=inputs.branches,
            kv_branches=inputs.kv_branches,
            query_offset=inputs.query_offset,
            implementation=attention_lib.choose(
                self.execution.attention,
                queries=inputs.tokens.shape[1],
                keys=inputs.kv_segment_ids.shape[1],
                platform=target.platform(),
                dtype=dtype,
            ),
            heads=(
                self.config.num_heads // sharding.axis_size("heads"),
                self.config.num_kv_heads // sharding.axis_size("kv_heads"),
                self.config.head_dim,
            ),
            dtype=dtype,
            block=inputs.block or self.execution.attention_block,
        )
        return dict(
            angles=self.angles(inputs.positions),
            attend=functools.partial(
                layers.attend_in_rows,
                visibility=visibility,
                keep=inputs.keep,
                balanced=inputs.balanced,
            ),
            row_parts=self.execution.row_parts or 1,
        )


class Head(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        shape = (config.embed_dim, config.vocab_size)
        self.kernel = nnx.Param(layers.INIT_STDDEV * jax.random.normal(rngs.params(), shape))


class Score(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init_score(config.embed_dim, rngs.params())["kernel"])


class Llama(nnx.Module):
    def __init__(self, config: LlamaConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs):
        self.model = Trunk(config, execution, rngs=rngs)
        if config.head == SCORE:
            self.score = Score(config, rngs=rngs)
        elif not config.tie_embeddings:
            self.lm_head = Head(config, rngs=rngs)


def init_score(embed_dim: int, key: jax.Array) -> Params:
    """A score head: float32 `kernel` [D, 1] from normal(0, 0.02), without bias; typed `key`."""
    return {"kernel": layers.INIT_STDDEV * jax.random.normal(key, (embed_dim, 1), jnp.float32)}


def scores(hidden: Float[Array, "B T D"], params: Params) -> Float[Array, "B T"]:
    """The score of each position: float32 sums of float32 products of what came in any dtype."""
    kernel = params[SCORE]["kernel"][:, 0].astype(jnp.float32)
    return jnp.sum(hidden.astype(jnp.float32) * kernel[None, None], axis=-1)


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


def trunk(config: LlamaConfig, execution: ExecutionConfig, params: Params) -> Trunk:
    """The module with these parameters."""
    graphdef, state = _abstract(config, execution)
    state = nnx.to_flat_state(state)
    filled = [(path, leaf.replace(_at(params, path, leaf.get_value()))) for path, leaf in state]
    return nnx.merge(graphdef, nnx.from_flat_state(filled)).model


def _at(params: Params, path: tuple[str, ...], absent):
    """The parameter at `path`, or `absent`; of a projection with an adapter, the dict of kernel and
    adapter."""
    *above, name = path
    beside = functools.reduce(lambda found, step: found.get(step, {}), above, params)
    return beside if lora.A in beside else beside.get(name, absent)


def inputs_of(tokens, segment_ids, positions, branches, noise=None) -> Inputs:
    """What a device's trunk runs on, of its shards [B, T] of the rows."""
    return Inputs(
        tokens=tokens,
        segment_ids=segment_ids,
        positions=positions,
        branches=branches,
        kv_segment_ids=sharding.gather(segment_ids, 1, "length"),
        kv_branches=None if branches is None else sharding.gather(branches, 1, "length"),
        query_offset=sharding.axis_index("length") * tokens.shape[1],
        noise=noise,
    )


def balanced_inputs(inputs: Inputs) -> Inputs:
    """The same rows, of which this device has two chunks in place of its equal run."""
    length = inputs.kv_segment_ids.shape[1]

    def own(field):
        return None if field is None else balance.own(sharding.gather(field, 1, "length"))

    fields = ("tokens", "segment_ids", "positions", "branches", "noise")
    return dataclasses.replace(
        inputs,
        **{name: own(getattr(inputs, name)) for name in fields},
        query_offset=balance.offsets(length),
        balanced=True,
    )


def through_layer(
    config: LlamaConfig,
    execution: ExecutionConfig,
    layer: Params,
    hidden: Float[Array, "B T D"],
) -> Float[Array, "B T D"]:
    """Hidden states of whole rows behind one layer, whose parameters are those of
    `params["model"]["layers"]` without axis 0: a model runs so, layer by layer, where it does not
    fit."""
    rows = jnp.ones(hidden.shape[:2], jnp.int32)
    inputs = Inputs(
        tokens=rows,
        segment_ids=rows,
        positions=jnp.cumsum(rows, axis=1) - 1,
        kv_segment_ids=rows,
        query_offset=0,
    )
    one = dataclasses.replace(config, num_layers=1)
    params = {"model": {"layers": jax.tree.map(lambda leaf: leaf[None], layer)}}
    return trunk(one, execution, params).through(hidden, inputs)[0]


def last_norm(config: LlamaConfig, scale: jax.Array, hidden: Float[Array, "B T D"]) -> jax.Array:
    """Normalised hidden states, as the output projection takes them; `scale` is [D]."""
    norm = layers.RMSNorm(config.embed_dim, eps=config.norm_eps)
    norm.scale = nnx.Param(scale)
    return norm(hidden)


def hidden_states(
    config: LlamaConfig,
    execution: ExecutionConfig,
    params: Params,
    *,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    branches: Int[Array, "B T"] | None = None,
    noise: UInt[Array, "B 3"] | None = None,
) -> Float[Array, "B T D"]:
    """Normalised hidden states of packed rows, in the compute dtype; segments do not mix.

    Nor do the branches of a segment: branch b > 0 sees itself and branch 0, its prompt. None means
    that no segment branches. `noise` is what the dropout of adapters depends on (`lora.noise`);
    without it they drop nothing.
    """

    def local(params, *rows):
        model, inputs = trunk(config, execution, params), inputs_of(*rows)
        if not (execution.balanced and balance.suits(inputs.kv_segment_ids.shape[1])):
            return model(inputs)[0]
        return balance.back(model(balanced_inputs(inputs))[0])

    rows = sharding.spec("batch", "length")
    optional = (None if branches is None else rows, None if noise is None else rows)
    run = sharding.per_device(
        local,
        (sharding.param_specs(params), rows, rows, rows, *optional),
        sharding.spec("batch", "positions", None),
    )
    noise = None if noise is None else lora.by_position(noise, tokens.shape[1])
    return run(params, tokens, segment_ids, positions, branches, noise)


def forward(config: LlamaConfig, execution: ExecutionConfig) -> Callable[[Params, dict], jax.Array]:
    """(params, batch) -> `hidden_states` of the rows of a batch, by the names of its fields; of
    `params`, what is `own`."""

    def run(params, batch):
        return hidden_states(
            config,
            execution,
            own(params),
            tokens=batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            branches=batch.get("branches"),
            noise=batch.get(NOISE),
        )

    return run


def own(params: Params) -> Params:
    """The parameters of the model, without what an objective has beside them."""
    return {name: params[name] for name in PARTS if name in params}


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


def project_one(hidden: Float[Array, "B D"], params: Params) -> Float[Array, "B V"]:
    """`project` of one position a row, in the order of operands that is fastest on a CPU."""
    dtypes = dict(preferred_element_type=jnp.float32)
    if "lm_head" in params:
        kernel = params["lm_head"]["kernel"].astype(hidden.dtype)
        return jnp.einsum("BD,DV->BV", hidden, kernel, **dtypes)
    return jnp.einsum("VD,BD->VB", unembedding(params).astype(hidden.dtype), hidden, **dtypes).T
