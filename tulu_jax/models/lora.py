"""Low-rank adapters: y = x W + s · dropout(x) A B (LoRA, Hu et al. 2021, equation 3), W frozen.

An adapter is two leaves beside the kernel of a projection: `lora_a` [L, in, r] and `lora_b`
[L, r, out], with heads flattened. A projection whose parameters have them adds their product; the
same model without them is the base.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, UInt

from tulu_jax import validation
from tulu_jax.models import products

A, B = "lora_a", "lora_b"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}
MOST_RANK = 2**14
BITS = 16  # of a draw of dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Adapters of `rank` r, scaled by s = `alpha` / r, or with `rank_stabilised` by alpha / √r
    (Kalajdzievski 2023).

    `targets` is 'all' linear layers (the paper's), 'attention', 'mlp', or names of projections with
    commas between. `dropout` is the share of an adapter's inputs that an update leaves out, rounded
    to 2**-16. `dtype` is that of A and B.
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "all"
    rank_stabilised: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        validation.check(self, self._rules)

    def _rules(self):
        yield 0 < self.rank <= MOST_RANK, f"rank = {self.rank}: expected 1 to {MOST_RANK}"
        yield self.alpha > 0, f"alpha = {self.alpha}: expected a positive number"
        yield 0 <= self.dropout < 1, f"dropout = {self.dropout}: not in [0, 1)"
        yield validation.one_of("dtype", self.dtype, ("float32", "bfloat16"))
        unknown = [name for name in self.names if name not in TARGETS["all"]]
        yield (
            not unknown and bool(self.names),
            f"targets = {self.targets!r}: {', '.join(unknown) or 'nothing'} is unknown; expected "
            f"one of {sorted(TARGETS)}, or names of {TARGETS['all']} with commas between",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The projections that have an adapter."""
        if self.targets in TARGETS:
            return TARGETS[self.targets]
        return tuple(name.strip() for name in self.targets.split(",") if name.strip())

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def problems(self, shapes: Mapping[str, tuple[int, int]]):
        """(holds, message if not) for a model whose projections have these shapes (in, out)."""
        least = min(min(shapes[path]) for path in shapes if path.split("/")[-1] in self.names)
        yield (
            self.rank <= least,
            f"rank = {self.rank} is above {least}, the smallest dimension of what it adapts "
            f"({', '.join(self.names)}); expected at most that",
        )


def init(
    config: LoRAConfig, shapes: Mapping[str, tuple[int, int]], num_layers: int, key: jax.Array
) -> dict:
    """Adapters that change nothing yet: A uniform in ±1/√in, as PEFT draws it
    (`kaiming_uniform_(a=√5)`), and B zero. `shapes` are those of projections (in, out) by their
    path in a layer."""
    found: dict = {}
    for number, (path, (rows, columns)) in enumerate(sorted(shapes.items())):
        part, name = path.split("/")
        if name in config.names:
            bound = 1 / math.sqrt(rows)
            a = jax.random.uniform(
                jax.random.fold_in(key, number),
                (num_layers, rows, config.rank),
                jnp.float32,
                minval=-bound,
                maxval=bound,
            ).astype(config.dtype)
            b = jnp.zeros((num_layers, config.rank, columns), config.dtype)
            found.setdefault(part, {})[name] = {A: a, B: b}
    return {"model": {"layers": found}}


def without(params: dict) -> dict:
    """The nested dict `params` without adapters: the base."""
    return {
        name: without(value) if isinstance(value, dict) else value
        for name, value in params.items()
        if name not in (A, B)
    }


def only(params: dict) -> dict:
    """The adapters of `params`, in their nested dict."""
    found = {
        name: only(value) if isinstance(value, dict) else value
        for name, value in params.items()
        if isinstance(value, dict) or name in (A, B)
    }
    return {name: value for name, value in found.items() if not isinstance(value, dict) or value}


def noise(step: jax.Array, key: jax.Array, rows: tuple[int, ...]) -> UInt[Array, "*rows 3"]:
    """What dropout depends on, for each row of an update: two words of the typed `key` folded with
    the update's number, and the place of the row in it. So a mask is the same however the update
    is cut in pieces, and on every mesh."""
    words = jax.random.key_data(jax.random.fold_in(key, step))
    place = jnp.arange(math.prod(rows), dtype=jnp.uint32).reshape(rows)
    return jnp.stack(jnp.broadcast_arrays(words[0], words[1], place), axis=-1)


def by_position(noise: UInt[Array, "B 3"], length: int) -> UInt[Array, "B T 3"]:
    """`noise` of each of the `length` positions of rows."""
    place = noise[:, 2, None] * jnp.uint32(length) + jnp.arange(length, dtype=jnp.uint32)[None]
    words = jnp.broadcast_to(noise[:, None, :2], (*place.shape, 2))
    return jnp.concatenate([words, place[..., None]], axis=-1)


def kept(
    noise: UInt[Array, "B T 3"],
    stream: jax.Array | int,
    rate: float,
    *,
    features: int,
    of: int,
    first: jax.Array | int,
) -> Bool[Array, "B T F"]:
    """Whether dropout at `rate` keeps each of F `features` that begin at `first` of the `of` that
    the model has. `stream` tells layers and projections apart, below 2**10.

    Threefry-2x32 (Salmon et al. 2011) of (position, stream and feature) gives two words, 16 bits of
    which are a draw: four pieces of W features have one word each, so nothing moves between lanes.
    """
    group = math.gcd(of, 512)
    pieces = min(group, 4)
    width = group // pieces
    whole = features % group == 0
    groups = features // group if whole else features // group + 2
    word = jnp.arange(groups * width, dtype=jnp.uint32)
    word += jnp.uint32(width) * (jnp.asarray(first, jnp.uint32) // jnp.uint32(group))
    word += jnp.asarray(stream, jnp.uint32) << 22
    shape = (*noise.shape[:2], groups * width)
    words = [jnp.broadcast_to(noise[..., i : i + 1], shape) for i in range(3)]
    drawn = threefry2x32_p.bind(*words, jnp.broadcast_to(word, shape))
    parts = [drawn[0] >> BITS, drawn[0], drawn[1] >> BITS, drawn[1]][:pieces]
    bits = jnp.stack([part.reshape(*shape[:2], groups, width) for part in parts], axis=3)
    keep = (bits & jnp.uint32(2**BITS - 1)) >= jnp.uint32(round(rate * 2**BITS))
    keep = keep.reshape(*shape[:2], groups * group)
    if whole:
        return keep
    return jax.lax.dynamic_slice_in_dim(keep, jnp.asarray(first) % group, features, axis=2)


def delta(
    config: LoRAConfig,
    a: Float[Array, "K r"],
    b: Float[Array, "r N"],
    x: Float[Array, "B T K"],
    keep: Bool[Array, "B T K"] | None,
) -> Float[Array, "B T N"]:
    """s · dropout(x) A B, in the dtype of x."""
    if keep is not None:
        x = jnp.where(keep, x * jnp.asarray(1 / (1 - config.dropout), x.dtype), 0)
    low = products.multiply(x, a.astype(x.dtype))
    return products.multiply(low, b.astype(x.dtype)) * jnp.asarray(config.scale, x.dtype)


def merge(config: LoRAConfig, params: dict, dtype) -> dict:
    """`params` with s · A B added to each adapted kernel in float32, and then cast to `dtype`, and
    without adapters: the same model. Kernels are arrays [L, in, …]; dequantise them before."""

    def walk(found: dict) -> dict:
        if A not in found:
            return {k: walk(v) if isinstance(v, dict) else v for k, v in found.items()}
        a, b = found[A].astype(jnp.float32), found[B].astype(jnp.float32)
        kernel = found["kernel"]
        delta = config.scale * jnp.einsum("LKR,LRN->LKN", a, b)
        return {"kernel": (kernel.astype(jnp.float32) + delta.reshape(kernel.shape)).astype(dtype)}

    return walk(params)
