"""Two chunks of a row a device: hidden states and gradients are those of one device."""

import contextlib
import dataclasses
import functools

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax.data.loader import DataConfig
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig
from tulu_jax.parallel import balance, sharding
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.planning import rows

LENGTH, SHORT = 1024, 128
MESHES = [
    MeshConfig(data=1, fsdp=2, context=4),
    MeshConfig(data=1, fsdp=1, context=4, tensor=2),
    MeshConfig(data=1, fsdp=1, context=2, tensor=4),
    MeshConfig(data=1, fsdp=1, context=3, tensor=2),
]


def name(mesh):
    return f"fsdp {mesh.fsdp} context {mesh.context} tensor {mesh.tensor}"


def on(mesh, length):
    devices = jax.devices()[: mesh.fsdp * mesh.context * mesh.tensor]
    return mesh_lib.make(mesh, devices), length // 4 * mesh.context


@pytest.mark.parametrize("mesh", MESHES, ids=name)
def test_chunks_are_an_early_and_a_late_one_and_come_back(mesh):
    mesh, length = on(mesh, LENGTH)
    context = mesh.shape["context"]
    row = jnp.arange(length, dtype=jnp.int32)[None]

    def local(x):
        assert balance.suits(length)
        own = balance.own(sharding.gather(x, 1, "length"))
        places = balance.offsets(length) + jnp.arange(own.shape[1])
        ordered = balance.in_order(sharding.gather(own, 1, "length"))
        return own, places[None], ordered, balance.back(sharding.own(own, 1, "tensor"))

    length_spec, positions = sharding.spec(None, "length"), sharding.spec(None, "positions")
    with jax.set_mesh(mesh):
        run = sharding.per_device(
            local, (length_spec,), (length_spec, length_spec, jax.P(), positions)
        )
        own, places, ordered, back = jax.jit(run)(row)
    for again in (ordered, back):
        np.testing.assert_array_equal(again, row)
    np.testing.assert_array_equal(own, places)
    chunks = np.asarray(own).reshape(context, 2, -1)[:, :, 0] // (length // (2 * context))
    assert chunks.tolist() == [[c, 2 * context - 1 - c] for c in range(context)]


def packed(length, branches):
    """Rows of documents that begin and end anywhere, with padding at the end."""
    segment_ids = np.zeros((2, length), np.int32)
    first = length * 3 // 10
    for row, lengths in enumerate([(first, 5, length - first - 9), (length - length // 10,)]):
        segment_ids[row, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    draw = np.random.default_rng(0)
    found = {
        "tokens": draw.integers(3, builders.MODEL.vocab_size, (2, length)).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": np.tile(np.arange(length, dtype=np.int32), (2, 1)),
    }
    if branches:
        found["branches"] = (np.arange(length) // 10 % 3)[None].repeat(2, 0).astype(np.int32)
    return found


@functools.cache
def parameters():
    """Larger than the usual initialisation, so that attention does not see all alike."""
    params = jax.jit(lambda: llama.init_params(builders.MODEL, jax.random.key(0)))()
    return jax.tree.map(lambda p: 5 * p if p.ndim > 2 else p, params)


@functools.cache
def value_and_grads(mesh, attention, *, length, balanced, branches, remat):
    """A sum of hidden states by fixed weights, its gradients, and the hidden states."""
    execution = ExecutionConfig(
        compute_dtype="float32", attention=attention, remat=remat, balanced=balanced,
        remat_policy="save_attention" if remat else None,
    )  # fmt: skip
    params, batch = parameters(), packed(length, branches)
    weights = jax.random.normal(jax.random.key(1), (2, length, builders.MODEL.embed_dim))
    weights *= (batch["segment_ids"] != 0)[:, :, None]

    def loss(params):
        fields = {name: jnp.asarray(field) for name, field in batch.items()}
        hidden = llama.hidden_states(builders.MODEL, execution, llama.own(params), **fields)
        return jnp.sum(hidden * weights), hidden

    made = None if mesh is None else mesh_lib.make(mesh)
    with contextlib.nullcontext() if made is None else jax.set_mesh(made):
        if made is not None:
            params = jax.device_put(params, sharding.param_shardings(made, params))
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


CASES = [
    (MESHES[0], "xla", SHORT, True, False),
    (MESHES[1], "xla", SHORT, False, True),
    (MESHES[2], "blockwise", SHORT, False, False),
    # Long enough for blocks that are left out, and for the kernel's own.
    pytest.param(MESHES[1], "blockwise", LENGTH, False, False, marks=pytest.mark.slow),
    pytest.param(MESHES[2], "pallas_interpret", LENGTH, True, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh, attention, length, branches, remat", CASES)
def test_balanced_rows_give_what_whole_rows_give(
    monkeypatch, mesh, attention, length, branches, remat
):
    if length == SHORT:
        monkeypatch.setattr(balance, "LEAST", 16)  # a kernel's blocks are longer
    same = dict(length=length, branches=branches)
    (one, hidden), grads = value_and_grads(None, "xla", balanced=False, remat=False, **same)
    (many, found), found_grads = value_and_grads(
        mesh, attention, balanced=True, remat=remat, **same
    )
    np.testing.assert_allclose(many, one, rtol=2e-5)
    seen = packed(length, branches)["segment_ids"] != 0
    np.testing.assert_allclose(np.asarray(found)[seen], np.asarray(hidden)[seen], atol=2e-5)
    for leaf, expected in zip(jax.tree.leaves(found_grads), jax.tree.leaves(grads), strict=True):
        size = float(jnp.abs(expected).max())
        np.testing.assert_allclose(leaf, expected, atol=2e-5 * size)


def test_a_balanced_program_is_another_one(monkeypatch):
    """The comparison above is not of the plain layout with itself."""
    moved = []
    monkeypatch.setattr(balance, "LEAST", 16)
    monkeypatch.setattr(balance, "back", lambda x: moved.append(x.shape) or x)
    same = dict(length=SHORT, branches=False, remat=False)
    (_, plain), _ = value_and_grads(None, "xla", balanced=False, **same)
    (_, found), _ = value_and_grads.__wrapped__(MESHES[0], "xla", balanced=True, **same)
    assert moved and not np.allclose(found, plain, atol=1e-2)


def test_short_rows_stay_as_they_are():
    assert balance.divides(1024, 4) and not balance.divides(512, 4)
    assert not balance.divides(1024, 1)


@pytest.mark.parametrize(
    "packing, asked, expected",
    [
        ("none", None, True),
        ("best_fit", None, False),
        ("best_fit", True, True),
        ("none", False, False),
    ],
)
def test_a_run_balances_rows_of_one_example(tmp_path, packing, asked, expected):
    config = builders.train_config(tmp_path)
    data = dataclasses.replace(config.data, packing=packing)
    execution = dataclasses.replace(config.execution, balanced=asked)
    config = dataclasses.replace(config, data=data, execution=execution)
    assert isinstance(data, DataConfig) and config.execution.balanced is expected


def test_the_estimate_counts_the_most_loaded_device():
    """Of 16 blocks a row of one document lists 136 pairs."""
    whole = functools.partial(rows.WHOLE.pairs, 8192, block=512)
    assert [whole(shards=n) for n in (2, 8)] == [100, 31]
    assert [whole(shards=n, balanced=True) for n in (2, 8)] == [68, 17]
    packed = functools.partial(rows.CONVERSATIONS.pairs, 8192, block=512, shards=8)
    assert 17 / 31 < packed(balanced=True) / packed() < 1
