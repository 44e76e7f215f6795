"""Products on a CPU whose rows have the same bits whatever is beside them.

XLA multiplies few rows in another order than many. From which number on depends on the width, the
machine and its own version (two rows at a width of 288; with jax 0.12 four at 1,024; sixteen at
896), so it is tried: rows beside those of a program fill its products up to what was found.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax.models import llama, lora, row_attention
from tulu_jax.models.config import LlamaConfig

# Large sums and exponentials go to a library and small ones not, whose bits differ. Products alone
# stay with it. Elsewhere than on a CPU this says nothing.
OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}

MANY = 16  # rows, at which all programs of no more have the same bits
LEAST = 2  # rows: a single one is no product of matrices, and what XLA makes of it varies
LARGEST = 1 << 22  # elements of a matrix that is tried


def fewest_rows(config: LlamaConfig, params: llama.Params, *, dtype: str, slots: int) -> int:
    """The fewest rows, a power of two, of which and of twice as many, … up to the larger of `slots`
    and `MANY` each has the same bits behind the matrices of a model; 0 elsewhere than on one CPU,
    where no bits are promised."""
    if not row_attention.on_one_cpu():
        return 0
    leaves = jax.tree_util.tree_leaves_with_path(params)
    ranks = {leaf.shape[-1] for path, leaf in leaves if path[-1].key == lora.A}
    shapes = {*config.projections.values(), (config.embed_dim, config.vocab_size)}
    for rank in ranks:
        shapes |= {(size, rank) for size, _ in shapes} | {(rank, size) for _, size in shapes}
    return _fewest(tuple(sorted(shapes)), dtype, filled(max(slots, MANY)))


@functools.cache
def fewest_seats(config: LlamaConfig, *, dtype: str, page: int) -> int:
    """1 if what the query of a row sees has the same bits alone as beside another's, else 2."""
    K, H = config.num_kv_heads, config.head_dim
    drawn = np.random.default_rng(0)

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def seen(q, k, v, own, positions):
        return row_attention.attend(q, k, v, (own,), 0, positions=positions)[0]

    for pages in (1, 2, 4):
        shapes = [(2, 1, config.num_heads, H), *[(2, 1, K, H)] * 2, *[(2, K, pages, page, H)] * 2]
        q, k, v, *own = (
            jnp.asarray(drawn.standard_normal(shape, np.float32), dtype) for shape in shapes
        )
        both = q, k, v, dict(zip("kv", own, strict=True)), jnp.full(2, pages * page - 1)
        alone = jax.tree.map(lambda x: x[:1], both)
        if not np.array_equal(seen(*alone), seen(*both)[:1]):
            return 2
    return 1


def filled(rows: int) -> int:
    """The power of two that is no less."""
    return 1 << (rows - 1).bit_length()


@functools.cache
def _fewest(shapes: tuple[tuple[int, int], ...], dtype: str, most: int) -> int:
    drawn = np.random.default_rng(0).standard_normal(LARGEST, np.float32)

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def products(rows, kernels):
        return [x @ kernel for x, kernel in zip(rows, kernels, strict=True)]

    with jax.default_device(jax.devices("cpu")[0]):
        kernels = [_cut(drawn, (D, max(1, min(N, LARGEST // D)))).astype(dtype) for D, N in shapes]
        rows = [_cut(drawn[::-1], (most, D)).astype(dtype) for D, _ in shapes]
        found = jax.device_get(products(rows, kernels))
        fewest = most
        while fewest > LEAST:
            fewer = jax.device_get(products([x[: fewest // 2] for x in rows], kernels))
            if not all(map(np.array_equal, fewer, [y[: fewest // 2] for y in found])):
                break
            fewest //= 2
    return fewest


def _cut(drawn: np.ndarray, shape: tuple[int, int]) -> jax.Array:
    return jnp.asarray(drawn[: shape[0] * shape[1]].reshape(shape))
