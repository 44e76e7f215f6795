"""A decoding step through the layers on TPUs, with weights that stream.

Each device multiplies its heads and its part of the MLP by kernels that read stacked weights as
they lie (`kernels/decode_products.py`); after the attention and after the MLP the devices sum the
residual.
"""

import functools

import jax
import jax.numpy as jnp

from tulu_jax import chips
from tulu_jax.kernels import decode_products as products
from tulu_jax.kernels import decode_rings, target
from tulu_jax.models import layers as layers_lib
from tulu_jax.parallel import sharding

LANES = 128
NAME = "decode_step_"  # of a kernel, before the kind of product
KINDS = {"qkv": ("q", "k", "v"), "o": ("o",), "mlp": ("gate", "up", "down")}


def _projections(block) -> dict:
    attention, mlp = block.self_attn, block.mlp
    found = {name: getattr(attention, f"{name}_proj") for name in "qkvo"}
    return found | {name: getattr(mlp, f"{name}_proj") for name in KINDS["mlp"]}


def rings(block, x) -> dict[str, decode_rings.Ring] | None:
    """How the stacked weights of `block` stream on the ambient device for rows x [B, 1, D]; None
    where they do not: on other devices than TPUs, of adapters, in other dtypes than bfloat16, where
    more than `tensor` and `group` divide weights, and for sizes that fill no lanes."""
    chip, divided = target.chip(), dict(jax.sharding.get_abstract_mesh().shape)
    for name in ("tensor", sharding.GROUP):
        divided.pop(name, None)
    if target.platform() != "tpu" or chip not in products.COMPILED or set(divided.values()) - {1}:
        return None
    if x.shape[0] > products.MOST_ROWS or x.dtype != jnp.bfloat16:
        return None
    return rings_of(block, x.shape[0], chips.CHIPS[chip].cores)


def rings_of(block, rows: int, cores: int) -> dict[str, decode_rings.Ring] | None:
    """`rings` for so many `rows` on devices of so many `cores`, where D is whole."""
    weights = {}
    for name, projection in _projections(block).items():
        kernel = projection.kernel.get_value()
        if isinstance(kernel, dict) or kernel.dtype != jnp.bfloat16:
            return None
        axes = sharding.param_axes(f"{projection.path}/kernel")[1:]
        own = tuple(
            size // sharding.ways(axis) for size, axis in zip(kernel.shape[1:], axes, strict=True)
        )
        if own[-1] % LANES and name not in ("gate", "up"):
            return None
        inputs = len(own) - len(projection.outputs)
        weights[name] = decode_rings.weight(own, inputs=inputs, middle=name in ("gate", "up"))
    found = {
        kind: decode_rings.ring(
            tuple(weights[name] for name in names),
            rows=rows,
            cores=cores,
            divides=kind != "mlp",
        )
        for kind, names in KINDS.items()
    }
    return None if None in found.values() else found


def run(block, x, angles, cache, attend, rings: dict[str, decode_rings.Ring]):
    """Hidden states [B, 1, D] behind all layers, stacked in `block`, and the new cache; `attend` as
    in `Trunk.step`."""
    projections = _projections(block)
    weights = {name: one.kernel.get_value() for name, one in projections.items()}
    specs = {
        name: sharding.spec(*sharding.param_axes(f"{one.path}/kernel"))
        for name, one in projections.items()
    }
    norms = {
        "qkv": (block.input_layernorm, block.input_layernorm.scale.get_value()),
        "mlp": (block.post_attention_layernorm, block.post_attention_layernorm.scale.get_value()),
    }
    eps = {name: norm.eps for name, (norm, _) in norms.items()}
    scales = {name: scale for name, (_, scale) in norms.items()}
    kernels = {
        kind: functools.partial(
            products.mlp if kind == "mlp" else products.multiply,
            ring=ring,
            interpret=target.platform() != "tpu",
        )
        for kind, ring in rings.items()
    }

    def local(weights, scales, x, angles, cache):
        B, L = x.shape[0], weights["q"].shape[0]

        def product(kind, x, layer):
            normed = {}
            if kind in scales:
                scale = jax.lax.dynamic_index_in_dim(scales[kind], layer, keepdims=False)
                normed = dict(scale=scale, eps=eps[kind])
            stacks = tuple(weights[name] for name in KINDS[kind])
            return kernels[kind](x, stacks, layer, name=NAME + kind, **normed)

        def body(carry, layer):
            x, cache = carry
            joined = product("qkv", x, layer)
            q, k, v = _heads(joined, [weights[name].shape[-2:] for name in "qkv"])
            q, k = (layers_lib.rotate(one, *angles) for one in (q, k))
            seen, cache = attend(q, k, v, cache, layer)
            x = x + sharding.total(product("o", seen.reshape(B, -1), layer))
            x = x + sharding.total(product("mlp", x, layer))
            return (x, cache), None

        (x, cache), _ = jax.lax.scan(body, (x, cache), jnp.arange(L))
        return x, cache

    cached = sharding.spec("layers", "rows", "kv_heads", None, None)
    cached = {"k": cached, "v": cached}
    run = sharding.per_device(local, (specs, jax.P(), jax.P(), jax.P(), cached), (jax.P(), cached))
    out, cache = run(weights, scales, x[:, 0], angles, cache)
    return out[:, None], cache


def _heads(joined, shapes):
    """[B, 1, heads, H] of each of the products side by side in `joined` [B, F]."""
    found, first = [], 0
    for heads, size in shapes:
        one = joined[:, first : first + heads * size]
        found.append(one.reshape(-1, 1, heads, size))
        first += heads * size
    return found
