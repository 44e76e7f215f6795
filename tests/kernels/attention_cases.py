"""The cases that every attention kernel is held to, and float64 attention to hold them against."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tulu_jax.kernels import flash_attention as flash


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Static sizes: everything else is drawn."""

    queries: int = 300
    keys: int = 300
    offset: int = 0
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    branched: bool = False
    block: int = 128
    chunk: int = 128
    sub: int = 128
    together: int = 2
    pipelined: bool = True
    transposed: bool = False
    load: int = 1
    widened: bool = False

    def tiling(self):
        tile = flash.Tile(
            block=self.block,
            chunk=self.chunk,
            sub=self.sub,
            heads=self.together,
            pipelined=self.pipelined,
            transposed=self.transposed,
            load=self.load,
        )
        return flash.fit(
            flash.Tiling(
                forward=tile,
                backward=tile,
                vmem=2**27,
                smem=2**20,
                cores=1,
                widened=self.widened,
            ),
            queries=self.queries,
            keys=self.keys,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            itemsize=jnp.dtype(self.dtype).itemsize,
        )


CASES = (
    Case(),
    Case(branched=True, block=256, transposed=True, kv_heads=1, together=4, load=2),
    Case(queries=500, keys=500, branched=True, load=2),
    Case(queries=200, offset=100, branched=True, block=256, kv_heads=1, pipelined=False),
    Case(queries=130, offset=128, heads=3, kv_heads=1, together=3, transposed=True),
    Case(queries=520, keys=520, head_dim=128, block=256, together=4, dtype="bfloat16"),
    Case(queries=1100, keys=1100, block=512, chunk=512, dtype="bfloat16"),
    Case(queries=120, keys=120, head_dim=80, heads=2, dtype="bfloat16", transposed=True),
    Case(queries=120, keys=120, branched=True, dtype="bfloat16", widened=True),
)


def visible(case, segments, branches):
    """bool [B, T, S] of rows of S."""
    rows = slice(case.offset, case.offset + case.queries)
    positions = np.arange(case.keys)
    seen = segments[:, rows, None] == segments[:, None]
    seen &= (segments[:, rows, None] != 0) & (positions[None, None] <= positions[None, rows, None])
    if branches is not None:
        same = branches[:, rows, None] == branches[:, None]
        seen &= (branches[:, None] == 0) | same
    return seen


def reference(q, k, v, d_out, seen):
    """float64 outputs, log-sum-exps and the three gradients of sum(out · d_out)."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    (B, N, _, H), K = q.shape, k.shape[1]
    keys, values = (np.repeat(x, N // K, axis=1) for x in (k, v))
    scores = np.where(seen[:, None], q @ keys.swapaxes(2, 3) / np.sqrt(H), -np.inf)
    largest = np.maximum(scores.max(-1, keepdims=True), -1e300)
    p = np.exp(scores - largest)
    total = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_sum_exp = (largest + np.log(total))[..., 0]
    p /= np.where(total > 0, total, 1)
    out = p @ values
    dp = d_out @ values.swapaxes(2, 3)
    ds = p * (dp - (d_out * out).sum(-1, keepdims=True)) / np.sqrt(H)
    grouped = (B, K, N // K, k.shape[2], H)
    dk = (ds.swapaxes(2, 3) @ q).reshape(grouped).sum(2)
    dv = (p.swapaxes(2, 3) @ d_out).reshape(grouped).sum(2)
    return out, log_sum_exp, (ds @ keys, dk, dv)


def draw_arrays(case, seed, rows=1):
    rng = np.random.default_rng(seed)
    N, K, H = case.heads, case.kv_heads, case.head_dim
    shapes = [(N, case.queries), (K, case.keys), (K, case.keys), (N, case.queries)]
    return [jnp.asarray(rng.normal(size=(rows, *x, H)), case.dtype) for x in shapes]


@st.composite
def layouts(draw, case):
    """Segments of one row: single, many short, padding only, an end at a block edge ±1, or free;
    an empty tail; numbers need not be in order."""
    S, edge = case.keys, min(case.block, case.keys - 2)
    lengths = draw(
        st.one_of(
            st.just([S]),
            st.just([S // 2]),
            st.just([7] * (S // 7)),
            st.just([]),
            st.sampled_from([[edge - 1, 40], [edge, 1], [edge + 1, S - edge - 1]]),
            st.lists(st.integers(1, S), max_size=6),
        )
    )
    numbers = draw(st.permutations(range(1, len(lengths) + 1)))
    segments, branches, start = np.zeros((1, S), np.int32), np.zeros((1, S), np.int32), 0
    for number, length in zip(numbers, lengths, strict=True):
        stop = min(S, start + length)
        segments[0, start:stop] = number
        if case.branched:
            cuts = sorted(draw(st.tuples(st.integers(start, stop), st.integers(start, stop))))
            branches[0, cuts[0] : cuts[1]], branches[0, cuts[1] : stop] = 1, 2
        start = stop
    return segments, branches if case.branched else None


def error(case, found, expected):
    """Relative: of the largest element in float32. In bfloat16 of the norm: where a query sees one
    key its gradient is 0, and what is found there is the rounding of the stored output."""
    found, size = np.asarray(found, np.float64), np.abs(expected).max(initial=0)
    if size < 1e-12:  # zero but for the rounding of float64
        return np.abs(found).max(initial=0)
    if case.dtype == "float32":
        return np.abs(found - expected).max() / size
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def tolerance(case):
    return 5e-6 if case.dtype == "float32" else 1e-2


def assert_matches_float64(case, arrays, segments, branches, found):
    """`found` is outputs, log-sum-exps and gradients of sum(out · d_out) for `arrays`, all with
    heads before positions; a query that sees nothing has exact zeros."""
    out, log_sum_exp, grads = found
    seen = visible(case, segments, branches)
    expected_out, expected_lse, expected_grads = reference(*arrays, seen)
    assert error(case, out, expected_out) < tolerance(case)
    for name, x, expected in zip("qkv", grads, expected_grads, strict=True):
        assert error(case, x, expected) < tolerance(case), name
    nothing = ~seen.any(-1)[:, None] & np.ones_like(log_sum_exp, bool)
    assert np.all(np.asarray(log_sum_exp)[nothing] == -np.inf)
    limit = 2e-6 if case.dtype == "float32" else 2e-2
    np.testing.assert_allclose(
        log_sum_exp[~nothing], expected_lse[~nothing], rtol=limit, atol=limit
    )
    for x in (out, grads[0]):
        assert not np.asarray(x, np.float32)[nothing].any()


BREAKING = {
    "logits of +300": lambda q, k: (q.at[..., 0].set(20.0), k.at[..., 0].set(120.0)),
    "logits of -300": lambda q, k: (q.at[..., 0].set(20.0), k.at[..., 0].set(-120.0)),
    "one enormous key": lambda q, k: (q, k.at[:, :, 5].multiply(1e4)),
    "one row of queries": lambda q, k: (q.at[:, :, 7].multiply(1e4), k),
}
