"""What stands apart from products in the program of a TPU (`models/products.py`)."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tulu_jax.models import config, layers
from tulu_jax.parallel import compiler
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.planning import aot, hlo, topology

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "jax[tpu]"'
)

SIZES = dict(
    vocab_size=512, num_layers=1, embed_dim=1024, mlp_dim=2048, num_heads=8, num_kv_heads=8,
    head_dim=128, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=4096,
)  # fmt: skip


@pytest.mark.parametrize(
    "positions, apart, inside", [(2048, True, False), (256, True, True), (2048, False, True)]
)
def test_silu_and_its_gradient_are_computed_once(absent_slices, positions, apart, inside):
    """Apart and of many positions no product has an exponential in it; else some have, as XLA puts
    it."""
    slice_ = topology.parse("v5e:2x2")
    mesh = mesh_lib.make(mesh_lib.MeshConfig(fsdp=4), slice_.devices())

    def made():
        made = dict(adapter=None, gather_dtype=None, rngs=nnx.Rngs(0))
        return layers.MLP(config.LlamaConfig(**SIZES), apart=apart, **made)

    graph, state = nnx.split(nnx.eval_shape(made))

    def gradients(state, x):
        def loss(state, x):
            (out,) = nnx.merge(graph, state)([x], None)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1))(state, x)

    whole = jax.NamedSharding(mesh, jax.P())
    x = jax.ShapeDtypeStruct((1, positions, SIZES["embed_dim"]), jnp.bfloat16)
    state, x = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=whole), (state, x)
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(gradients).trace(state, x).lower(lowering_platforms=("tpu",))
        made = aot.compiled_for(lowered, slice_, mesh, compiler.options("TPU v5 lite"))
    module = hlo.parse(made["hlo"])
    found = [
        {one.operation for one in module.inside(i)}
        for body in module.computations.values()
        for i in body
        if i.operation == "fusion"
    ]
    products = [names for names in found if names & {"dot", "convolution"}]
    assert len(products) >= 8
    assert any(names & {"exponential", "logistic"} for names in products) == inside
