"""Attention of decoding steps on a CPU, over the pages of each row side by side.

A CPU multiplies what lies in one piece, so from a cache in pages each step would copy all that it
reads. Here a program's rows have their pages copied before its steps (`of_rows`), read and write
them there (`attend`), and what was written is put back behind the steps (`put_back`). The rows of a
layer are `k` and `v`, [B, K, M, page, H] each, and layers are apart, so that none is cut out of a
larger array.

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


def suits(config: LlamaConfig, layers) -> bool:
    """Whether steps of a model run so: on one CPU, few layers that are not large."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    small = config.num_layers <= MOST_LAYERS and size <= MOST_WEIGHTS
    return target.platform() == "cpu" and sharding.num_devices() == 1 and small


def of_rows(cache: paged_attention.Cache, table: Int[Array, "B M"]) -> Rows:
    """The pages of a table, for each layer."""
    (L, _, K, page, H), (B, M) = cache["k"].shape, table.shape

    def put(i, rows):
        b, m = i // M, i % M

        def page_of(x, layer):
            return jax.lax.dynamic_slice(x, (layer, table[b, m], 0, 0, 0), (1, 1, K, page, H))

        return tuple(
            {
                name: jax.lax.dynamic_update_slice(
                    x, page_of(cache[name], layer).swapaxes(1, 2), (b, 0, m, 0, 0)
                )
                for name, x in own.items()
            }
            for layer, own in enumerate(rows)
        )

    # A loop of copies: XLA's gather takes one element after the other on a CPU.
    empty = {name: jnp.zeros((B, K, M, page, H), x.dtype) for name, x in cache.items()}
    return jax.lax.fori_loop(0, B * M, put, (empty,) * L)


def attend(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    rows: Rows,
    layer: int,
    *,
    positions: Int[Array, "B"],
) -> tuple[Float[Array, "B 1 N H"], Rows]:
    """What the query of each row sees up to its position, and the rows with `k` and `v` there; the
    last of the queries, for which there are no `rows`, see nothing."""
    B, _, N, H = q.shape
    count = rows[layer]["k"].shape[0]
    q, k, v, positions = (x[:count] for x in (q, k, v, positions))
    own = _written(rows[layer], {"k": k[:, 0], "v": v[:, 0]}, positions)
    _, K, M, page, _ = own["k"].shape
    places = jnp.arange(M * page).reshape(1, 1, M, 1, page)
    visible = places <= positions[:, None, None, None, None]
    dtype = dict(preferred_element_type=jnp.float32)
    scores = jnp.einsum("BKGH,BKMSH->BKMGS", q.reshape(count, K, N // K, H), own["k"], **dtype)
    scores = jnp.where(visible, scores * H**-0.5, MASKED)
    exp = jnp.where(visible, jnp.exp(scores - scores.max((2, 4), keepdims=True)), 0.0)
    seen = jnp.einsum("BKMGS,BKMSH->BKMGH", exp.astype(v.dtype), own["v"], **dtype)
    out = _in_order(seen) / _in_order(exp.sum(-1, keepdims=True))
    out = out.astype(q.dtype).reshape(count, 1, N, H)
    out = jnp.pad(out, [(0, B - count), (0, 0), (0, 0), (0, 0)])
    return out, (*rows[:layer], own, *rows[layer + 1 :])


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

    return jax.lax.fori_loop(0, positions.shape[0], write, own)


def put_back(
    cache: paged_attention.Cache,
    rows: Rows,
    table: Int[Array, "B M"],
    start: Int[Array, "B"],
    *,
    steps: int,
) -> paged_attention.Cache:
    """The cache with the pages of `rows` that hold `steps` positions from `start` on. Where a table
    ends, that is nobody's page."""
    (B, M), page = table.shape, cache["k"].shape[3]
    count = (steps - 2) // page + 2  # whatever the place of `start` in its page
    pages = jnp.minimum(start[:, None] // page + jnp.arange(count)[None], M - 1)
    places = jnp.take_along_axis(table, pages, axis=1)

    def put(i, cache):
        b, n = i // count, i % count
        for layer, own in enumerate(rows):
            for name, x in own.items():
                here, at = (b, 0, pages[b, n], 0, 0), (layer, places[b, n], 0, 0, 0)
                found = jax.lax.dynamic_slice(x, here, (1, x.shape[1], 1, *x.shape[3:]))
                found = found.swapaxes(1, 2)
                cache = cache | {name: jax.lax.dynamic_update_slice(cache[name], found, at)}
        return cache

    return jax.lax.fori_loop(0, B * count, put, cache)
