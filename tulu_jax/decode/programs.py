"""The programs of a decoder, as they are compiled: all arrays, no schedule."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from tulu_jax.decode import same_bits, score_rows
from tulu_jax.decode import sampling as sampling_lib
from tulu_jax.models import kept_keys, llama, lora, paged_attention, row_attention
from tulu_jax.models.config import ExecutionConfig
from tulu_jax.parallel import sharding

FEWEST_ROWS = 2  # of a program in pages: attention of a single row may have other bits


def rounded(count: int) -> int:
    """`count` rounded up to a power of two up to 8, then to three significant bits: few sizes."""
    if count <= 8:
        return 1 << max(count - 1, 0).bit_length()
    unit = 1 << (count.bit_length() - 3)
    return -(-count // unit) * unit


def in_compute_dtype(params: llama.Params, execution: ExecutionConfig) -> llama.Params:
    """Matrices in the dtype they are multiplied in, once rather than in each step; norms, and what
    is quantised, as they are."""
    multiplied = ("kernel", "embedding", lora.A, lora.B)

    def cast(path, leaf):
        as_is = path[-1].key not in multiplied or leaf.dtype == execution.compute_dtype
        return leaf if as_is else leaf.astype(execution.compute_dtype)

    return jax.tree.map_with_path(cast, params)


@functools.partial(jax.jit, static_argnames=("config", "pages", "page", "dtype"))
def empty_cache(*, config, pages, page, dtype):
    return paged_attention.empty_cache(config, pages=pages, page=page, dtype=dtype)


@jax.jit
def key_words(key, prompts, samples):
    """The words of the key of each sample of each prompt, whole on every process."""
    one = jax.vmap(jax.random.fold_in)
    keys = key[prompts] if key.ndim else jax.vmap(lambda i: jax.random.fold_in(key, i))(prompts)
    return sharding.replicate(jax.random.key_data(one(keys, samples)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """Computed pages of each part, `places` [parts, C], and the segments of the packed rows that
    begin with them, `segment_ids` [parts, C]: of a segment in order, 0 for no page."""

    places: Any
    segment_ids: Any


@functools.partial(
    jax.jit,
    static_argnames=("config", "execution", "page"),
    donate_argnames="cache",
    compiler_options=same_bits.OPTIONS,
)
def fill(params, cache, rows, taken, places, known, *, config, execution, page):
    """The cache with the prompts of packed `rows`; with `known` None none of them has begun."""
    execution = paged_attention.for_prompts(execution)
    block = page if execution.attention == "blockwise" else None
    before = None
    if known is not None:
        before = kept_keys.Before(
            segment_ids=jnp.repeat(known.segment_ids, page, axis=1),
            cache=paged_attention.taken(cache, known.places),
        )
    found = kept_keys.keys_and_values(config, execution, params, block=block, before=before, **rows)
    return paged_attention.filled(cache, found, taken, places)


def goes_by_row(config, params, attend) -> bool:
    """Whether steps have the keys and values of each row side by side."""
    suits = row_attention.suits(config, params["model"]["layers"])
    return suits and attend is paged_attention.attend


def with_head(params: llama.Params) -> llama.Params:
    """A tied embedding with its transpose for a head beside it, by which a CPU multiplies few rows
    in half the time; all else is shared."""
    if "lm_head" in params:
        return params
    return params | {"lm_head": {"kernel": _transposed(llama.unembedding(params))}}


_transposed = jax.jit(jnp.transpose)
begin = functools.partial(jax.jit, donate_argnums=0)(row_attention.begun)
seat = functools.partial(jax.jit, static_argnames="pages")(row_attention.seated)


@functools.partial(jax.jit, donate_argnames="cache")
def copy(cache, taken, places):
    return paged_attention.copied(cache, taken, places)


@functools.partial(
    jax.jit,
    static_argnames=("config", "execution", "steps", "attend", "key_impl", "multiplied"),
    donate_argnames="cache",
    compiler_options=same_bits.OPTIONS,
)
def run_steps(
    params, cache, rows, least, *, config, execution, steps, attend, key_impl, multiplied=1
):
    """`tokens` and `logps` [steps, B], how many steps there were, and the cache, or what stands for
    it on a CPU (`row_attention.Rows`).

    A row that has no tokens `left` is idle. The step after which no more than `least` rows go on is
    the last one. Fewer rows than `multiplied` are multiplied beside rows of nobody's
    (`same_bits.py`), and all else is theirs alone.
    """
    rows = {
        name: sharding.constrain(x, "batch", *[None] * (x.ndim - 1)) for name, x in rows.items()
    }
    table, stop_ids = rows.pop("table"), rows["stop_ids"]
    names = ("temperature", "top_p", "top_k", "keys", "min_new_tokens", "stop_ids")
    settings = {name: rows.pop(name) for name in names}
    B = table.shape[0]
    out = {"tokens": jnp.zeros((steps, B), jnp.int32), "logps": jnp.zeros((steps, B))}
    by_row = isinstance(cache, tuple)
    pad, cut = functools.partial(_padded, rows=multiplied), functools.partial(_cut, rows=B)
    blocks = kept_keys.apart(config, execution, params) if by_row else None

    def step(state):
        i, rows, out, cached = state
        active = rows["left"] > 0
        if by_row:
            see = functools.partial(row_attention.attend, positions=rows["position"])
        else:
            see = functools.partial(
                attend, table=table, positions=rows["position"], active=active.astype(jnp.int32)
            )

        def attended(q, k, v, cached, layer):
            seen, cached = see(*map(cut, (q, k, v)), cached, layer)
            return pad(seen), cached

        hidden, cached = kept_keys.step(
            config, execution, params, cached, attended,
            tokens=pad(rows["token"]), positions=pad(rows["position"]), blocks=blocks,
        )  # fmt: skip
        logits = cut(llama.project_one(hidden, params))
        tokens, logps = sampling_lib.choose(
            logits, count=rows["count"], key_impl=key_impl, **settings
        )
        stops = (tokens[:, None] == stop_ids).any(axis=1)
        left = jnp.where(active & ~stops, rows["left"] - 1, 0)
        rows = {
            "token": jnp.where(active, tokens, rows["token"]),
            "position": rows["position"] + active,
            "left": left,
            "count": rows["count"] + active,
        }
        out = {"tokens": out["tokens"].at[i].set(tokens), "logps": out["logps"].at[i].set(logps)}
        return i + 1, rows, out, cached

    def goes_on(state):
        i, rows, *_ = state
        return (i < steps) & (jnp.sum(rows["left"] > 0) > least)

    state = (jnp.int32(0), rows, out, cache)
    i, _, out, cached = jax.lax.while_loop(goes_on, step, state)
    return jax.tree.map(sharding.replicate, out), sharding.replicate(i), cached


def _padded(x, *, rows: int):
    """`x` with nobody's rows behind its own, which XLA would leave out of products by itself."""
    if x.shape[0] >= rows:
        return x
    beside = jnp.pad(x, ((0, rows - x.shape[0]), *[(0, 0)] * (x.ndim - 1)))
    return jax.lax.optimization_barrier(beside)


def _cut(x, *, rows: int):
    return x if x.shape[0] == rows else jax.lax.optimization_barrier(x)[:rows]


@functools.partial(
    jax.jit, static_argnames=("config", "execution"), compiler_options=same_bits.OPTIONS
)
def score(params, batch, *, config, execution):
    """Of each entry [B, E] the log-probability of its target and whether that is the likeliest."""
    hidden = llama.hidden_states(
        config, execution, params, **{name: batch[name] for name in score_rows.FIELDS}
    )
    return jax.tree.map(
        sharding.replicate, score_rows.score(hidden, llama.unembedding(params), batch)
    )
