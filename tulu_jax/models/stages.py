"""The forward pass cut into stages, each by itself, for whoever looks at what lies between them.

Stages of a model of L layers, in order: `embedding`, then for each layer `attention` and `mlp`,
then `norm`. Composed they are `llama.hidden_states` without its scan over layers and without
rematerialisation; each is the code of a run.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.parallel import sharding

ROWS = ("tokens", "segment_ids", "positions", "branches")  # of a batch, [B, T] each


def one_layer(params: llama.Params, layer: int) -> llama.Params:
    """The parameters of a model with that layer alone: what `run` takes, [1, ...] each of it."""
    model = params["model"]
    layers = jax.tree.map(lambda leaf: leaf[layer : layer + 1], model["layers"])
    return {**params, "model": {**model, "layers": layers}}


def run(
    stage: str,
    config: LlamaConfig,
    execution: ExecutionConfig,
    params: llama.Params,
    batch: dict[str, Array],
    x: Float[Array, "B T D"] | None,
) -> Float[Array, "B T D"]:
    """What `stage` makes of `x`, of None for `embedding`; on the ambient mesh.

    `params` are those of `one_layer`, `batch` has the fields ROWS; `branches` may be missing.
    """

    def local(params, x, *rows):
        inputs, trunk = llama.inputs_of(*rows), llama.trunk(config, execution, params)
        dtype = jnp.dtype(execution.compute_dtype)
        if stage == "embedding":
            return trunk.embed_tokens(sharding.own(inputs.tokens, 1, "tensor"), dtype)
        if stage == "norm":
            return trunk.norm(x)
        block = jax.tree.map(lambda leaf: leaf[0], trunk.layers)
        return block.half(x, stage, **trunk.seen(inputs, dtype))

    row, out = sharding.spec("batch", "length"), sharding.spec("batch", "positions", None)
    rows = [batch.get(name) for name in ROWS]
    specs = [None if field is None else row for field in rows]
    whole = sharding.per_device(
        local, (sharding.param_specs(params), None if x is None else out, *specs), out
    )
    return whole(params, x, *rows)
