"""The real TPU compiler takes the kernel for every generation, alone and in a sharded model."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from tulu_jax import chips
from tulu_jax.kernels import flash_attention as flash
from tulu_jax.kernels import flash_attention_tuning as tuning
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding
from tulu_jax.planning import compiled, topology
from tulu_jax.planning.cycles import schedule

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]' brings the TPU compiler",
)


def forward_and_backward(chip, heads, kv_heads, length, head_dim, dtype, branched):
    """What the child process compiles: a jitted function and its abstract arguments."""
    dtype = jnp.dtype(dtype)
    tiling = flash.fit(
        tuning.tiling(chip, dtype.name),
        queries=length,
        keys=length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        itemsize=dtype.itemsize,
    )

    def both(q, k, v, d_out, ids, branches):
        plan = flash.prepare(
            segment_ids=ids,
            kv_segment_ids=ids,
            branches=branches if branched else None,
            kv_branches=branches if branched else None,
            query_offset=0,
            tiling=tiling,
        )
        attend = lambda q, k, v: flash.flash_attention(q, k, v, plan, interpret=False)[0]  # noqa: E731
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(d_out)

    q, k = (jax.ShapeDtypeStruct((2, n, length, head_dim), dtype) for n in (heads, kv_heads))
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    return jax.jit(both), (q, k, k, q, ids, ids)


KINDS = {name: chip.kinds[-1] for name, chip in chips.CHIPS.items()}
PACKED = dict(heads=2, kv_heads=2, length=1024, head_dim=128, dtype="bfloat16", branched=False)
PAIRS = dict(heads=4, kv_heads=2, length=1000, head_dim=64, dtype="bfloat16", branched=True)
EXACT = dict(heads=2, kv_heads=1, length=512, head_dim=128, dtype="float32", branched=False)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(PACKED, id="packed"),
        pytest.param(PAIRS, id="pairs", marks=pytest.mark.slow),
        pytest.param(EXACT, id="float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("chip", ["v3", "v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_and_uses_every_core(chip, shape):
    if not tuning.takes(KINDS[chip], shape["dtype"]):
        with pytest.raises(ValueError, match="attention operands are float32"):
            forward_and_backward(chip, **shape)
        return
    request = schedule.Request(
        target=f"{__file__}:forward_and_backward", arguments={"chip": chip} | shape
    )
    (program,) = schedule.compile_for(chip, [request], timeout=600)
    assert program.error is None, program.error
    assert len(program.kernels) == 3  # forward, forward with a maximum, backward
    tiling = tuning.tiling(chip, shape["dtype"])
    for name, kernel in program.kernels.items():
        assert not kernel.primary_core_only
        tile = tiling.backward if "backward" in name else tiling.forward
        if "online" in name:
            tile = dataclasses.replace(tile, transposed=False)
        assert len(kernel.branches["compute"]) == len(flash.kinds(tile))


@pytest.mark.slow
def test_a_sharded_model_compiles_with_it(absent_slices):
    """Rows, heads and the sequence sharded over 8 chips that are not there."""
    slice_ = topology.parse("v5e:2x4")
    config = LlamaConfig(
        vocab_size=512, num_layers=2, embed_dim=512, mlp_dim=1024, num_heads=4,
        num_kv_heads=2, head_dim=128, rope_theta=1e4, norm_eps=1e-5,
        tie_embeddings=False, max_positions=4096,
    )  # fmt: skip
    execution = ExecutionConfig(attention="pallas", remat_policy="save_projections")
    shape = mesh_lib.MeshConfig(data=2, fsdp=1, context=2, tensor=2)
    mesh = mesh_lib.make(shape, slice_.devices())
    params = llama.abstract_params(config, "float32")
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        params,
        sharding.param_shardings(mesh, params),
    )
    rows = jax.NamedSharding(mesh, sharding.spec("batch", "length"))
    ids = jax.ShapeDtypeStruct((4, 2048), jnp.int32, sharding=rows)

    def loss(params, tokens, segment_ids, positions):
        hidden = llama.hidden_states(
            config, execution, params, tokens=tokens, segment_ids=segment_ids, positions=positions
        )
        return (hidden.astype(jnp.float32) ** 2).mean()

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss)).trace(params, ids, ids, ids)
        lowered = lowered.lower(lowering_platforms=("tpu",))
        made = compiled.kept(
            lambda: {"hlo": lowered.compile().as_text()},
            lowered,
            place=f"{slice_.name} {list(mesh.devices.flat)}",
            options={},
        )
    assert made["hlo"].count('custom_call_target="tpu_custom_call"') >= 3
