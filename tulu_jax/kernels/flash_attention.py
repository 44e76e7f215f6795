"""Causal attention over packed rows on TPU: forward and backward, skipping what no query sees.

B batch, T queries, S keys, N query heads, K key/value heads, G = N/K, H head size. Query head n
reads key/value head n // G. A key is visible to a query if it is not later in the row, in the same
segment (0 is padding: sees nothing, gives zeros) and in the prompt (branch 0) or the same branch.

`prepare` lists, once for a batch, the (query block, key block) pairs in which anything is visible.
The grid is (groups of heads, steps), the second dimension dynamic: a step loads a few blocks of
queries and of keys and works those of their pairs that are listed, so what is not costs nothing.
It works on several heads at once: their independent matrix products fill each other's latencies,
which one head's block of this size cannot.

The forward pass keeps no running maximum: softmax needs no shift while its logits fit the float32
exponent. Each row's sum tells afterwards whether that held (`LARGEST`, `SMALLEST`). If it fails in
any row, `lax.cond` runs a kernel with a running maximum, whose results replace those of such rows.
The backward pass (Dao et al. 2022) is one kernel: the gradients of a key block and the query
gradients of the whole row stay in VMEM.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LOG2E = math.log2(math.e)
MASKED = -1e30  # a score whose exponential is exactly 0
UNSEEING = 1e30  # log-sum-exp of a query that sees nothing: exp2(score - UNSEEING) is exactly 0
# A row summed without a shift is exact if its sum is in this range and its output finite: nothing
# overflowed, and what vanished (below 2^-126) is under 2^-86 of the sum.
LARGEST, SMALLEST = 2.0**100, 2.0**-40
TINY = 2.0**-100  # under every sum that is used
NO_QUERY, NO_KEY = -(2**31), -(2**31) + 1  # codes of padding, equal to no other
LANES = 128
LARGEST_HEAD = 256
LISTED = 0.9  # the part of SMEM that a list of pairs may take

# Kinds of pairs, the low bits of a flag: those below, then one for each of EDGES. A segment that
# reaches into a pair from outside it needs only the later keys of the pair, and its earlier queries
# where it ends in it: of four parts of a block the first keys left out, and the queries worked.
# Wide matrix units take halves only.
EMPTY, FULL, DIAGONAL, EDGE = range(4)
EDGES = ((0, 4), (2, 4), (0, 2), (2, 2), (1, 4), (3, 4), (0, 3), (0, 1))
HALVES = 4  # so many of EDGES need no quarters
KIND = 15
FIRST, LAST = 16, 32  # first and last pair of the block that stays
LAST_QUERY = 512  # backward: last pair of the query block
# First pairs of a block without a diagonal: what stays, or backward the query block's gradient, has
# to be cleared. A diagonal comes before all that add, and writes.
CLEAR, CLEAR_QUERY = 64, 128

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """The work on one pair of blocks: `heads` query heads of `block` queries and as many keys. A
    grid step loads `load` blocks of queries and of keys, and works what is listed of their pairs.

    Whole pairs are computed `chunk` keys at a time, pairs on the diagonal `sub` keys at a time
    against the queries from there on. `pipelined` interleaves the stages of successive products in
    the program text, which needs more VMEM. `transposed` keeps probabilities as the stationary
    operand of the matrix unit, which fills a 256-wide one at H = 128.
    """

    block: int
    chunk: int
    sub: int
    heads: int
    pipelined: bool
    transposed: bool
    load: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles of both passes for a chip with `vmem` and `smem` bytes a core (the latter for lists of
    pairs) and so many cores a device. `widened` makes bfloat16 operands float32 in HBM, for a
    chip that loads no others into its matrix unit; the products round them again.
    """

    forward: Tile
    backward: Tile
    vmem: int
    smem: int
    cores: int
    widened: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "row",
        "query",
        "key",
        "flag",
        "shift",
        "start",
        "done_row",
        "done_query",
        "count",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPairs:
    """Listed pairs, int32 [M + 1] each, and the grid steps that work them, of which `count` [1] are
    real.

    Row of the batch, query block, key block; `flag` as above; `shift` is the position of the first
    query less that of the first key. Of each step its first pair, `start` [M + 2], and `done_*`:
    the blocks of queries loaded together whose gradient is next to be complete. (Fields are `Any`,
    because transformations put their own leaves here.)
    """

    row: Any
    query: Any
    key: Any
    flag: Any
    shift: Any
    start: Any
    done_row: Any
    done_query: Any
    count: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["own", "prompt", "key", "forward", "backward"],
    meta_fields=["tiling", "queries", "keys"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What every layer needs to know of a batch.

    Codes int32: a key is seen if its code [B, 1, S'] equals the query's `own` or `prompt` code
    [B, 1, T'] (`prompt` is None without branches). T' and S' are whole blocks.
    """

    own: Any
    prompt: Any
    key: Any
    forward: BlockPairs
    backward: BlockPairs
    tiling: Tiling
    queries: int
    keys: int


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _vmem(tile: Tile, *, queries: int, group: int, head_dim: int, itemsize: int, backward: bool):
    """About how many bytes of VMEM a kernel needs: windows twice, scratch, and values in flight."""
    heads, kv_heads, load = tile.heads, max(1, tile.heads // group), tile.load
    rows = load * tile.block * _up(head_dim, LANES)  # elements of one head's window
    values = 12 * tile.block * tile.chunk
    column = 4 * load * tile.block * LANES
    if not backward:
        windows = itemsize * rows * (2 * heads + 2 * kv_heads)
        return 2 * windows + rows * heads * (itemsize + 4) + column * heads + values
    windows = itemsize * rows * (3 * heads + 4 * kv_heads) + 32 * load * tile.block * heads
    sums = 4 * heads * _up(queries, load * tile.block) * head_dim
    return 2 * windows + sums + rows * kv_heads * (8 + itemsize) + column + values


def _fit_tile(tile: Tile, *, backward, tiling, queries, keys, heads, kv_heads, head_dim, itemsize):
    group = heads // kv_heads
    block = min(tile.block, _up(min(queries, keys), LANES))
    tile = dataclasses.replace(
        tile, block=block, chunk=math.gcd(block, tile.chunk), sub=math.gcd(block, tile.sub)
    )
    counts = [n for n in range(1, min(tile.heads, heads) + 1)
              if heads % n == 0 and (group % n == 0 or n % group == 0)]  # fmt: skip
    shared = [n for n in counts if heads // n % tiling.cores == 0]  # every core gets as many
    sizes = dict(queries=queries, group=group, head_dim=head_dim, itemsize=itemsize)
    even = all(_up(n, block) // block % tile.load == 0 for n in (queries, keys))
    loads = sorted({1, tile.load if even else 1}, reverse=True)
    for n, load in itertools.product(sorted(shared or counts, reverse=True), loads):
        tile = dataclasses.replace(tile, heads=n, load=load)
        needed = _vmem(tile, **sizes, backward=backward)
        if needed <= tiling.vmem:
            return tile
    raise ValueError(
        f"blocks of {block} with {queries} queries a row need about {needed:,} bytes of VMEM; "
        f"found {tiling.vmem:,}. Use smaller blocks, or shard the sequence over more devices"
    )


def fit(
    tiling: Tiling,
    *,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
) -> Tiling:
    """`tiling` with no more heads than divide evenly and fit in VMEM, blocks no longer than a row.

    Raises `ValueError` if one head of such a block does not fit, or heads do not divide.
    """
    if heads % kv_heads:
        raise ValueError(f"found {heads} query heads; expected a multiple of {kv_heads}")
    sizes = dict(
        tiling=tiling,
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(head_dim),
        itemsize=4 if tiling.widened else itemsize,
    )
    return dataclasses.replace(
        tiling,
        forward=_fit_tile(tiling.forward, backward=False, **sizes),
        backward=_fit_tile(tiling.backward, backward=True, **sizes),
    )


def _head_dim(H: int) -> int:
    """The head size that is computed: zeros are appended up to a multiple of 64."""
    if not 0 < H <= LARGEST_HEAD:
        raise ValueError(f"head size {H}: expected 1 to {LARGEST_HEAD}")
    return _up(H, 64)


def _list(visited, kind, shift, *, by_key: bool, bound: int, load: int) -> BlockPairs:
    """The pairs of `visited` [B, i, j] in order, the block of axis 1 staying while axis 2 moves,
    those of one grid step together. Blocks come in the order in which they are to be listed: of
    keys the last first, and of the queries that stay in the forward pass too."""
    B, outer, inner = visited.shape
    steps = outer // load, inner // load

    def together(x):
        """[B, outer, inner] in the order of the list: [B * steps, load * load]."""
        x = x.reshape(B, steps[0], load, steps[1], load)
        return x.swapaxes(2, 3).reshape(-1, load * load)

    def met(x, axis):
        """Where `x` is met for the first and for the last time along an axis."""
        times = jnp.cumsum(x, axis=axis, dtype=jnp.int32)
        return x & (times == 1), x & (times == lax.slice_in_dim(times, -1, None, axis=axis))

    first, last = met(visited, 2)
    moving_first, _ = met(visited, 1)
    diagonal = kind == DIAGONAL
    clear_query = moving_first & ~diagonal.any(axis=1, keepdims=True)
    flag = kind + FIRST * first + LAST * last + CLEAR * (first & ~diagonal)
    flag += CLEAR_QUERY * clear_query
    loaded = together(visited)
    # Of the moving blocks that are loaded together the last step, and of that its last pair.
    _, done = met(loaded.any(1).reshape(B, *steps), 1)
    _, ends = met(loaded, 1)
    flag = together(flag) + LAST_QUERY * (done.reshape(-1, 1) & ends)

    def listed(x, size):
        found = jnp.nonzero(x, size=size, fill_value=x.size - 1)[0]
        return found.astype(jnp.int32)

    index = listed(loaded.reshape(-1), bound + 1)
    number = jnp.arange(B * outer * inner, dtype=jnp.int32).reshape(B, outer, inner)
    place = together(number).reshape(-1)[index]
    row, i, j = place // (outer * inner), place // inner % outer, place % inner
    query, key = (j, outer - 1 - i) if by_key else (outer - 1 - i, inner - 1 - j)
    # Steps in order: how many pairs came before each, and after the last all of them.
    some = loaded.any(1)
    count = some.sum(dtype=jnp.int32)
    order = jnp.arange(bound + 2)
    which = listed(some, bound + 1)
    pairs = jnp.cumsum(loaded.sum(1, dtype=jnp.int32))
    start = jnp.where(
        order < count, (pairs - loaded.sum(1))[which[order.clip(max=bound)]], pairs[-1]
    )
    at = order[:-1]
    next_done = jnp.where(done.reshape(-1)[which] & (at < count), at, bound + 1)
    next_done = lax.cummin(next_done, reverse=True)
    # After the last of them nothing is written: the block stays.
    over = next_done > bound
    next_done = jnp.where(over, jnp.max(jnp.where(over, 0, next_done)), next_done)
    done_pair = start[next_done]
    return BlockPairs(
        row=row,
        query=query,
        key=key,
        flag=flag.reshape(-1)[index].astype(jnp.int32),
        shift=together(shift).reshape(-1)[index],
        start=start.astype(jnp.int32),
        done_row=row[done_pair],
        done_query=query[done_pair] // load,
        count=count[None],
    )


def count_visible(
    own: Int[Array, "B T"],
    prompt: Int[Array, "B T"] | None,
    key: Int[Array, "B S"],
    *,
    position: Int[Array, "T"],
    block_q: int,
    block_k: int,
) -> Int[Array, "B i j"]:
    """How many (query, key) pairs of each pair of blocks are visible, from `codes`; the query t is
    at `position[t]` of the keys."""
    B, S = key.shape

    def of_block(rows):  # [B, j]: of one query block
        own, prompt, position = rows
        visible = key[:, None] == own[:, :, None]
        if prompt is not None:
            visible |= key[:, None] == prompt[:, :, None]
        visible &= jnp.arange(S, dtype=jnp.int32)[None, None] <= position[None, :, None]
        by_key = visible.sum(axis=1, dtype=jnp.int32)  # sums over whole registers first
        return by_key.reshape(B, -1, block_k).sum(axis=2)

    def blocks_first(x):
        return None if x is None else x.reshape(B, -1, block_q).swapaxes(0, 1)

    # A block at a time: [B, T, S] would be gigabytes for long rows.
    rows = (blocks_first(own), blocks_first(prompt), position.reshape(-1, block_q))
    return lax.map(of_block, rows).swapaxes(0, 1)


def _pairs(tile, own, prompt, key, query_offset, *, by_key: bool, smem: int) -> BlockPairs:
    """Every pair of blocks of queries and keys in which anything is visible, and one for each block
    that would otherwise not be met, so that its results are written."""
    (B, T), S, block = own.shape, key.shape[1], tile.block
    i, j, parts = T // block, S // block, _parts(tile)
    part = block // parts
    if not isinstance(query_offset, int) and query_offset.ndim:  # an offset for each query
        query_offset = jnp.pad(query_offset, (0, T - len(query_offset)), mode="edge")
    position = query_offset + jnp.arange(T, dtype=jnp.int32)
    found = count_visible(own, prompt, key, position=position, block_q=part, block_k=part)
    found = found.reshape(B, i, parts, j, parts)
    seen = found.sum(axis=(2, 4))
    starts = block * jnp.arange(j, dtype=jnp.int32)
    shift = position[None, ::block, None] - starts[None, None]
    active = seen > 0
    whole = seen == block * block
    order = jnp.arange(parts)
    # The first part of the keys that is seen, and how many parts of the queries see anything.
    start = jnp.where(found.any(axis=2), order, parts).min(axis=3)
    end = jnp.where(found.any(axis=4), order[:, None] + 1, 0).max(axis=2)
    edge = jnp.asarray(edge_kinds(tile))[start % parts, jnp.maximum(end, 1) - 1]
    kind = jnp.where(active, jnp.where(whole, FULL, jnp.where(shift == 0, DIAGONAL, edge)), EMPTY)
    first_key = (jnp.arange(j) == 0)[None, None]
    visited = active | (first_key & ~active.any(axis=2, keepdims=True))
    if by_key:
        first_query = (jnp.arange(i) == 0)[None, :, None]
        visited |= first_query & ~active.any(axis=1, keepdims=True)
    if isinstance(query_offset, int):  # what causality leaves is known now
        ends = [min(j, (query_offset + (n + 1) * block - 1) // block + 1) for n in range(i)]
        bound = B * (sum(max(1, end) for end in ends) + by_key * (j - min(j, max(ends))))
    else:
        bound = B * i * j
    scalars = _scalars(by_key) * (bound + 1)
    if scalars > LISTED * smem:
        raise ValueError(
            f"the list of {bound} pairs of {block} x {block} needs {scalars:,} bytes of SMEM; "
            f"found {smem:,}. Use larger blocks, fewer rows or shorter ones, or attention "
            "'blockwise'"
        )
    shift = jnp.broadcast_to(shift, visited.shape)
    visited, kind, shift = (
        x[:, :, ::-1].swapaxes(1, 2) if by_key else x[:, ::-1, ::-1] for x in (visited, kind, shift)
    )
    return _list(visited, kind, shift, by_key=by_key, bound=bound, load=tile.load)


def _scalars(by_key: bool) -> int:
    """Bytes of SMEM that a pair takes."""
    return 4 * (8 if by_key else 6)


def most_rows(tiling: Tiling, *, queries: int, keys: int) -> int:
    """Rows of a call that can be listed for `tiling` (of `fit`), whatever they hold, in half of the
    SMEM: v3 needs nearly as much for the rest of a program."""
    return min(
        int(tiling.smem / 2 / _scalars(by_key) - 1)
        // (-(-queries // tile.block) * -(-keys // tile.block))
        for tile, by_key in ((tiling.forward, False), (tiling.backward, True))
    )


def codes(*, segment_ids, kv_segment_ids, branches, kv_branches, multiples):
    """One number for (segment, branch): own and prompt codes of queries [B, T'] (the latter None
    without branches) and codes of keys [B, S'], padded to `multiples` of queries and of keys. A key
    is seen if its code equals either of the query's.

    Raises `ValueError` for segments or branches that are not integers or do not match in shape.
    """
    (B, T), S = segment_ids.shape, kv_segment_ids.shape[1]
    for name, ids, shape in (
        ("segment_ids", segment_ids, (B, T)),
        ("kv_segment_ids", kv_segment_ids, (B, S)),
        ("branches", branches, (B, T)),
        ("kv_branches", kv_branches, (B, S)),
    ):
        if ids is not None and not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name} is {ids.dtype}; expected integers")
        if ids is not None and ids.shape != shape:
            raise ValueError(f"{name} has shape {ids.shape}; expected {shape}")
    if (branches is None) != (kv_branches is None):
        raise ValueError("branches and kv_branches come together: found only one of them")

    def code(segments, branches, padding, multiple):
        found = jnp.where(segments == 0, padding, 3 * segments + branches).astype(jnp.int32)
        n = found.shape[1]
        return jnp.pad(found, ((0, 0), (0, _up(n, multiple) - n)), constant_values=padding)

    own = code(segment_ids, 0 if branches is None else branches, NO_QUERY, multiples[0])
    prompt = None if branches is None else code(segment_ids, 0, NO_QUERY, multiples[0])
    key = code(kv_segment_ids, 0 if branches is None else kv_branches, NO_KEY, multiples[1])
    return own, prompt, key


def prepare(
    *,
    segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    branches: Int[Array, "B T"] | None,
    kv_branches: Int[Array, "B S"] | None,
    query_offset: Int[Array, ""] | Int[Array, "T"] | int,
    tiling: Tiling,
) -> Plan:
    """Lists the pairs of a batch for `tiling` (of `fit`); query t is at position t + query_offset,
    which never falls from one query to the next and is one number for the queries of a block.

    Raises `ValueError` for segments or branches that are not integers or do not match in shape.
    """
    largest = math.lcm(*(tile.load * tile.block for tile in (tiling.forward, tiling.backward)))
    own, prompt, key = found = codes(
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        branches=branches,
        kv_branches=kv_branches,
        multiples=(largest, largest),
    )
    return Plan(
        own=own[:, None],
        prompt=None if prompt is None else prompt[:, None],
        key=key[:, None],
        forward=_pairs(tiling.forward, *found, query_offset, by_key=False, smem=tiling.smem),
        backward=_pairs(tiling.backward, *found, query_offset, by_key=True, smem=tiling.smem),
        tiling=tiling,
        queries=segment_ids.shape[1],
        keys=kv_segment_ids.shape[1],
    )


def _column(row):
    """int32 [1, n] as [n, LANES], every lane the same."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _across(column, n):
    """[m, LANES] of equal lanes as [m, n]."""
    return jnp.tile(column, (1, n // LANES))


def _parts(tile: Tile) -> int:
    """In how many parts an edge is cut, each whole tiles of registers and of the matrix unit."""
    return math.gcd(tile.block // LANES, 2 if tile.transposed else 4)


def kinds(tile: Tile) -> tuple[int, ...]:
    """The kinds of pairs that kernels have bodies for, in the order of their program text."""
    edges = {1: 1, 2: HALVES, 4: len(EDGES)}[_parts(tile)]
    return (FULL, DIAGONAL, *range(EDGE, EDGE + edges))


def edge_kinds(tile: Tile) -> np.ndarray:
    """int32 [parts, parts]: the kind with least work for an edge whose keys are seen from part
    `start` on, by the queries of `end` parts, at [start, end - 1]."""
    parts = _parts(tile)
    found = np.zeros((parts, parts), np.int32)
    edges = [(*EDGES[kind - EDGE], kind) for kind in kinds(tile) if kind >= EDGE]
    for start, end in np.ndindex(parts, parts):
        found[start, end] = min(
            ((4 - skipped) * worked, kind)
            for skipped, worked, kind in edges
            if skipped * parts <= 4 * start and worked * parts >= 4 * (end + 1)
        )[1]
    return found


def chunks(kind: int, tile: Tile) -> list[tuple[int, int, int, int]]:
    """(first key, keys, first query, queries) of the products of a pair."""
    block = tile.block
    if kind == DIAGONAL:
        return [(k, tile.sub, k, block - k) for k in range(0, block, tile.sub)]
    skipped, worked = EDGES[kind - EDGE] if kind >= EDGE else (0, 4)
    first, queries = skipped * block // 4, worked * block // 4
    size = tile.chunk
    return [(k, min(size, block - k), 0, queries) for k in range(first, block, size)]


def _run(tile, kind, first, second, third, *, grouped):
    """`third(item, second(item, first(item)))` for each product of a pair.

    In a pipeline the first stage of an item is written before the second of the item before it and
    the third of the one before that: what the matrix unit and the vector unit do at a time belongs
    to different items. `grouped` takes as many small items at a time as make up a chunk of a whole
    pair.
    """
    items = [(chunk, head) for chunk in chunks(kind, tile) for head in range(tile.heads)]
    if not tile.pipelined:
        for item in items:
            third(item, second(item, first(item)))
        return
    groups, free = [], 0
    for item in items:
        (_, keys, _, queries), _ = item
        if not grouped or free < keys * queries:
            groups.append([])
            free = tile.chunk * tile.block
        groups[-1].append(item)
        free -= keys * queries
    following, late = [first(item) for item in groups[0]], []
    for n, items in enumerate(groups):
        current = following
        if n + 1 < len(groups):
            following = [first(item) for item in groups[n + 1]]
        for item, found in late:
            third(item, found)
        late = [(item, second(item, x)) for item, x in zip(items, current, strict=True)]
    for item, found in late:
        third(item, found)


def _dot(a, b, dims, precision):
    return lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _each(tile, start, body):
    """Runs `body` for each pair of a grid step."""
    t = pl.program_id(1)
    if tile.load == 1:
        body(t)
        return
    lax.fori_loop(start[t], start[t + 1], lambda n, _: body(n), None)


def _block_of(ref, axis, which, tile):
    """Of the blocks loaded together along `axis` the one that is block `which` of a row."""
    if tile.load == 1:
        return ref
    first = pl.multiple_of(lax.rem(which, tile.load) * tile.block, tile.block)
    return ref.at[(slice(None),) * axis + (pl.ds(first, tile.block),)]


def _on_kinds(flag, tile, body):
    """Runs `body` as the kind of the pair says."""
    for kind in kinds(tile):
        pl.when(flag & KIND == kind)(functools.partial(body, kind))


def _seen_by_rows(own, prompt, key, shift, q0):
    """bool [queries, keys] from [queries, LANES], [queries, LANES] or None, [1, keys]."""
    n = key.shape[1]
    seen = _across(own, n) == key
    if prompt is not None:
        seen |= _across(prompt, n) == key
    query, keys = (lax.broadcasted_iota(jnp.int32, seen.shape, axis) for axis in (0, 1))
    return seen & (keys - query <= shift + q0)


def _seen_by_columns(own, prompt, key, shift, k0):
    """bool [keys, queries] from [1, queries], [1, queries] or None, [keys, LANES]."""
    n = own.shape[1]
    key = _across(key, n)
    seen = key == own
    if prompt is not None:
        seen |= key == prompt
    keys, query = (lax.broadcasted_iota(jnp.int32, seen.shape, axis) for axis in (0, 1))
    return seen & (keys - query <= shift - k0)


def _forward_kernel(row, query, key, flag, shift, start, *refs, tile, **static):
    """One step of the forward pass for `tile.heads` query heads; see `_forward`."""
    del row
    _each(
        tile,
        start,
        lambda n: _forward_pair(query[n], key[n], flag[n], shift[n], *refs, tile=tile, **static),
    )


def _forward_pair(i, j, flag, shift, *refs, tile, group, scale, branched, online, precision):
    """Query block i and key block j of the forward pass."""
    q, k, v, codes, *refs = refs
    out, lse, scaled, acc, total, own, *refs = refs
    prompt, *refs = refs if branched else (None, *refs)
    largest = refs[0] if online else None
    q, out, lse = (_block_of(x, axis, i, tile) for x, axis in ((q, 1), (out, 1), (lse, 2)))
    k, v = (_block_of(x, 1, j, tile) for x in (k, v))
    held = lax.rem(i, tile.load)
    scaled, acc, total, own, prompt, largest = (
        x if x is None else x.at[held] for x in (scaled, acc, total, own, prompt, largest)
    )
    heads, turned = tile.heads, tile.transposed
    own_code = _code(codes, OWN, i)
    prompt_code = _code(codes, PROMPT, i) if branched else None

    @pl.when(flag & FIRST != 0)
    def _():
        for h in range(heads):
            scaled[h] = (q[h].astype(jnp.float32) * scale).astype(scaled.dtype)
        own[...] = _column(own_code)
        if branched:
            prompt[...] = _column(prompt_code)

    @pl.when(flag & (FIRST if online else CLEAR) != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        if online:
            largest[...] = jnp.full_like(largest, MASKED)

    def pair(kind):
        def scores(item):
            (k0, n, q0, m), h = item
            keys, queries = pl.ds(k0, n), pl.ds(q0, m)
            operands = scaled[h, queries], k[h // group, keys]
            s = _dot(*(operands[::-1] if turned else operands), NT, precision)
            return s if kind == FULL else jnp.where(seen(k0, n, q0, m), s, MASKED)

        @functools.cache
        def seen(k0, n, q0, m):
            queries = pl.ds(q0, m)
            code = _code(codes, KEY, j)[:, k0 : k0 + n]
            if turned:
                rows = (x if x is None else x[:, q0 : q0 + m] for x in (own_code, prompt_code))
                return _seen_by_columns(*rows, _column(code), shift, k0 - q0)
            columns = (x if x is None else x[queries] for x in (own, prompt))
            return _seen_by_rows(*columns, code, shift, q0 - k0)

        def add(item, ref, where, x):
            """The diagonal's first keys are seen by all queries, which nothing was added to."""
            (k0, *_), _ = item
            ref[where] = x if kind == DIAGONAL and k0 == 0 and not online else ref[where] + x

        def softmax(item, s):
            (_, n, q0, m), h = item
            queries = pl.ds(q0, m)
            if turned:
                p = jnp.exp2(s)
                add(
                    item, total, (h, slice(None), queries), p.reshape(-1, 8, p.shape[1]).sum(axis=0)
                )
                return p.astype(v.dtype)
            if online:
                old = largest[h, queries]
                new = jnp.maximum(old, s.max(axis=1, keepdims=True))
                largest[h, queries] = new
                # A row that has seen nothing yet has MASKED for its largest.
                p = jnp.where(s == MASKED, 0.0, jnp.exp2(s - _across(new, n)))
                decay = jnp.exp2(old - new)
                total[h, queries] *= decay
                acc[h, queries] *= decay[:, :1]
            else:
                p = jnp.exp2(s)
            folded = sum(p[:, c : c + LANES] for c in range(0, n, LANES))
            add(item, total, (h, queries), folded)
            return p.astype(v.dtype)

        def accumulate(item, p):
            (k0, n, q0, m), h = item
            queries, values = pl.ds(q0, m), v[h // group, pl.ds(k0, n)]
            if turned:
                add(item, acc, (h, slice(None), queries), _dot(values.T, p, NN, precision))
            else:
                add(item, acc, (h, queries), _dot(p, values, NN, precision))

        _run(tile, kind, scores, softmax, accumulate, grouped=True)

    _on_kinds(flag, tile, pair)

    @pl.when(flag & LAST != 0)
    def _():
        # Where the outputs are not finite, 0 times them makes the sum NaN.
        if turned:
            sums = []  # of each head, [1, queries]
            for h in range(heads):
                sums.append(total[h].sum(0, keepdims=True) + (acc[h] * 0.0).sum(0, keepdims=True))
                out_h = acc[h] * (1.0 / jnp.maximum(sums[h], TINY))
                out[h] = out_h.astype(out.dtype).T
        else:
            packed = jnp.zeros((tile.block, LANES), jnp.float32)
            lane = lax.broadcasted_iota(jnp.int32, packed.shape, 1)
            for h in range(heads):
                sum_h = (total[h] + _nothing(acc[h])).sum(axis=1, keepdims=True)
                packed = jnp.where(lane == h, sum_h, packed)
                # A query that sees nothing has a sum of 0, and outputs of 0 times this.
                out[h] = (acc[h] * (1.0 / jnp.maximum(sum_h, TINY))).astype(out.dtype)
            packed = packed.T  # one transposition for all heads
            sums = [packed[h : h + 1] for h in range(heads)]
        for h, sum_h in enumerate(sums):
            shown = jnp.where(sum_h > 0, jnp.log2(jnp.where(sum_h > 0, sum_h, 1.0)), UNSEEING)
            if online:
                lse[h] = jnp.where(sum_h > 0, shown + largest[h].T[:1], UNSEEING)
            else:
                exact = (sum_h < LARGEST) & (sum_h > SMALLEST)
                nothing = (own_code == NO_QUERY) & (sum_h == 0)
                lse[h] = jnp.where(exact | nothing, shown, jnp.inf)


def _nothing(x):
    """Zeros [n, LANES], but NaN in rows of `x` [n, H] that are not finite."""
    zeros = x * 0.0
    if x.shape[1] % LANES:
        zeros = jnp.pad(zeros, ((0, 0), (0, _up(x.shape[1], LANES) - x.shape[1])))
    return sum(zeros[:, c : c + LANES] for c in range(0, zeros.shape[1], LANES))


KEY, OWN, PROMPT = range(3)


def _place(t, lists, load):
    """Row, blocks of queries and blocks of keys that step t loads."""
    row, query, key, *_ = lists
    if load == 1:
        return row[t], query[t], key[t]
    first = lists[5][t]
    return row[first], lax.div(query[first], load), lax.div(key[first], load)


def _codes_by_block(plan, tile):
    """The codes of keys, of queries and (with branches) of prompts as [B, 2 or 3, blocks, block],
    blocks of the longest, and their window: those of the row at hand, read once for it."""
    codes = (plan.key, plan.own) + (() if plan.prompt is None else (plan.prompt,))
    longest = max(x.shape[2] for x in codes)
    codes = [jnp.pad(x, ((0, 0), (0, 0), (0, longest - x.shape[2]))) for x in codes]
    codes = jnp.concatenate(codes, axis=1)
    codes = codes.reshape(*codes.shape[:2], -1, tile.block)

    def of_row(n, t, *lists):
        return _place(t, lists, tile.load)[0], 0, 0, 0

    return codes, pl.BlockSpec((None, *codes.shape[1:]), of_row)


def _code(codes, which, block):
    """One block of a row's codes as [1, block]."""
    return codes[which, pl.ds(block, 1)]


def _compiler_params(tiling, interpret):
    if interpret:
        return None
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=tiling.vmem,
        disable_bounds_checks=True,
    )


def _forward(q, k, v, plan, *, online, static):
    """out [B, N, T', H] and log2-sum-exp2 float32 [B, N, 1, T'], the latter infinite where the sum
    without a running maximum is not exact."""
    (B, N, T, H), K = q.shape, k.shape[1]
    tile, pairs, group = plan.tiling.forward, plan.forward, N // K
    if online:  # rarely run: little to compile
        tile = dataclasses.replace(tile, heads=1, pipelined=False, transposed=False)
    heads, block, load = tile.heads, tile.block, tile.load
    kv_heads, parts = max(1, heads // group), max(1, group // heads)

    def at_query(n, t, *lists):
        row, query, _ = _place(t, lists, load)
        return row, n, query, 0

    def at_key(n, t, *lists):
        row, _, key = _place(t, lists, load)
        return row, lax.div(n, parts), key, 0

    def query_row(n, t, *lists):
        row, query, _ = _place(t, lists, load)
        return row, n, 0, query

    q_spec = pl.BlockSpec((None, heads, load * block, H), at_query)
    k_spec = pl.BlockSpec((None, kv_heads, load * block, H), at_key)
    turned = tile.transposed
    codes, codes_spec = _codes_by_block(plan, tile)
    columns = (load, heads, block, LANES)
    kernel = functools.partial(
        _forward_kernel,
        tile=tile,
        group=group,
        scale=LOG2E * static.scale,
        branched=plan.prompt is not None,
        online=online,
        precision=static.precision,
    )
    column = pltpu.VMEM((load, block, LANES), jnp.int32)
    return pl.pallas_call(
        kernel,
        name="flash_forward_online" if online else "flash_forward",
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(N // heads, pairs.count[0]),
            in_specs=[q_spec, k_spec, k_spec, codes_spec],
            out_specs=(q_spec, pl.BlockSpec((None, heads, 1, load * block), query_row)),
            scratch_shapes=[
                pltpu.VMEM((load, heads, block, H), q.dtype),
                pltpu.VMEM((load, heads, *((H, block) if turned else (block, H))), jnp.float32),
                pltpu.VMEM((load, heads, 8, block) if turned else columns, jnp.float32),
            ]
            + [column] * (codes.shape[1] - 1)
            + [pltpu.VMEM(columns, jnp.float32)] * online,
        ),
        compiler_params=_compiler_params(plan.tiling, static.interpret),
        interpret=static.interpret,
    )(
        *(pairs.row, pairs.query, pairs.key, pairs.flag, pairs.shift, pairs.start),
        *(q, k, v, codes),
    )


def _backward_kernel(
    row, query, key, flag, shift, start, done_row, done_query, *refs, tile, **static
):
    """One step of the backward pass; see `_backward`."""
    del row, done_row, done_query
    _each(
        tile,
        start,
        lambda n: _backward_pair(query[n], key[n], flag[n], shift[n], *refs, tile=tile, **static),
    )


def _backward_pair(i, j, flag, shift, *refs, tile, group, scale, branched, precision):
    """Query block i and key block j of the backward pass, scores as [keys, queries]."""
    q, k, v, d_out, stats, codes, dq, dk, dv, dq_acc, dk_acc, dv_acc, k_turned, key_column = refs
    q, d_out, stats = (_block_of(x, axis, i, tile) for x, axis in ((q, 1), (d_out, 1), (stats, 2)))
    k, v, dk, dv = (_block_of(x, 1, j, tile) for x in (k, v, dk, dv))
    held = lax.rem(j, tile.load)
    dk_acc, dv_acc, k_turned, key_column = (
        x.at[held] for x in (dk_acc, dv_acc, k_turned, key_column)
    )
    heads, turned = tile.heads, tile.transposed
    own_code = _code(codes, OWN, i)
    prompt_code = _code(codes, PROMPT, i) if branched else None

    @pl.when(flag & FIRST != 0)
    def _():
        for h in range(k.shape[0]):
            k_turned[h] = k[h].T
        key_column[...] = _column(_code(codes, KEY, j))

    @pl.when(flag & CLEAR != 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when(flag & CLEAR_QUERY != 0)
    def _():
        dq_acc[i] = jnp.zeros(dq_acc.shape[1:], jnp.float32)

    def pair(kind):
        def at(item):
            (k0, n, q0, m), h = item
            return h, h // group, pl.ds(k0, n), pl.ds(q0, m)

        @functools.cache
        def seen(k0, n, q0, m):
            rows = (x if x is None else x[:, q0 : q0 + m] for x in (own_code, prompt_code))
            return _seen_by_columns(*rows, key_column[pl.ds(k0, n)], shift, k0 - q0)

        @functools.cache
        def scale_queries(h, q0, m):
            x = q[h, pl.ds(q0, m)].astype(jnp.float32)
            return (x * (LOG2E * scale)).astype(q.dtype)

        def products(item):
            h, kv, keys, queries = at(item)
            s = _dot(k[kv, keys], scale_queries(h, *item[0][2:]), NT, precision)  # [n, queries]
            dp = _dot(v[kv, keys], d_out[h, queries], NT, precision)
            return s if kind == FULL else jnp.where(seen(*item[0]), s, MASKED), dp

        def gradients(item, products):
            h, _, _, queries = at(item)
            s, dp = products
            p = jnp.exp2(s - stats[h, :1, queries])
            ds = p * (dp - stats[h, 1:, queries])
            return p.astype(q.dtype), ds.astype(q.dtype)

        def accumulate(item, gradients):
            h, kv, keys, queries = at(item)
            p, ds = gradients
            qs = scale_queries(h, *item[0][2:])
            # What the diagonal is the first to touch: keys by the first head of a group, queries
            # by the first keys.
            fresh_keys = kind == DIAGONAL and h % group == 0
            fresh_queries = kind == DIAGONAL and item[0][0] == 0

            def add(ref, where, x, fresh):
                ref[where] = x if fresh else ref[where] + x

            if turned:
                where = kv, slice(None), keys
                add(dv_acc, where, _dot(d_out[h, queries].T, p, NT, precision), fresh_keys)
                add(dk_acc, where, _dot(qs.T, ds, NT, precision), fresh_keys)
            else:
                add(dv_acc, (kv, keys), _dot(p, d_out[h, queries], NN, precision), fresh_keys)
                add(dk_acc, (kv, keys), _dot(ds, qs, NN, precision), fresh_keys)
            where = i, h, slice(None), queries
            add(dq_acc, where, _dot(k_turned[kv, :, keys], ds, NN, precision), fresh_queries)

        _run(tile, kind, products, gradients, accumulate, grouped=False)

    _on_kinds(flag, tile, pair)

    @pl.when(flag & LAST_QUERY != 0)
    def _():
        first = lax.div(i, tile.load) * tile.load
        for n, h in itertools.product(range(tile.load), range(heads)):
            dq_h = (dq_acc[first + n, h] * scale).astype(dq.dtype)
            dq[h, n * tile.block : (n + 1) * tile.block] = dq_h.T

    @pl.when(flag & LAST != 0)
    def _():
        for h in range(k.shape[0]):
            dk_h = (dk_acc[h] / LOG2E).astype(dk.dtype)  # the queries were scaled by it
            dv_h = dv_acc[h].astype(dv.dtype)
            dk[h], dv[h] = (dk_h.T, dv_h.T) if turned else (dk_h, dv_h)


def _backward(q, k, v, stats, d_out, plan, static):
    """dq [B, N, T', H], dk and dv [B, K, S', H]."""
    (B, N, T, H), (K, S) = q.shape, k.shape[1:3]
    tile, pairs, group = plan.tiling.backward, plan.backward, N // K
    heads, block, load = tile.heads, tile.block, tile.load
    kv_heads = max(1, heads // group)
    parts = max(1, group // heads)  # partial sums of dk and dv

    def at_query(n, t, *lists):
        row, query, _ = _place(t, lists, load)
        return row, n, query, 0

    def at_key(n, t, *lists):
        row, _, key = _place(t, lists, load)
        return row, lax.div(n, parts), key, 0

    def at_done(n, t, *lists):
        return lists[6][t], n, lists[7][t], 0

    def at_part(n, t, *lists):
        row, _, key = _place(t, lists, load)
        return row, n, key, 0

    def query_row(n, t, *lists):
        row, query, _ = _place(t, lists, load)
        return row, n, 0, query

    q_spec = pl.BlockSpec((None, heads, load * block, H), at_query)
    k_spec = pl.BlockSpec((None, kv_heads, load * block, H), at_key)
    row_spec = pl.BlockSpec((None, heads, 2, load * block), query_row)
    part_spec = pl.BlockSpec((None, kv_heads, load * block, H), at_part)
    codes, codes_spec = _codes_by_block(plan, tile)
    part = jax.ShapeDtypeStruct((B, K * parts, S, H), jnp.float32 if parts > 1 else k.dtype)
    kernel = functools.partial(
        _backward_kernel,
        tile=tile,
        group=group,
        scale=static.scale,
        branched=plan.prompt is not None,
        precision=static.precision,
    )
    sums = (load, kv_heads, *((H, block) if tile.transposed else (block, H)))
    dq, dk, dv = pl.pallas_call(
        kernel,
        name="flash_backward",
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), part, part),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(N // heads, pairs.count[0]),
            in_specs=[q_spec, k_spec, k_spec, q_spec, row_spec, codes_spec],
            out_specs=(pl.BlockSpec((None, heads, load * block, H), at_done), part_spec, part_spec),
            scratch_shapes=[
                pltpu.VMEM((T // block, heads, H, block), jnp.float32),
                pltpu.VMEM(sums, jnp.float32),
                pltpu.VMEM(sums, jnp.float32),
                pltpu.VMEM((load, kv_heads, H, block), k.dtype),
                pltpu.VMEM((load, block, LANES), jnp.int32),
            ],
        ),
        compiler_params=_compiler_params(plan.tiling, static.interpret),
        interpret=static.interpret,
    )(
        *(pairs.row, pairs.query, pairs.key, pairs.flag, pairs.shift, pairs.start),
        *(pairs.done_row, pairs.done_query),
        *(q, k, v, d_out, stats, codes),
    )
    if parts > 1:
        dk, dv = (x.reshape(B, K, parts, S, H).sum(axis=2).astype(k.dtype) for x in (dk, dv))
    return dq, dk, dv


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    scale: float
    precision: lax.Precision
    interpret: bool


def static_of(q, head_dim: int, interpret: bool) -> _Static:
    """What the kernels need to know of queries [..., H'] padded from `head_dim`."""
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    return _Static(scale=head_dim**-0.5, precision=precision, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, plan, static):
    return _attention_forward(q, k, v, plan, static)[0]


def _attention_forward(q, k, v, plan, static):
    out, lse = _forward(q, k, v, plan, online=False, static=static)

    def redo(q, k, v):  # only the rows that need it: no row depends on what another one holds
        online_out, online_lse = _forward(q, k, v, plan, online=True, static=static)
        exact = lse < jnp.inf
        return jnp.where(exact.swapaxes(2, 3), out, online_out), jnp.where(exact, lse, online_lse)

    out, lse = lax.cond(jnp.all(lse < jnp.inf), lambda *_: (out, lse), redo, q, k, v)
    names = ("attention_q", "attention_k", "attention_v", "attention_out", "attention_lse")
    kept = (checkpoint_name(x, n) for x, n in zip((q, k, v, out, lse), names, strict=True))
    q, k, v, out, lse = kept
    return (out, lse), (q, k, v, plan, out, lse)


def _attention_backward(static, residuals, cotangents):
    q, k, v, plan, out, lse = residuals
    d_out, d_lse = cotangents
    # sum_s p·dp of softmax's backward, from the outputs alone
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)[:, :, None]
    delta -= d_lse * LOG2E
    stats = jnp.concatenate([lse, delta], axis=2)
    grads = _backward(q, k, v, stats, d_out.astype(q.dtype), plan, static)
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), plan)
    return (*grads, nothing)


_attention.defvjp(_attention_forward, _attention_backward)


def flash_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    plan: Plan,
    *,
    interpret: bool,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Attention in the dtype of `q`, and the float32 log-sum-exp of each query's logits.

    Logits are q·k / sqrt(H). A query that sees nothing gives zeros and a log-sum-exp of -inf.
    float32 inputs are multiplied in float32, bfloat16 ones with float32 sums. Both results are
    differentiable. `interpret` runs the kernel as plain JAX, for tests. Raises `ValueError` for
    shapes that do not belong together.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} axes, shape {x.shape}; expected 4")
    (B, N, T, H), (K, S) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape != (B, K, S, H) or N % K:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not belong together: expected "
            "[B, N, T, H] and twice [B, K, S, H] with N a multiple of K"
        )
    if (plan.own.shape[0], plan.queries, plan.keys) != (B, T, S):
        raise ValueError(
            f"the plan is for {plan.own.shape[0]} rows of {plan.queries} queries and {plan.keys} "
            f"keys; found {B} rows of {T} and {S}"
        )
    pad_T, pad_S, pad_H = plan.own.shape[2] - T, plan.key.shape[2] - S, _head_dim(H) - H
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad_T), (0, pad_H)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad_S), (0, pad_H))) for x in (k, v))
    dtype, static = q.dtype, static_of(q, H, interpret)
    if plan.tiling.widened:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    out, lse = _attention(q, k, v, plan, static)
    out, lse = out[:, :, :T, :H].astype(dtype), lse[:, :, 0, :T]
    return out, jnp.where(lse < UNSEEING, lse / LOG2E, -jnp.inf)
