"""Attention of decoding steps on a CPU, over the keys and values of each row side by side.

A CPU multiplies what lies in one piece, so from a cache in pages each step would copy all that it
reads. Here a row has the pages of its prompt copied once, when it begins (`begun`), and steps read
and write them there (`attend`). The rows of a layer are `k` and `v`, [B, K, M, page, H] each, and
layers are apart, so that none is cut out of a larger array.

A product is made for each page alone, and pages are added in their order: a page that a row does
not have adds exact zeros, and the bits of a row depend neither on M nor on other rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tulu_jax.kernels import target
from tulu_jax.models import paged_attention
from tulu_jax.models.config import LlamaConfig
from tulu_jax.models.xla_attention import MASKED
from tulu_jax.parallel import sharding

Rows = tuple[paged_attention.Cache, ...]  # of each layer

MOST_LAYERS = 24  # which are compiled one by one
MOST_WEIGHTS = 1 << 31  # bytes of the layers, of which a program has a copy


def on_one_cpu() -> bool:
    return target.platform() == "cpu" and sharding.num_devices() == 1


def suits(config: LlamaConfig, layers) -> bool:
    """Whether steps of a model run so: on one CPU, few layers that are not large."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    return on_one_cpu() and config.num_layers <= MOST_LAYERS and size <= MOST_WEIGHTS


def seated(rows: Rows, cache: paged_attention.Cache, slots: Int[Array, "B"], *, pages: int) -> Rows:
    """B rows with room for `pages` each, of which row b is that of `slots[b]`. Without `rows` they
    are zeros, in the shape of those that `cache` is for."""
    (L, _, K, page, H), (B,) = cache["k"].shape, slots.shape
    empty = {name: jnp.zeros((B, K, pages, page, H), x.dtype) for name, x in cache.items()}

    def put(b, moved):
        def move(to, x):
            found = jax.lax.dynamic_slice_in_dim(x, slots[b], 1)[:, :, :pages]
            return jax.lax.dynamic_update_slice(to, found, (b, 0, 0, 0, 0))

        return jax.tree.map(move, moved, rows)

    # A loop of copies: XLA's gather takes one element after the other on a CPU.
    return jax.lax.fori_loop(0, B, put, (empty,) * L) if rows else (empty,) * L


def begun(
    rows: Rows, cache: paged_attention.Cache, slot: Int[Array, ""], pages: Int[Array, "T"]
) -> Rows:
    """The rows with these pages of the cache at `slot`."""

    def put(m, rows):
        def page_of(x, layer):
            return jax.lax.dynamic_slice(x, (layer, pages[m], 0, 0, 0), (1, 1, *x.shape[2:]))

        return tuple(
            {
                name: jax.lax.dynamic_update_slice(
                    x, page_of(cache[name], n).swapaxes(1, 2), (slot, 0, m, 0, 0)
                )
                for name, x in own.items()
            }
            for n, own in enumerate(rows)
        )

    return jax.lax.fori_loop(0, pages.shape[0], put, rows)


def attend(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    rows: Rows,
    layer: int,
    *,
    positions: Int[Array, "B"],
) -> tuple[Float[Array, "B 1 N H"], Rows]:
    """What the query of each row sees up to its position, and the rows with `k` and `v` there."""
    N = q.shape[2]
    B, K, M, page, H = rows[layer]["k"].shape
    own = _written(rows[layer], {"k": k[:, 0], "v": v[:, 0]}, positions)
    places = jnp.arange(M * page).reshape(1, 1, M, 1, page)
    visible = places <= positions[:, None, None, None, None]
    dtype = dict(preferred_element_type=jnp.float32)
    scores = jnp.einsum("BKGH,BKMSH->BKMGS", q.reshape(B, K, N // K, H), own["k"], **dtype)
    scores = jnp.where(visible, scores * H**-0.5, MASKED)
    exp = jnp.where(visible, jnp.exp(scores - scores.max((2, 4), keepdims=True)), 0.0)
    seen = jnp.einsum("BKMGS,BKMSH->BKMGH", exp.astype(v.dtype), own["v"], **dtype)
    out = _in_order(seen) / _in_order(exp.sum(-1, keepdims=True))
    return out.astype(q.dtype).reshape(B, 1, N, H), (*rows[:layer], own, *rows[layer + 1 :])


def _in_order(x):
    """The sum over axis 2, from its first element on."""
    total = x[:, :, 0]
    for m in range(1, x.shape[2]):
        total = total + x[:, :, m]
    return total


def _written(own, new, positions):
    """A layer's rows with `new` [B, K, H] at `positions`, in place."""
    page = own["k"].shape[3]

    def write(b, own):
        at = (b, 0, positions[b] // page, positions[b] % page, 0)
        return {
            name: jax.lax.dynamic_update_slice(x, new[name][b][None, :, None, None], at)
            for name, x in own.items()
        }

    # The number of rows as XLA cannot know it: a loop of one turn would be undone, and what it
    # writes into copied at each step.
    return jax.lax.fori_loop(0, (positions >= 0).sum(), write, own)
