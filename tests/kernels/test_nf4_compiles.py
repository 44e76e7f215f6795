"""The real TPU compiler takes the NF4 product for every generation, alone and in scanned layers."""

import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest

from tulu_jax.kernels import nf4_matmul as nf4
from tulu_jax.kernels import nf4_tiles
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.planning import aot, compiled, cost, hlo, topology
from tulu_jax.planning.cycles import nf4_cycles, schedule

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]' brings the TPU compiler",
)

# What divides into tiles, and what leaves shorter last ones in all three directions.
EVEN = nf4_cycles.Product(rows=512, contracted=1024, out=1024, backward=False)
UNEVEN = nf4_cycles.Product(rows=600, contracted=1152, out=640, backward=True)
OFTEN = [("v4", EVEN), ("v5e", UNEVEN), ("v5p", EVEN), ("v6e", UNEVEN)]


@pytest.mark.parametrize(
    "chip, product",
    [
        pytest.param(chip, product, marks=() if (chip, product) in OFTEN else pytest.mark.slow)
        for chip in ("v4", "v5e", "v5p", "v6e", "tpu7x")
        for product in (EVEN, UNEVEN)
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.rows} rows",
)
def test_compiles_and_takes_the_time_that_is_expected(chip, product):
    (program,) = schedule.compile_for(chip, [nf4_cycles.request(chip, product)], timeout=600)
    assert program.error is None, program.error
    (kernel,) = program.kernels.values()
    assert not kernel.primary_core_only
    counted = nf4_cycles.seconds(chip, product, kernel)
    expected = nf4_tiles.seconds(
        chip, rows=product.rows, contracted=product.contracted, out=product.out
    )
    # Small shapes, in which what a step costs besides its product weighs most.
    assert expected == pytest.approx(counted, rel=0.15)


L, D, F, ROWS = 4, 512, 1024, 640


def test_scanned_layers_hold_no_decoded_weight(absent_slices):
    """Forward and backward of stacked layers, rows divided over devices, layers rematerialised: of
    the stack no device ever holds more than a tile of a layer decoded."""
    slice_ = topology.parse("v5e:2x2")
    mesh = mesh_lib.make(mesh_lib.MeshConfig(data=4, fsdp=1, context=1, tensor=1), slice_.devices())

    def local(x, up, down):
        def body(x, layer):
            up, down = layer
            return x + nf4.matmul(jnp.tanh(nf4.matmul(x, *up)), *down), None

        body = jax.checkpoint(body, prevent_cse=False)
        return jnp.sum(jax.lax.scan(body, x, (up, down))[0].astype(jnp.float32) ** 2)

    def gradient(x, up, down):
        return jax.grad(local)(x, up, down)

    def weights(K, N):
        shapes = ((L, K // 8, N), jnp.int32), ((L, K // 64, N), jnp.float32)
        everywhere = jax.NamedSharding(mesh, jax.P())
        return tuple(jax.ShapeDtypeStruct(*one, sharding=everywhere) for one in shapes)

    rows = jax.P("data")
    x = jax.ShapeDtypeStruct((4 * ROWS, D), jnp.bfloat16, sharding=jax.NamedSharding(mesh, rows))
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            gradient, in_specs=(rows, jax.P(), jax.P()), out_specs=rows, check_vma=False
        )
        lowered = jax.jit(run).trace(x, weights(D, F), weights(F, D))
        lowered = lowered.lower(lowering_platforms=("tpu",))

        def make():
            program = lowered.compile()
            return {
                "hlo": program.as_text(),
                "temporaries": program.memory_analysis().temp_size_in_bytes,
            }

        made = compiled.kept(make, lowered, place=str(list(mesh.devices.flat)), options={})
    # Forward, forward again in the backward pass (the sum needs no second product), backward.
    assert made["hlo"].count('custom_call_target="tpu_custom_call"') >= 5
    module = hlo.parse(made["hlo"])
    shapes = [i.shape for body in module.computations.values() for i in body]
    found = {tuple(map(int, dims.split(","))) for shape in shapes
             for dims in re.findall(r"\b(?:bf16|f32)\[([\d,]+)\]", shape)}  # fmt: skip
    assert not [dims for dims in found if math.prod(dims) in (D * F, L * D * F)], json.dumps(
        sorted(found)
    )
    assert made["temporaries"] < 2 * L * D * F
    # The estimate of dry runs prices each: five products of a layer, none below the peak.
    estimate = cost.Estimator(
        module,
        slice_,
        aot.places(mesh, slice_),
        cost.mesh_axes(dict(mesh.shape)),
        kernel_seconds=lambda name, text: ("matrix", aot.product_seconds(name, text, slice_)),
        dynamic_trips=1.0,
    ).estimate()
    peak = 2.0 * ROWS * D * F * 5 * L / slice_.hardware.peak
    assert not estimate.unknown and peak < estimate.matrix < 1.5 * peak
