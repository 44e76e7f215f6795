"""Attention of a decoding step over a cache in pages, as one Pallas kernel for TPUs.

The cache stays in HBM. Of it the kernel reads the pages that a row's table names up to its
position, each once, while what came before is multiplied; the next row's first pages are on their
way before a row ends. The new key and value go into the last page as it lies in VMEM, and back to
HBM in the 16 positions around them: XLA would copy the cache, or write row by row.

Rows of queries are few, 8 of a matrix unit's 128, so heads share a product: `heads` key/value heads
and all positions of a block of pages are the columns of one, and what belongs to another head is
masked as what lies behind the row's end is. One row waits for each product and each maximum, so a
few rows go side by side.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from tulu_jax.kernels import target

NAME = "decode_attention"
COMPILED = ("v4", "v5e", "v5p", "v6e")  # for which the compiler took it
LANES, SUBLANES = 128, 8
WRITTEN = 16  # positions that are written to HBM with a new one: a tile of bfloat16
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
HIDDEN = 2**30  # as a position: behind the end of every row
BLOCK_BYTES = 2**20  # of keys and values of a row's block
MOST_PAGES = 32  # of a block
TOGETHER = 4  # rows, at most
FEWEST = 2  # that a program has; of so few most often one is idle
UNROLLED = 4  # pages whose copies are started in one run of straight code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """`pages` of a row that are multiplied at once, `heads` key/value heads of a product, and how
    many `rows` go side by side: one alone waits for each of its products and sums."""

    pages: int
    heads: int
    rows: int


def page_for(kv_heads: int) -> int:
    """Positions of a page with a device's `kv_heads`: a copy takes some 30 cycles to start, in
    which 16 to 40 KiB come."""
    return {1: 256}.get(kv_heads, 128 if kv_heads <= 4 else 64)


def takes(chip: str | None, *, page: int, head_dim: int) -> bool:
    """Whether the kernel goes on a generation of TPU for pages of `page` positions of `head_dim`
    numbers."""
    return chip in COMPILED and page % WRITTEN == 0 and head_dim % LANES == 0


def fit(
    *, rows: int, heads: int, kv_heads: int, head_dim: int, page: int, table: int, itemsize: int
) -> Block:
    """The block for a core's `rows`, a device's N `heads` and K `kv_heads`, and tables of `table`
    pages."""
    group = heads // kv_heads
    together = max(c for c in range(1, kv_heads + 1)
                   if kv_heads % c == 0 and (c == 1 or c * group <= SUBLANES))  # fmt: skip
    size = 2 * kv_heads * page * head_dim * itemsize
    return Block(
        pages=max(1, min(BLOCK_BYTES // size, MOST_PAGES, table)),
        heads=together,
        rows=math.gcd(rows, TOGETHER) if rows > FEWEST else 1,
    )


def decode_attention(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    cache: dict[str, Float[Array, "L P K page H"]],
    layer: Int[Array, ""],
    *,
    table: Int[Array, "B M"],
    seen: Int[Array, "B"],
    interpret: bool,
) -> tuple[Float[Array, "B N H"], dict[str, Float[Array, "L P K page H"]]]:
    """float32 [B, N, H]: what each row's query sees of its first `seen` positions, and the cache
    with `k` and `v` at the last of them, which are the row's own. Rows that see 0 give zeros and
    write nothing. `cache` is `k` and `v`; no two rows may have the page of their last position in
    common."""
    (B, N, H), K = q.shape, k.shape[1]
    page = cache["k"].shape[3]
    cores = 1 if interpret else target.cores()
    cores = cores if B % cores == 0 else 1
    block = fit(
        rows=B // cores, heads=N, kv_heads=K, head_dim=H, page=page, table=table.shape[1],
        itemsize=cache["k"].dtype.itemsize,
    )  # fmt: skip
    groups, rows = K // block.heads, block.heads * (N // K)
    high = -(-rows // SUBLANES) * SUBLANES
    queries = q.astype(jnp.float32).reshape(B, groups, rows, H)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, high - rows), (0, 0)))
    new_k, new_v = (x.astype(jnp.float32)[:, :, None] for x in (k, v))

    def part(*shape):
        return pl.BlockSpec((B // cores, *shape), lambda core, *_: (core, *[0] * len(shape)))

    whole = pl.BlockSpec(memory_space=pltpu.HBM)
    dtype = cache["k"].dtype
    columns = block.pages * block.heads * page
    out, keys, values = pl.pallas_call(
        functools.partial(_kernel, block=block, group=N // K, table_pages=table.shape[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores,),
            in_specs=[part(groups, high, H), part(K, 1, H), part(K, 1, H), whole, whole],
            out_specs=[part(groups, high, H), whole, whole],
            scratch_shapes=[
                pltpu.VMEM((2, block.rows, block.pages, K, page, H), dtype),
                pltpu.VMEM((2, block.rows, block.pages, K, page, H), dtype),
                pltpu.VMEM((high, columns), jnp.int32),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, jnp.float32),
            # Left to itself XLA copies a small cache to VMEM and back, in each layer.
            pltpu.HBM(cache["k"].shape, dtype),
            pltpu.HBM(cache["v"].shape, dtype),
        ],
        input_output_aliases={6: 1, 7: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams() if interpret else False,
        name=NAME,
    )(
        jnp.reshape(layer, (1,)).astype(jnp.int32), table.reshape(-1), seen,
        queries, new_k, new_v, cache["k"], cache["v"],
    )  # fmt: skip
    return out[:, :, :rows].reshape(B, N, H), {"k": keys, "v": values}


def _kernel(
    layer_ref, table_ref, seen_ref, q_ref, new_k_ref, new_v_ref, _k, _v,
    out_ref, k_ref, v_ref, k_buffer, v_buffer, places_ref, arrived, written,
    *, block: Block, group: int, table_pages: int,
):  # fmt: skip
    """The rows of one core, `block.rows` at a time; `k_ref` and `v_ref` are the cache."""
    _, R, n, K, page, H = k_buffer.shape
    (count, groups, high, _), layer = q_ref.shape, layer_ref[0]
    first = pl.program_id(0) * count
    pairs = ((k_ref, k_buffer), (v_ref, v_buffer))

    def seen(row):
        return seen_ref[first + row]

    def place(row, number):
        return table_ref[(first + row) * table_pages + number]

    def pages(rows):
        """Of the longest of `R` rows, those from number R · `rows` on."""
        return pl.cdiv(functools.reduce(jnp.maximum, [seen(rows * R + r) for r in range(R)]), page)

    def live(row, start):
        """Pages of a row from its page `start` on that are in a block."""
        return jnp.clip(pl.cdiv(seen(row), page) - start, 0, n)

    def start_copies(rows, start, slot):
        """Of the live pages of a block of `R` rows from their page `start` on."""

        def of_row(r):
            row = rows * R + r

            def one(i):
                for kind, (cached, buffer) in enumerate(pairs):
                    pltpu.make_async_copy(
                        cached.at[layer, place(row, start + i)],
                        buffer.at[slot, r, i],
                        arrived.at[slot, kind],
                    ).start()

            def some(i, _):
                for u in range(UNROLLED):
                    one(i * UNROLLED + u)

            count = live(row, start)
            whole = count // UNROLLED
            jax.lax.fori_loop(0, whole, some, None)
            jax.lax.fori_loop(whole * UNROLLED, count, lambda i, _: one(i), None)

        for r in range(R):
            of_row(r)

    def await_copies(rows, start, slot):
        """A semaphore counts bytes, so that 1, 2, 4 ... pages are awaited at once."""
        for r in range(R):
            count = live(rows * R + r, start)
            for size in (2**power for power in range(n.bit_length())):

                @pl.when(count & size != 0)
                def _(r=r, size=size):
                    for kind, (_, buffer) in enumerate(pairs):
                        arriving = buffer.at[slot, r, pl.ds(0, size)]
                        pltpu.make_async_copy(arriving, arriving, arrived.at[slot, kind]).wait()

    def following(rows):
        """The first from `rows` on in which somebody sees anything."""
        most = count // R
        return jax.lax.while_loop(
            lambda g: (g < most) & (pages(jnp.minimum(g, most - 1)) == 0), lambda g: g + 1, rows
        )

    # What was never written may be no number, and 0 times that is none either.
    v_buffer[...] = jnp.zeros_like(v_buffer)
    # The position in a block that a column has for a line; of another head's keys it is hidden.
    line = jax.lax.broadcasted_iota(jnp.int32, places_ref.shape, 0) // group
    column = jax.lax.broadcasted_iota(jnp.int32, places_ref.shape, 1)
    places_ref[...] = jnp.where(
        line == column // page % block.heads,
        column // (page * block.heads) * page + column % page,
        HIDDEN,
    )

    def put(row, r, slot, own, base):
        """The new key and value of a row among the 16 positions around them, in VMEM."""
        here = jax.lax.broadcasted_iota(jnp.int32, (K, WRITTEN, H), 1)
        here = here == (seen(row) - 1) % page - base
        for buffer, new in ((k_buffer, new_k_ref), (v_buffer, new_v_ref)):
            around = buffer[slot, r, own, :, pl.ds(base, WRITTEN), :]
            new = jnp.broadcast_to(new[row], around.shape)
            around = jnp.where(here, new, around.astype(jnp.float32))
            buffer[slot, r, own, :, pl.ds(base, WRITTEN), :] = around.astype(buffer.dtype)

    def of_rows(rows, slot):
        end, follower = pages(rows), following(rows + 1)

        def of_block(i, carry):
            slot, state = carry
            start, last = i * n, (i + 1) * n >= end
            goes_on, ahead = jnp.where(last, follower, rows), jnp.where(last, 0, start + n)

            @pl.when(goes_on < count // R)
            def _():
                start_copies(goes_on, ahead, 1 - slot)

            await_copies(rows, start, slot)
            ends = []
            for r in range(R):
                row = rows * R + r
                number = pl.cdiv(seen(row), page) - 1
                own, base = number - start, (seen(row) - 1) % page // WRITTEN * WRITTEN
                base = pl.multiple_of(base, WRITTEN)
                here = (own >= 0) & (own < n)
                own, number = jnp.clip(own, 0, n - 1), jnp.maximum(number, 0)
                back = [
                    pltpu.make_async_copy(
                        buffer.at[slot, r, own, :, pl.ds(base, WRITTEN)],
                        cached.at[layer, place(row, number), :, pl.ds(base, WRITTEN)],
                        written.at[kind],
                    )
                    for kind, (cached, buffer) in enumerate(pairs)
                ]
                ends.append((here, back))

                @pl.when(here)
                def _(row=row, r=r, own=own, base=base, back=back):
                    put(row, r, slot, own, base)
                    for copy in back:
                        copy.start()

            looks = []
            for r, j in itertools.product(range(R), range(groups)):
                row, own = rows * R + r, pl.ds(j * block.heads, block.heads)
                keys, values = (x[slot, r, :, own].reshape(-1, H) for x in (k_buffer, v_buffer))
                visible = places_ref[...] < seen(row) - start * page
                looks.append((q_ref[row, j], keys, values, visible))
            state = _look(looks, state)
            for here, back in ends:

                @pl.when(here)
                def _(back=back):
                    for copy in back:
                        copy.wait()

            return 1 - slot, state

        empty = (
            jnp.zeros((high, H), jnp.float32),
            jnp.full((high, 1), MASKED, jnp.float32),
            jnp.zeros((high, 1), jnp.float32),
        )
        begun = (slot, (empty,) * (R * groups))
        slot, state = jax.lax.fori_loop(0, pl.cdiv(end, n), of_block, begun)
        for at, (acc, _, total) in enumerate(state):
            whole = acc / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
            out_ref[rows * R + at // groups, at % groups] = whole
        return slot

    begin = following(0)

    @pl.when(begin < count // R)
    def _():
        start_copies(begin, 0, 0)

    jax.lax.fori_loop(0, count // R, of_rows, 0)


def _look(looks, state):
    """The running sums, maxima and totals with a block of keys and values [columns, H] of each.

    Step by step for all of them: instructions stay about in the order in which they are written,
    and what one waits for the others fill.
    """
    columns_last = (((1,), (1,)), ((), ()))
    scores = [
        jax.lax.dot_general(
            q.astype(keys.dtype), keys, columns_last, preferred_element_type=jnp.float32
        )  # [lines, columns]
        for q, keys, _, _ in looks
    ]
    scores = [
        jnp.where(visible, one * keys.shape[1] ** -0.5, MASKED)
        for one, (_, keys, _, visible) in zip(scores, looks, strict=True)
    ]
    peaks = [one.max(axis=1, keepdims=True) for one in scores]
    peaks = [jnp.maximum(peak, old) for peak, (_, old, _) in zip(peaks, state, strict=True)]
    weights = [
        jnp.where(look[-1], jnp.exp(one - peak), 0.0)
        for one, peak, look in zip(scores, peaks, looks, strict=True)
    ]
    added = [
        jnp.dot(one.astype(values.dtype), values, preferred_element_type=jnp.float32)
        for one, (_, _, values, _) in zip(weights, looks, strict=True)
    ]
    totals = [one.sum(axis=1, keepdims=True) for one in weights]
    found = []
    for (acc, old, total), peak, more, mass in zip(state, peaks, added, totals, strict=True):
        decay = jnp.exp(old - peak)
        found.append((acc * decay + more, peak, total * decay + mass))
    return tuple(found)
