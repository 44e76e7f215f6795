"""Counted cycles of a kernel whose time is known: a matrix product that only the unit can bind."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tulu_jax import chips
from tulu_jax.planning.cycles import schedule

BLOCK, BLOCKS = 512, 4


def product(parallel):
    """A tiled product of squares, and abstract operands."""

    def kernel(x, y, out, total):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == BLOCKS - 1)
        def _():
            out[...] = total[...].astype(out.dtype)

    def block(index):
        return pl.BlockSpec((BLOCK, BLOCK), index)

    x = jax.ShapeDtypeStruct((BLOCK * BLOCKS, BLOCK * BLOCKS), jnp.bfloat16)
    outer = "parallel" if parallel else "arbitrary"
    call = pl.pallas_call(
        kernel,
        out_shape=x,
        grid=(BLOCKS, BLOCKS, BLOCKS),
        in_specs=[block(lambda i, j, k: (i, k)), block(lambda i, j, k: (k, j))],
        out_specs=block(lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((BLOCK, BLOCK), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=(outer, outer, "arbitrary")),
    )
    return jax.jit(lambda x, y: call(x + 1, y)), (x, x)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]' brings the TPU compiler",
)
def test_a_matrix_product_takes_what_the_unit_needs_and_little_more():
    requests = [
        schedule.Request(target=f"{__file__}:product", arguments=dict(parallel=parallel))
        for parallel in (True, False)
    ]
    requests.append(schedule.Request(target=f"{__file__}:no_such_function"))
    both, one, missing = schedule.compile_for("v4", requests, timeout=300)
    assert missing.error.startswith("AttributeError") and not missing.kernels
    kernels = [next(iter(program.kernels.values())) for program in (both, one)]
    assert [kernel.primary_core_only for kernel in kernels] == [False, True]
    for kernel in kernels:
        chip = chips.CHIPS["v4"]
        ideal = 2 * BLOCK**3 / (chip.peak / chip.cores / chip.clock)
        (body,) = kernel.branches["step"]  # every step multiplies: no branch of its own
        assert ideal <= body.own <= 1.25 * ideal
        assert next(iter(kernel.bounds(body))) == "MXU"
        steps, tiles = BLOCKS**3, BLOCKS**2
        cycles = kernel.cycles(steps=steps, compute=[], side=[tiles, tiles])
        assert steps * body.own < cycles < 1.3 * steps * body.own
        with pytest.raises(ValueError, match="0 compute blocks; found 2 runs"):
            kernel.cycles(steps=steps, compute=[1, 1], side=[tiles, tiles])
    # Outside the kernel x + 1 reads x once; the compiler keeps its result on the chip, not in HBM.
    assert both.glue_bytes == 2 * (BLOCK * BLOCKS) ** 2
