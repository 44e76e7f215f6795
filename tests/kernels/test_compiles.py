"""The real TPU compiler takes the kernel for every generation, alone and in a sharded model."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tulu_jax.kernels import flash_attention as flash
from tulu_jax.kernels import flash_attention_tuning as tuning
from tulu_jax.planning import schedule

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


KINDS = {name: kind for kind, name in tuning.CHIPS.items()}
SHAPES = (
    dict(heads=2, kv_heads=2, length=1024, head_dim=128, dtype="bfloat16", branched=False),
    dict(heads=4, kv_heads=2, length=1000, head_dim=64, dtype="bfloat16", branched=True),
    dict(heads=2, kv_heads=1, length=512, head_dim=128, dtype="float32", branched=False),
)


@pytest.mark.parametrize("chip", ["v3", "v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_and_uses_every_core(chip):
    requests = [
        schedule.Request(
            target=f"{__file__}:forward_and_backward", arguments={"chip": chip} | shape
        )
        for shape in SHAPES
        if tuning.takes(KINDS[chip], shape["dtype"])
    ]
    for program in schedule.compile_for(chip, requests, timeout=600):
        assert program.error is None, program.error
        assert len(program.kernels) == 3  # forward, forward with a maximum, backward
        for kernel in program.kernels.values():
            assert not kernel.primary_core_only
            assert len(kernel.branches["compute"]) == len(flash.kinds(512))


MODEL = """
import json, os, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.parallel import mesh, sharding
from tulu_jax.planning.schedule import CHIPS

chip = CHIPS["v5e"]
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
config = LlamaConfig(vocab_size=512, num_layers=2, embed_dim=512, mlp_dim=1024, num_heads=4,
                     num_kv_heads=2, head_dim=128, rope_theta=1e4, norm_eps=1e-5,
                     tie_embeddings=False, max_positions=4096)
execution = ExecutionConfig(attention="pallas", remat_policy="save_projections")
devices = mesh.make(mesh.MeshConfig(data=2, fsdp=1, context=2, tensor=2), list(topology.devices))
params = llama.abstract_params(config, "float32")
placed = sharding.state_shardings(devices, params)
params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed)
rows = NamedSharding(devices, sharding.spec("batch", "length"))
ids = jax.ShapeDtypeStruct((4, 2048), jnp.int32, sharding=rows)

def loss(params, tokens, segment_ids, positions):
    hidden = llama.hidden_states(config, execution, params, tokens=tokens, segment_ids=segment_ids,
                                 positions=positions)
    return (hidden.astype(jnp.float32) ** 2).mean()

with jax.set_mesh(devices):
    compiled = jax.jit(jax.grad(loss)).lower(params, ids, ids, ids).compile()
print(json.dumps({"kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"')}))
"""


def test_a_sharded_model_compiles_with_it(tmp_path):
    """Rows, heads and the sequence sharded over 8 chips that are not there."""
    found = subprocess.run(
        [sys.executable, "-c", MODEL],
        env=schedule.child_environment(str(tmp_path), ()),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert json.loads(found.stdout.splitlines()[-1])["kernels"] >= 3
