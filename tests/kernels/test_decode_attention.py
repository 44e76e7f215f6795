"""The decode kernel in interpret mode against the XLA form: what is seen, and what is written."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.kernels import decode_attention as kernel
from tulu_jax.models import paged_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    seen: tuple[int, ...]
    heads: int
    kv_heads: int
    dtype: str = "float32"
    page: int = 16
    layers: int = 2


CASES = {
    # Four rows side by side: the first four see nothing, the others end on and off page borders.
    "idle rows, page borders": Case(seen=(0, 0, 0, 0, 16, 0, 1, 40), heads=2, kv_heads=2),
    "one row, grouped": Case(seen=(33,), heads=8, kv_heads=1),
    "groups of heads, bfloat16": Case(seen=(20, 34), heads=8, kv_heads=4, dtype="bfloat16"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sees_and_writes_what_the_xla_form_does(case, monkeypatch):
    monkeypatch.setattr(kernel, "MOST_PAGES", 2)  # rows of several blocks
    rng, H, B = np.random.default_rng(0), 128, len(case.seen)
    most = -(-max(max(case.seen), 1) // case.page)
    pages = 1 + B * most
    # Rows share a full page, as samples of one prompt do.
    table = 1 + rng.permutation(pages - 1).reshape(B, most).astype(np.int32)
    table[:, 0] = np.where(np.array(case.seen) > case.page, table[0, 0], table[:, 0])

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), case.dtype)

    q, k, v = draw(B, 1, case.heads, H), *(draw(B, 1, case.kv_heads, H) for _ in "kv")
    cache = {n: draw(case.layers, pages, case.kv_heads, case.page, H) for n in "kv"}
    seen = jnp.asarray(case.seen, jnp.int32)
    expected, filled = paged_attention.attend(
        q, k, v, cache, jnp.int32(1),
        table=jnp.asarray(table),
        positions=jnp.maximum(seen - 1, 0),
        active=(seen > 0).astype(jnp.int32),
    )  # fmt: skip
    found, written = kernel.decode_attention(
        q[:, 0], k[:, 0], v[:, 0], cache, jnp.int32(1),
        table=jnp.asarray(table), seen=seen, interpret=True,
    )  # fmt: skip
    # Blocks of several pages add in another order; bfloat16 rounds weights before the product.
    tolerance = 2e-6 if case.dtype == "float32" else 2e-2
    live = np.array(case.seen) > 0
    np.testing.assert_allclose(
        np.asarray(found)[live], np.asarray(expected, np.float32)[live, 0], atol=tolerance
    )
    assert not np.asarray(found)[~live].any()
    for name in "kv":  # the XLA form lets idle rows write to nobody's page
        np.testing.assert_array_equal(
            np.asarray(written[name])[:, 1:], np.asarray(filled[name])[:, 1:]
        )
        np.testing.assert_array_equal(
            np.asarray(written[name])[:, 0], np.asarray(cache[name])[:, 0]
        )
