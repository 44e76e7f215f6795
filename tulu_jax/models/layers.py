"""A transformer layer of Llama as one device runs it.

Positions are divided over `tensor` between the attention and the MLP and gathered inside them;
weights are gathered over `embed` where they are used (`parallel/sharding.py`). `Block` may cut its
rows in parts; what lies below takes and gives a list of them.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from tulu_jax.kernels import nf4_matmul
from tulu_jax.models import attention as attention_lib
from tulu_jax.models import lora, products
from tulu_jax.models.config import KEEP_NOTHING, REMAT_POLICIES, LlamaConfig
from tulu_jax.parallel import balance, sharding
from tulu_jax.quant import in_transit, nf4

DIVIDED = ("heads", "kv_heads", "mlp")  # over `tensor`, inside a layer
INIT_STDDEV = 0.02  # Llama's `initializer_range`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """What the dropout of one layer is drawn with: the layer's number, and of each part of the rows
    `lora.by_position` [B, T, 3]."""

    layer: Any
    parts: Any

    def of(self, part: int):
        return self.layer, self.parts[part]


class Projection(nnx.Module):
    """A product with one kernel [*inputs, *outputs], computed in the dtype of its input.

    It takes and gives a list of parts. The kernel's `embed` axis is gathered for them, once; over
    `tensor` it stays divided. The kernel is an array, or the dict of `quant/nf4.py`. With the
    leaves of an adapter beside it (`lora.py`), `weights` is a dict of all. With `gather_dtype`
    'int8' an array travels in codes (`from_codes`).
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        inputs: int = 1,
        adapter,
        gather_dtype: str | None,
        rngs: nnx.Rngs,
    ):
        self.path, self.outputs, self.adapter = f"model/layers/{name}", shape[inputs:], adapter
        self.gather_dtype = gather_dtype
        self.number = lora.TARGETS["all"].index(name.split("/")[1])
        self.kernel = nnx.Param(INIT_STDDEV * jax.random.normal(rngs.params(), shape))

    def __call__(self, parts, noise: "Noise | None" = None):
        weights = self.kernel.get_value()
        if not isinstance(weights, dict) or "kernel" not in weights:
            weights = {"kernel": weights}
        if isinstance(weights["kernel"], dict):
            outs = self._quantised(weights["kernel"], parts)
        else:
            kernel = checkpoint_name(self._whole(weights["kernel"], parts[0].dtype), "kernel")
            outs = [products.multiply(part, kernel) for part in parts]
        if lora.A not in weights:
            return outs
        a, b = (
            sharding.whole(weights[name].astype(parts[0].dtype), f"{self.path}/{name}", but=DIVIDED)
            for name in (lora.A, lora.B)
        )
        return [
            out + self._adapted(part, a, b, noise and noise.of(n)).reshape(out.shape)
            for n, (part, out) in enumerate(zip(parts, outs, strict=True))
        ]

    def _whole(self, kernel, dtype):
        """The kernel in `dtype`, gathered along `embed`."""
        name, own = f"{self.path}/kernel", kernel.astype(dtype)
        if self.gather_dtype is None or sharding.axis_size("embed") == 1:
            return sharding.whole(own, name, but=DIVIDED)
        axis = sharding.param_axes(name).index("embed") - 1  # without that of layers
        own, kernel = (jnp.moveaxis(x, axis, 0) for x in (own, jax.lax.stop_gradient(kernel)))
        return jnp.moveaxis(from_codes(own, *in_transit.encode(kernel)), 0, axis)

    def _quantised(self, kernel, parts):
        """The products with a quantised kernel, which is gathered as it is packed."""
        kernel = {
            name: sharding.whole(leaf, f"{self.path}/kernel/{name}", but=DIVIDED)
            for name, leaf in kernel.items()
        }
        _, rows, columns = sharding.param_axes(f"{self.path}/kernel/codes")
        blocks = kernel["codes"].shape[0] // 8  # of NF4; of int8 nothing asks
        scales = nf4.scales(
            kernel,
            rows=_first(rows, blocks),
            cols=_first(columns, kernel["codes"].shape[1]),
            blocks_per_output=blocks * _shards(rows),
        )
        products = [
            self._product(part.reshape(*part.shape[:2], -1), kernel, scales) for part in parts
        ]
        return [p.reshape(*p.shape[:2], *self._heads(p.shape[-1])) for p in products]

    def _heads(self, size: int) -> tuple[int, ...]:
        """The shape of `size` outputs of this device, with heads apart if they are."""
        heads = self.outputs[1:]
        return (size // math.prod(heads), *heads)

    @staticmethod
    def _product(x, kernel, scales):
        if kernel["codes"].dtype == jnp.int8 or sharding.num_devices() > 1:
            return nf4.product(x, kernel["codes"], scales)
        return nf4_matmul.matmul(x, kernel["codes"], scales)

    def _adapted(self, x, a, b, noise):
        """What the adapter adds, [B, T, N], for inputs [B, T, ...]."""
        x, keep = x.reshape(*x.shape[:2], -1), None
        if noise is not None and self.adapter.dropout:
            layer, noise = noise
            axis = sharding.param_axes(f"{self.path}/{lora.A}")[1]
            axis = sharding.WITHOUT_EMBED.get(axis, axis)
            keep = lora.kept(
                noise,
                layer * len(lora.TARGETS["all"]) + self.number,
                self.adapter.dropout,
                features=x.shape[-1],
                of=x.shape[-1] * _shards(axis),
                first=_first(axis, x.shape[-1]),
            )
        return lora.delta(self.adapter, a, b, x, keep)


@jax.custom_vjp
def from_codes(own, codes, scales):
    """A weight whole along `embed`, its axis 0, decoded in the dtype of `own` from the gathered
    `codes` and `scales` of each device's shard (`quant/in_transit.py`).

    The cotangent is reduce-scattered to `own`, that shard itself, as though it had been gathered:
    rounding passes gradients on (straight through).
    """
    codes, scales = (sharding.gather(x, 0, "embed") for x in (codes, scales))
    return in_transit.decode(codes, scales, own.dtype)


from_codes.defvjp(
    lambda *shard: (from_codes(*shard), None),
    lambda _, cotangent: (sharding.scatter_sum(cotangent, 0, "embed"), None, None),
)


def _shards(axis: str) -> int:
    """Into how many shards `axis` is still divided inside a layer."""
    return sharding.axis_size(axis) if axis in DIVIDED else 1


def _first(axis: str, size: int):
    """The place of the first of this device's `size` elements along `axis`."""
    return sharding.axis_index(axis) * size if axis in DIVIDED else 0


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
    """Causal grouped-query attention with rotary positions, on a list of parts of rows.

    Parts are projected one by one, so that each can be gathered before and scattered after while
    another is multiplied (`Block`); queries see the keys of all, so attention itself takes them
    joined. It is `attend(q, k, v)`, which gives what the queries see and what is kept of the layer:
    `attend_in_rows` with what it needs to know, or that of a decoder over its cache.
    """

    def __init__(self, config: LlamaConfig, *, apart: bool = False, **made):
        self.apart = apart
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = Projection("self_attn/q_proj", (D, N, H), **made)
        self.k_proj = Projection("self_attn/k_proj", (D, K, H), **made)
        self.v_proj = Projection("self_attn/v_proj", (D, K, H), **made)
        self.o_proj = Projection("self_attn/o_proj", (N, H, D), inputs=2, **made)

    def __call__(self, parts, *, angles, attend, noise):
        q, k = (_joined(project(parts, noise)) for project in (self.q_proj, self.k_proj))
        if self.apart:
            q, k = products.apart(q), products.apart(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        v = _joined(self.v_proj(parts, noise))
        out, kept = attend(q, k, v)
        return self.o_proj(_parted(out, len(parts)), noise), kept


def attend_in_rows(q, k, v, *, visibility, keep: bool, balanced: bool, before=None):
    """What queries see of their own rows, and with `keep` those keys and values, else None.
    `before` has keys and values in front of them, or is None; with `balanced` a device has two
    chunks of a row (`parallel/balance.py`)."""
    kept = {"k": k, "v": v} if keep else None
    # Over `context` the queries stay sharded and keys and values are gathered.
    k, v = checkpoint_name(k, "key"), checkpoint_name(v, "value")
    k, v = sharding.gather(k, 1, "length"), sharding.gather(v, 1, "length")
    if balanced:
        k, v = balance.in_order(k), balance.in_order(v)
    if before is not None:
        k, v = (jnp.concatenate(x, axis=1) for x in ((before["k"], k), (before["v"], v)))
    return attention_lib.attend(q, k, v, visibility), kept


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, *, apart: bool = False, **made):
        self.apart = apart
        D, F = config.embed_dim, config.mlp_dim
        self.gate_proj = Projection("mlp/gate_proj", (D, F), **made)
        self.up_proj = Projection("mlp/up_proj", (D, F), **made)
        self.down_proj = Projection("mlp/down_proj", (F, D), **made)

    def __call__(self, parts, noise):
        gates = [checkpoint_name(gate, "gate") for gate in self.gate_proj(parts, noise)]
        ups = [checkpoint_name(up, "up") for up in self.up_proj(parts, noise)]
        if self.apart:
            gates, ups = ([products.apart(x) for x in both] for both in (gates, ups))
        gated = [jax.nn.silu(gate) * up for gate, up in zip(gates, ups, strict=True)]
        if self.apart:
            gated = [products.apart(x) for x in gated]
        return self.down_proj(gated, noise)


class Block(nnx.Module):
    """x + attention(norm(x)), then the same with the MLP, for rows whose positions are divided over
    `tensor`: [B, S, D].

    With `row_parts` n > 1 the S positions go through in n parts. Over `tensor` each part is
    gathered before a product and its sum scattered after; in one piece that moves while nothing is
    multiplied, because all that follows waits for it. Of two parts one moves while the other is
    multiplied. Weights are gathered once for all parts and their gradients scattered once. Where
    the matrix units bind anyway, halves of products are a little slower, so the table of slices
    says where it pays (`parallel/slices.py`). So it does of `apart`, which keeps what is computed
    element by element out of products (`products.apart`), and of `pairs_first`, in which order
    parts are gathered (`sharding.gather`).
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        adapter,
        gather_dtype: str | None,
        apart: bool = False,
        pairs_first: bool = False,
        rngs: nnx.Rngs,
    ):
        made = dict(adapter=adapter, gather_dtype=gather_dtype, rngs=rngs)  # of each projection
        self.apart, self.pairs_first = apart, pairs_first
        self.input_layernorm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.self_attn = SelfAttention(config, apart=apart, **made)
        self.post_attention_layernorm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = MLP(config, apart=apart, **made)

    def __call__(self, x, *, row_parts: int, noise=None, **attention_inputs):
        parts = _cut(x, row_parts)
        noise = noise and dataclasses.replace(noise, parts=_parted(noise.parts[0], len(parts)))
        parts, kept = self._attended(parts, noise, attention_inputs)
        return jnp.concatenate(self._fed_forward(parts, noise), axis=1), kept

    def half(self, x, which: str, *, row_parts: int, **attention_inputs):
        """What `x` [B, S, D] is after the attention, or what it is after the MLP alone."""
        parts = _cut(x, row_parts)
        if which == "attention":
            return jnp.concatenate(self._attended(parts, None, attention_inputs)[0], axis=1)
        return jnp.concatenate(self._fed_forward(parts, None), axis=1)

    def _attended(self, parts, noise, attention_inputs):
        with jax.named_scope("attention"):
            normed = self._gathered(self.input_layernorm, parts)
            outs, kept = self.self_attn(normed, noise=noise, **attention_inputs)
            return [checkpoint_name(part, "residual") for part in self._added(parts, outs)], kept

    def _fed_forward(self, parts, noise):
        with jax.named_scope("mlp"):
            normed = self._gathered(self.post_attention_layernorm, parts)
            return self._added(parts, self.mlp(normed, noise))

    def _gathered(self, norm, parts):
        """Each part normalised, with the positions of all devices along `tensor`."""
        normed = [norm(part) for part in parts]
        if sharding.axis_size("tensor") > 1:
            how = dict(pairs_first=self.pairs_first)
            normed = [sharding.gather(part, 1, "tensor", **how) for part in normed]
            normed = [checkpoint_name(part, "gathered") for part in normed]
        return [products.apart(part) for part in normed] if self.apart else normed

    def _added(self, parts, outs):
        """Each part plus its own positions of what the devices along `tensor` sum."""
        how = dict(pairs_first=self.pairs_first)
        sums = (sharding.scatter_sum(out, 1, "tensor", **how) for out in outs)
        return [part + own for part, own in zip(parts, sums, strict=True)]


def _cut(x, row_parts: int):
    """[B, S, D] in `row_parts` parts along S, where there is something to move beside them."""
    divides = sharding.axis_size("tensor") > 1 and x.shape[1] % row_parts == 0
    return jnp.split(x, row_parts, axis=1) if divides else [x]


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


def remat_policy(name: str | None):
    """Keeps what REMAT_POLICIES says, made by matrix products and attention, and recomputes what
    lies between; None keeps nothing."""
    name = name or KEEP_NOTHING
    if kept := REMAT_POLICIES[name]:
        # Keys and values gathered over `context` are gathered again: each device keeps its own.
        own = {"attention_k": "key", "attention_v": "value"}
        own = own if sharding.axis_size("length") > 1 else {}
        return jax.checkpoint_policies.save_only_these_names(*(own.get(x, x) for x in kept))
    return getattr(jax.checkpoint_policies, name)
