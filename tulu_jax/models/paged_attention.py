"""Attention of a decoding step over a cache in pages.

A cache is `k` and `v`, [L, pages, K, page, H] each. A row has a table of the pages that hold its
positions, in order; rows may share pages. On a mesh the devices along `data`, `fsdp` and
`context` hold their own part of rows and pages, a table counts the pages of its part, and `tensor`
divides K. Page 0 of each part is nobody's: rows that have ended write there.

Pages are looked at one after the other with a running maximum (Milakov & Gimelshein 2018). A page
that a row does not have adds exact zeros to what the row saw, so that the bits of a row depend
neither on how long other rows are nor on where its pages lie.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tulu_jax.kernels import decode_attention, target
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.models.xla_attention import MASKED
from tulu_jax.parallel import sharding

NOBODYS = 0  # page
AXES = ("layers", "rows", "kv_heads", None, None)

Cache = dict[str, jax.Array]


def empty_cache(config: LlamaConfig, *, pages: int, page: int, dtype: str) -> Cache:
    """Zeros [L, pages, K, page, H]; `pages` are those of all devices together."""
    shape = (config.num_layers, pages, config.num_kv_heads, page, config.head_dim)
    return {name: sharding.constrain(jnp.zeros(shape, dtype), *AXES) for name in ("k", "v")}


def page_for(config: LlamaConfig, *, tensor: int) -> int:
    """Positions of a page that suit TPUs with the heads divided over `tensor`."""
    return decode_attention.page_for(max(1, config.num_kv_heads // tensor))


def for_prompts(execution: ExecutionConfig) -> ExecutionConfig:
    """How prompts are computed: with the weights of a step, which are gathered as they are, and on
    other devices than TPUs 'auto' is 'blockwise', whose blocks are the pages, so that a prompt has
    the same sums wherever it lies in a row."""
    execution = dataclasses.replace(execution, gather_dtype=None)
    if execution.attention in ("auto", "triangular") and target.platform() != "tpu":
        return dataclasses.replace(execution, attention="blockwise")
    return execution


def attend(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    cache: Cache,
    layer: Int[Array, ""],
    *,
    table: Int[Array, "B M"],
    positions: Int[Array, "B"],
    active: Int[Array, "B"],
) -> tuple[Float[Array, "B 1 N H"], Cache]:
    """What the query of each row sees of its positions up to its own, and the cache with `k` and
    `v` [B, 1, K, H] at `positions`; rows that are not `active` see zeros or anything.

    On TPUs a kernel does it, which reads what the tables name up to `positions`
    (`kernels/decode_attention.py`), for heads of whole lanes in pages of whole tiles. Inside
    `per_device` the arguments are of all rows, of q, k and v the device's own heads: along `group`
    devices exchange queries, so that each sees those of its rows.
    """
    if sharding.axis_size("rows") > 1:
        own = functools.partial(sharding.own, axis=0, logical_axis="rows")
        k, v, table, positions, active = (own(x) for x in (k, v, table, positions, active))
        q = sharding.exchange(q, cut=0, joined=2, mesh_axis=sharding.GROUP)
        out, cache = _attend(q, k, v, cache, layer, table, positions, active)
        return sharding.exchange(out, cut=2, joined=0, mesh_axis=sharding.GROUP), cache
    rows, heads = sharding.spec("rows"), sharding.spec("rows", None, "kv_heads", None)
    cached = sharding.spec(*AXES)
    cached = {"k": cached, "v": cached}
    run = sharding.per_device(
        _attend,
        (heads, heads, heads, cached, jax.P(), sharding.spec("rows", None), rows, rows),
        (heads, cached),
    )
    return run(q, k, v, cache, layer, table, positions, active)


def _attend(q, k, v, cache, layer, table, positions, active):
    page, head_dim = cache["k"].shape[3:]
    on_tpu = target.platform() == "tpu"
    if on_tpu and decode_attention.takes(target.chip(), page=page, head_dim=head_dim):
        seen = jnp.where(active != 0, positions + 1, 0)
        out, cache = decode_attention.decode_attention(
            q[:, 0], k[:, 0], v[:, 0], cache, layer, table=table, seen=seen, interpret=False
        )
        return out.astype(q.dtype)[:, None], cache
    place = jnp.take_along_axis(table, (positions // page)[:, None], axis=1)[:, 0]
    place = jnp.where(active != 0, place, NOBODYS)
    cache = {
        name: _written(cache[name], x[:, 0], layer, place, positions % page)
        for name, x in (("k", k), ("v", v))
    }
    (B, _, N, H), K = q.shape, k.shape[2]
    rows = (q.reshape(B, K, N // K, H), table, jnp.where(active != 0, positions + 1, 0))
    if target.platform() == "cpu":
        # Row by row each reads its own pages alone, and a slice is faster than a gather.
        out = jax.lax.map(lambda row: _seen(cache, layer, *(x[None] for x in row))[0], rows)
    else:
        out = _seen(cache, layer, *rows)
    return out.astype(q.dtype).reshape(B, 1, N, H), cache


def _seen(cache, layer, q, table, seen):
    """float32 [B, K, G, H]: what the queries [B, K, G, H] see of their first `seen` positions."""
    (*one, H), page = q.shape, cache["k"].shape[3]

    def look(j, carry):
        acc, largest, total = carry
        keys, values = (_page(cache[name], layer, table[:, j]) for name in ("k", "v"))
        scores = jnp.einsum("BKGH,BKSH->BKGS", q, keys, preferred_element_type=jnp.float32)
        visible = (j * page + jnp.arange(page))[None] < seen[:, None]
        visible = visible[:, None, None]
        scores = jnp.where(visible, scores * H**-0.5, MASKED)
        new_largest = jnp.maximum(largest, scores.max(-1, keepdims=True))
        exp = jnp.where(visible, jnp.exp(scores - new_largest), 0.0)
        decay = jnp.exp(largest - new_largest)
        added = jnp.einsum(
            "BKGS,BKSH->BKGH", exp.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return acc * decay + added, new_largest, total * decay + exp.sum(-1, keepdims=True)

    start = (
        jnp.zeros((*one, H), jnp.float32),
        jnp.full((*one, 1), MASKED, jnp.float32),
        jnp.zeros((*one, 1), jnp.float32),
    )
    acc, _, total = jax.lax.fori_loop(0, (seen.max() + page - 1) // page, look, start)
    return acc / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)


def _page(cache, layer, places):
    """Pages `places` [B] of a layer: [B, K, page, H]."""
    if places.shape[0] > 1:
        return cache[layer, places]
    return jax.lax.dynamic_slice(cache, (layer, places[0], 0, 0, 0), (1, 1, *cache.shape[2:]))[0]


def _written(cache, rows, layer, place, offset):
    """The cache with `rows` [B, K, H] at pages `place` and positions `offset` in them, in place."""

    def write(b, cache):
        return jax.lax.dynamic_update_slice(
            cache, rows[b][None, None, :, None], (layer, place[b], 0, offset[b], 0)
        )

    return jax.lax.fori_loop(0, rows.shape[0], write, cache)


def filled(cache: Cache, rows: Cache, taken: Int[Array, "T"], places: Int[Array, "T"]) -> Cache:
    """The cache with keys and values of rows, [L, B, T, K, H], which are cut in pages of their own:
    B · T / page of them, of which page `taken[i]` goes to page `places[i]`.

    On a mesh both count those of a device's part, and these lists are divided as rows are.
    """
    rows_spec = sharding.spec("layers", "rows", None, "kv_heads", None)
    listed, cached = sharding.spec("rows"), sharding.spec(*AXES)
    cached = {"k": cached, "v": cached}

    def local(cache, rows, taken, places):
        page = cache["k"].shape[3]

        def fill(cache, rows):
            L, B, T, K, H = rows.shape
            cut = rows.reshape(L, B * T // page, page, K, H).swapaxes(2, 3)
            return _moved(cache, cut, taken, places)

        return {name: fill(cache[name], rows[name]) for name in cache}

    specs = (cached, {"k": rows_spec, "v": rows_spec}, listed, listed)
    return sharding.per_device(local, specs, cached)(cache, rows, taken, places)


def taken(cache: Cache, places: Int[Array, "B C"]) -> Cache:
    """Keys and values [L, B, C · page, K, H] of the pages `places` of each part, B of them."""
    cached, kept = sharding.spec(*AXES), sharding.spec("layers", "rows", None, "kv_heads", None)

    def local(cache, places):
        def take(cache):
            L, _, K, _, H = cache.shape
            found = cache[:, places].swapaxes(3, 4)  # [L, B, C, page, K, H]
            return found.reshape(L, places.shape[0], -1, K, H)

        return {name: take(x) for name, x in cache.items()}

    specs = ({"k": cached, "v": cached}, sharding.spec("rows", None))
    return sharding.per_device(local, specs, {"k": kept, "v": kept})(cache, places)


def copied(cache: Cache, taken: Int[Array, "T"], places: Int[Array, "T"]) -> Cache:
    """The cache with a copy of page `taken[i]` at page `places[i]`, counted as `filled` does."""
    listed, cached = sharding.spec("rows"), sharding.spec(*AXES)
    cached = {"k": cached, "v": cached}

    def local(cache, taken, places):
        return {name: _moved(x, x, taken, places) for name, x in cache.items()}

    run = sharding.per_device(local, (cached, listed, listed), cached)
    return run(cache, taken, places)


def _moved(cache, source, taken, places):
    """The cache with the pages `taken` of `source` [L, pages, K, page, H] at `places`, in place."""
    L, _, *page = cache.shape

    def move(i, cache):
        found = jax.lax.dynamic_slice(source, (0, taken[i], 0, 0, 0), (L, 1, *page))
        return jax.lax.dynamic_update_slice(cache, found, (0, places[i], 0, 0, 0))

    return jax.lax.fori_loop(0, taken.shape[0], move, cache)
