"""Attention of decoding steps on a CPU, over the keys and values of each row side by side.

A CPU multiplies what lies in one piece, so from a cache in pages each step would copy all that it
reads. Here a row has the pages of its prompt copied once, when it begins (`begun`), and steps read
and write them there (`attend`). The rows of a layer are `k` and `v`, each a list of arrays
[B, K, M, page, H] with M pages of every row. The list grows without a copy; layers and
groups are apart, so that none is cut out of a larger array.

A product is made for each page alone, and pages are added in their order: a page that a row does
not have adds exact zeros, and the bits of a row depend neither on how many there are nor on other
rows.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tulu_jax.kernels import target
from tulu_jax.models import paged_attention
from tulu_jax.models.config import LlamaConfig
from tulu_jax.models.xla_attention import MASKED
from tulu_jax.parallel import sharding

Rows = tuple[dict[str, tuple[jax.Array, ...]], ...]  # of each layer
POSITIONS, MOST_GROUPS, MOST_PAGES = 256, 8, 16  # least of a group, of a row, of a group

MOST_LAYERS = 24  # which are compiled one by one
MOST_WEIGHTS = 1 << 31  # bytes of the layers, of which a program has a copy


def suits(config: LlamaConfig, layers) -> bool:
    """Whether steps of a model run so: on one CPU, few layers that are not large."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    small = config.num_layers <= MOST_LAYERS and size <= MOST_WEIGHTS
    return target.platform() == "cpu" and sharding.num_devices() == 1 and small


def pages_of_group(page: int, longest: int) -> int:
    """Of rows of at most `longest` positions, which have few groups."""
    return max(1, min(MOST_PAGES, max(POSITIONS, -(-longest // MOST_GROUPS)) // page))


def groups(rows: Rows) -> int:
    """How many there are of each layer."""
    return len(rows[0]["k"])


def widened(rows: Rows, cache: paged_attention.Cache, count: int, *, size: int, pages: int) -> Rows:
    """`count` groups of `pages` of `size` rows, those of `rows` and behind them zeros; without any
    rows, all are."""
    (L, _, K, page, H) = cache["k"].shape
    had = groups(rows) if rows else 0

    def more(n, name):
        own = rows[n][name] if rows else ()
        empty = [
            jnp.zeros((size, K, pages, page, H), cache[name].dtype) for _ in range(count - had)
        ]
        return (*own[:count], *empty)

    return tuple({name: more(n, name) for name in ("k", "v")} for n in range(L))


def begun(
    rows: Rows, cache: paged_attention.Cache, slot: Int[Array, ""], pages: Int[Array, "T"]
) -> Rows:
    """The rows with these pages of the cache at `slot`, as many as a group has for each group."""
    M = rows[0]["k"][0].shape[2]

    def group(x, layer, name, g):
        def put(m, x):
            at = (layer, pages[g * M + m], 0, 0, 0)
            found = jax.lax.dynamic_slice(cache[name], at, (1, 1, *cache[name].shape[2:]))
            return jax.lax.dynamic_update_slice(x, found.swapaxes(1, 2), (slot, 0, m, 0, 0))

        return jax.lax.fori_loop(0, M, put, x)

    return tuple(
        {name: tuple(group(x, n, name, g) for g, x in enumerate(own[name])) for name in own}
        for n, own in enumerate(rows)
    )


def seated(rows: Rows, slots: Int[Array, "B"]) -> Rows:
    """B rows, of which row b is that of `slots[b]`."""

    def move(x):
        def put(b, moved):
            found = jax.lax.dynamic_slice_in_dim(x, slots[b], 1)
            return jax.lax.dynamic_update_slice_in_dim(moved, found, b, 0)

        # A loop of copies: XLA's gather takes one element after the other on a CPU.
        return jax.lax.fori_loop(
            0, slots.shape[0], put, jnp.zeros((slots.shape[0], *x.shape[1:]), x.dtype)
        )

    return jax.tree.map(move, rows)


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
    count, K, M, page, _ = rows[layer]["k"][0].shape
    q, k, v, positions = (x[:count] for x in (q, k, v, positions))
    own = _written(rows[layer], {"k": k[:, 0], "v": v[:, 0]}, positions)
    dtype = dict(preferred_element_type=jnp.float32)
    q = q.reshape(count, K, N // K, H)
    scores, visible = [], []
    for g, keys in enumerate(own["k"]):
        places = (g * M * page + jnp.arange(M * page)).reshape(1, 1, M, 1, page)
        visible.append(places <= positions[:, None, None, None, None])
        found = jnp.einsum("BKGH,BKMSH->BKMGS", q, keys, **dtype) * H**-0.5
        scores.append(jnp.where(visible[-1], found, MASKED))
    largest = functools.reduce(jnp.maximum, (x.max((2, 4), keepdims=True) for x in scores))
    seen = total = 0.0
    for found, here, values in zip(scores, visible, own["v"], strict=True):
        exp = jnp.where(here, jnp.exp(found - largest), 0.0)
        added = jnp.einsum("BKMGS,BKMSH->BKMGH", exp.astype(v.dtype), values, **dtype)
        seen, total = _on_top(seen, added), _on_top(total, exp.sum(-1, keepdims=True))
    out = (seen / total).astype(q.dtype).reshape(count, 1, N, H)
    out = jnp.pad(out, [(0, B - count), (0, 0), (0, 0), (0, 0)])
    return out, (*rows[:layer], own, *rows[layer + 1 :])


def _on_top(total, x):
    """`total` and what axis 2 of `x` has, from its first element on."""
    for m in range(x.shape[2]):
        total = total + x[:, :, m]
    return total


def _written(own, new, positions):
    """A layer's rows with `new` [B, K, H] at `positions`, in place."""
    M, page = own["k"][0].shape[2:4]

    def write(b, own):
        def group(x, one, g):
            page_of = positions[b] // page - g * M
            at = (b, 0, jnp.clip(page_of, 0, M - 1), positions[b] % page, 0)
            there = jax.lax.dynamic_slice(x, at, one.shape)
            inside = (page_of >= 0) & (page_of < M)
            return jax.lax.dynamic_update_slice(x, jnp.where(inside, one, there), at)

        one = {name: x[b][None, :, None, None] for name, x in new.items()}
        return {
            name: tuple(group(x, one[name], g) for g, x in enumerate(own[name])) for name in own
        }

    return jax.lax.fori_loop(0, positions.shape[0], write, own)
