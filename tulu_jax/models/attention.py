"""Causal grouped-query attention over packed rows: one function, chosen implementations.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head
size. Query head n reads key/value head n // G. A key is visible to a query if it is in the same
segment (segment 0 is padding, visible to nobody), not later in the row and, where a segment
branches, in its prompt (branch 0) or in the branch of the query. Queries may start at an offset
into the keys (a decoding step, or a shard of the sequence). Rows that see nothing give zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tulu_jax import chips, validation
from tulu_jax.kernels import flash_attention, flash_attention_tuning, target
from tulu_jax.models import xla_attention
from tulu_jax.parallel import sharding
from tulu_jax.parallel.sharding import num_devices

LONGEST_TRIANGLE = 1024  # queries; beyond it the steps, unrolled, are too many to compile

# Axes over which kernels list what they need: a list for each shard of rows and queries.
LISTS = (*sharding.AXIS_RULES["batch"], sharding.AXIS_RULES["length"])

Visibility = dict[str, Any]


def choose(implementation: str, *, queries: int, keys: int, platform: str, dtype: jnp.dtype) -> str:
    """What 'auto' means: 'xla' for a single query (decoding), 'pallas' on a TPU whose kernel takes
    `dtype`, 'triangular' for short rows on a CPU, else 'blockwise'. Any other name is kept, but
    'triangular' takes no offset and yields to 'auto' over a longer cache.

    A GPU gets 'blockwise' too. `jax.nn.dot_product_attention` with cuDNN knows causal rows and
    their lengths; segments and branches it takes as a dense mask only, 128 MiB for a row of 8,192,
    and skips nothing for them (docs/attention.md).
    """
    if implementation == "triangular" and queries != keys:
        implementation = "auto"
    if implementation != "auto":
        return implementation
    if queries == 1:
        return "xla"
    if platform == "tpu":
        taken = flash_attention_tuning.takes(target.device_kind(), jnp.dtype(dtype).name)
        return "pallas" if taken else "blockwise"
    short = platform == "cpu" and queries == keys and queries <= LONGEST_TRIANGLE
    return "triangular" if short else "blockwise"


def prepare(
    *,
    segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    branches: Int[Array, "B T"] | None = None,
    kv_branches: Int[Array, "B S"] | None = None,
    query_offset: Int[Array, ""] | Int[Array, "T"] | int,
    implementation: str,
    heads: tuple[int, int, int],
    dtype: jnp.dtype,
    block: int | None = None,
) -> Visibility:
    """What `attend` needs to know of a batch, made once and shared by all layers.

    `heads` is (N, K, H) and `dtype` that of the queries, for kernels to size their blocks; `block`
    is the queries and keys of a block of 'pallas' or 'blockwise', None for the tuned one.
    Query t is at the place t + `query_offset` among the keys. That may be an offset for each query,
    one for each half of them: then blocks of a kernel lie within a half. `branches` None means that
    no segment branches. Raises `UsageError` for an implementation that does not exist or does not
    run here; nothing is substituted.
    """
    if implementation in ("pallas", "pallas_interpret"):
        interpret = implementation == "pallas_interpret"
        dtype = jnp.dtype(dtype)
        plan = _plan(
            (segment_ids, kv_segment_ids, branches, kv_branches),
            query_offset,
            tiling=_tiling(dtype, interpret=interpret, block=block),
            heads=heads,
            itemsize=dtype.itemsize,
        )
        return {"plan": plan, "interpret": interpret}
    places = jnp.asarray(query_offset, jnp.int32) + jnp.arange(segment_ids.shape[1])
    ids = {
        "segments": segment_ids,
        "kv_segments": kv_segment_ids,
        "branches": branches,
        "kv_branches": kv_branches,
    }
    if implementation == "blockwise":
        return {"tiles": xla_attention.list_tiles(places, block, **ids)}
    visible = xla_attention.visible_pairs(places, jnp.arange(kv_segment_ids.shape[1]), **ids)
    if implementation == "xla":
        return {"visible": visible}
    if implementation == "triangular":
        # An added bias, not a comparison inside the layers: XLA:CPU does not vectorise that there.
        bias = jnp.where(visible, 0.0, xla_attention.MASKED)
        return {"bias": bias, "seeing": (segment_ids != 0)[:, :, None, None]}
    raise validation.UsageError(
        f"attention implementation {implementation!r} does not exist; expected 'auto', "
        "'blockwise', 'pallas', 'triangular' or 'xla'"
    )


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visibility: Visibility,
) -> Float[Array, "B T N H"]:
    """Softmax attention in float32 statistics; the result has the dtype of `q`."""
    if "plan" in visibility:
        return _kernel(q, k, v, visibility["plan"], visibility["interpret"])
    if "visible" in visibility:
        return xla_attention.dense(q, k, v, visibility["visible"])
    if "bias" in visibility:
        out = xla_attention.triangular(q, k, v, visibility["bias"])
        return jnp.where(visibility["seeing"], out, 0)
    return xla_attention.blockwise(q, k, v, visibility["tiles"])


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    branches: Int[Array, "B T"] | None = None,
    kv_branches: Int[Array, "B S"] | None = None,
    query_offset: Int[Array, ""] | int,
    implementation: str,
) -> Float[Array, "B T N H"]:
    """`prepare` and `attend` in one."""
    visibility = prepare(
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        branches=branches,
        kv_branches=kv_branches,
        query_offset=query_offset,
        implementation=implementation,
        heads=(q.shape[2], k.shape[2], q.shape[3]),
        dtype=q.dtype,
    )
    return attend(q, k, v, visibility)


def _tiling(dtype: jnp.dtype, *, interpret: bool, block: int | None) -> flash_attention.Tiling:
    """The tuned tiling of the chip that the computation is for; raises `UsageError` if none is."""
    tiling = flash_attention_tuning.INTERPRETED
    if not interpret:
        kind = target.device_kind()
        chip = chips.name(kind)
        if chip is None:
            raise validation.UsageError(
                f"attention implementation 'pallas' does not run on {kind!r}; expected a TPU v3 or "
                "later. Use 'auto', 'blockwise' or 'xla'"
            )
        tiling = flash_attention_tuning.tiling(chip, dtype.name)
    return tiling if block is None else flash_attention_tuning.with_block(tiling, block)


def most_rows(
    device_kind: str,
    *,
    queries: int,
    keys: int,
    heads: tuple[int, int, int],
    dtype: jnp.dtype,
    block: int | None,
    balanced: bool,
) -> int | None:
    """Rows that a device takes in one call of the kernel, whatever they hold; `heads` (N, K, H) are
    those of the device, which with `balanced` has two runs of a row. None where no kernel runs."""
    chip = chips.name(device_kind)
    if chip is None or not flash_attention_tuning.takes(device_kind, dtype.name):
        return None
    tiling = flash_attention_tuning.tiling(chip, dtype.name)
    if block is not None:
        tiling = flash_attention_tuning.with_block(tiling, block)
    if balanced:
        tiling = flash_attention_tuning.within(tiling, queries // 2)
    N, K, H = heads
    sizes = dict(queries=queries, keys=keys)
    tiling = flash_attention.fit(
        tiling, heads=N, kv_heads=K, head_dim=H, itemsize=dtype.itemsize, **sizes
    )
    return flash_attention.most_rows(tiling, **sizes)


def _plan(ids, query_offset, *, tiling, heads, itemsize):
    """The lists of each device, one after the other on a leading axis over LISTS."""
    N, K, H = heads
    divided = num_devices() > 1  # else this is one device's part, or there is one device

    def local(segment_ids, kv_segment_ids, branches, kv_branches, query_offset):
        if divided:
            query_offset = query_offset + sharding.axis_index("length") * segment_ids.shape[1]
        each = jnp.ndim(query_offset) > 0  # two runs of queries (`parallel/balance.py`)
        tiles = tiling
        if each:
            tiles = flash_attention_tuning.within(tiling, segment_ids.shape[1] // 2)
        plan = flash_attention.prepare(
            segment_ids=segment_ids,
            kv_segment_ids=kv_segment_ids,
            branches=branches,
            kv_branches=kv_branches,
            query_offset=query_offset,
            tiling=flash_attention.fit(
                tiles,
                queries=segment_ids.shape[1],
                keys=kv_segment_ids.shape[1],
                heads=N // sharding.ways("heads"),
                kv_heads=K // sharding.ways("kv_heads"),
                head_dim=H,
                itemsize=itemsize,
            ),
        )
        return jax.tree.map(lambda x: x[None], plan)

    if not divided:
        return local(*ids, query_offset)
    queries, keys = sharding.spec("batch", "length"), sharding.spec("batch", None)
    specs = (queries, keys, queries, keys, PartitionSpec())
    return sharding.per_device(local, specs, PartitionSpec(LISTS))(
        *ids, jnp.asarray(query_offset, jnp.int32)
    )


def _kernel(q, k, v, plan, interpret):
    """The plan's kernel on each device's rows, heads and queries, against all keys of a row."""

    def local(q, k, v, plan):
        plan = jax.tree.map(lambda x: x[0], plan)
        heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
        out, _ = flash_attention.flash_attention(*heads_first, plan, interpret=interpret)
        return out.swapaxes(1, 2)

    queries = sharding.spec("batch", "length", "heads", None)
    keys = sharding.spec("batch", None, "kv_heads", None)
    specs = (queries, keys, keys, PartitionSpec(LISTS))
    return sharding.per_device(local, specs, queries)(q, k, v, plan)
