"""Sums on the host against those on devices, and of layers against the whole."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.training import checkpoint_digests, host_sums, state

SHAPES = [(0,), (1,), (1025,), (2, 5, 1024), (5000, 1001)]


def values(shape, dtype):
    drawn = np.random.default_rng(0).standard_normal(shape) * 1000
    return np.asarray(jnp.asarray(drawn, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_sums_on_devices(shape, dtype):
    array = values(shape, dtype)
    found = host_sums.of(array)
    assert found.digest == tuple(map(int, checkpoint_digests.sums(jnp.asarray(array))))
    assert found.weights == tuple(map(int, state.leaf_sums(jnp.asarray(array))))
    assert found.finite


def test_layers_add_up_to_the_whole():
    array = values((5, 33, 70), "bfloat16")
    parts = [host_sums.of(array[layer], layer) for layer in range(5)]
    whole = host_sums.of(array)
    for name in ("digest", "weights"):
        added = np.sum([getattr(part, name) for part in parts], axis=0) % 2**32
        assert tuple(added) == getattr(whole, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [0, 2047, 2048])
def test_what_is_not_finite_is_seen(dtype, value, place):
    array = values((2049,), dtype).copy()
    assert host_sums.of(array).finite
    array[place] = value
    assert not host_sums.of(array).finite


def test_threads_and_a_mesh_change_nothing():
    arrays = [values((40, 1000 + i), "float32") for i in range(6)]
    alone = [host_sums.of(array, i) for i, array in enumerate(arrays)]
    with (
        jax.set_mesh(jax.make_mesh((8,), ("fsdp",))),
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        assert [host_sums.of(array, i) for i, array in enumerate(arrays)] == alone
        assert list(pool.map(host_sums.of, arrays, range(6))) == alone


def test_a_column_of_a_matrix():
    array = values((50, 60), "float32")
    assert host_sums.of(array.T) == host_sums.of(np.ascontiguousarray(array.T))


@pytest.mark.parametrize("size", [7, 5000 * 1001])
def test_of_constants(size):
    for dtype in (np.dtype("float32"), jnp.dtype("bfloat16")):
        found = host_sums.of_constant(dtype, 0.25, size, 2)
        assert found == host_sums.of(np.full(size, 0.25, dtype), 2)
    assert not host_sums.of_constant(np.dtype("float32"), np.inf, size).finite
