"""The product with an NF4 weight on TPU: against the same kernel with bfloat16 weights, and that
against XLA's own product, by scheduled cycles.

    python benchmarks/nf4_product.py [--chips v4 v5e v5p v6e] [--mlp]

No TPU is needed: each is compiled for the chip and the cycles of our kernels are counted
(`tulu_jax/planning/cycles/schedule.py`: lower bounds). XLA's are the compiler's own estimate,
forward or backward as it stands in the program. W is 8,192 x 4,096; `--mlp` adds products with the
MLP of 7B, whose 11,008 no tile divides. "expected" is what a dry run takes the NF4 product for,
over its count. Needs the extra `tpu`.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tulu_jax import chips
from tulu_jax.kernels import nf4_matmul as nf4
from tulu_jax.kernels import nf4_tiles
from tulu_jax.planning import hlo
from tulu_jax.planning.cycles import nf4_cycles, schedule

CHIPS = ("v4", "v5e", "v5p", "v6e")
K, N = 8192, 4096
TARGETS = {4096: 1.05, 1024: 1.12}  # NF4 over bfloat16, by rows
TARGETS_V4 = {4096: 1.08, 1024: 1.12}
XLA_TARGET = 1.03  # bfloat16 over XLA's

# ---- what is compiled: called in the child process by `schedule.compile_for` ----


def by_kernel(tile, product):
    """The same grid, pieces and sums as of `nf4_matmul.run`, with a window of bfloat16 weights."""
    size, tile = nf4_cycles.Product(**product), nf4_tiles.Tile(**tile)
    along, across = -(-size.contracted // tile.contracted), -(-size.out // tile.out) // tile.shares
    rest = size.contracted - (along - 1) * tile.contracted
    lengths = {False: tile.contracted, True: rest} if rest != tile.contracted else {None: rest}

    def of(p, t):
        return lax.rem(t, along), lax.div(p, tile.bands) * across + lax.div(t, along)

    def at_rows(p, i):
        return lax.rem(p, tile.bands) * tile.blocks + i

    def at_out(p, t, i):
        c, o = of(p, t)
        return at_rows(p, jnp.where(c == along - 1, i, 0)), o

    def at_weight(p, t, i):
        return of(p, t)[:: -1 if size.backward else 1]

    def kernel(x, weights, out, acc):
        t, i = pl.program_id(1), pl.program_id(2)
        place = lax.rem(t, along)
        for ends, length in lengths.items():

            @pl.when(t >= 0 if ends is None else (place == along - 1) == ends)
            def _(length=length):
                nf4.accumulate(
                    x,
                    lambda rows, columns: weights[slice(*rows), slice(*columns)],
                    acc.at[i],
                    first=place == 0,
                    length=length,
                    backward=size.backward,
                )

        @pl.when(place == along - 1)
        def _():
            out[...] = acc[i].astype(out.dtype)

    height, width = (tile.out, tile.contracted) if size.backward else (tile.contracted, tile.out)
    call = pl.pallas_call(
        kernel,
        name="bfloat16_product",
        out_shape=jax.ShapeDtypeStruct((size.rows, size.out), jnp.bfloat16),
        grid=(tile.bands * tile.shares, along * across, tile.blocks),
        in_specs=[
            pl.BlockSpec(
                (tile.rows, tile.contracted), lambda p, t, i: (at_rows(p, i), of(p, t)[0])
            ),
            pl.BlockSpec((height, width), at_weight),
        ],
        out_specs=pl.BlockSpec((tile.rows, tile.out), at_out),
        scratch_shapes=[pltpu.VMEM((tile.blocks, tile.rows, tile.out), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tile.vmem,
            disable_bounds_checks=True,
        ),
    )
    return jax.jit(call), _arguments(size)


def by_xla(product):
    size = nf4_cycles.Product(**product)
    equation = "mn,kn->mk" if size.backward else "mk,kn->mn"
    return jax.jit(functools.partial(jnp.einsum, equation)), _arguments(size)


def _arguments(size):
    weight = (size.contracted, size.out)[:: -1 if size.backward else 1]
    return tuple(
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((size.rows, size.contracted), weight)
    )


# ---- the table ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Microseconds of one product by each, and what a dry run expects of the NF4 one."""

    product: nf4_cycles.Product
    nf4: float
    bfloat16: float
    xla: float
    expected: float
    ideal: float


def products(mlp: bool):
    """Forward and backward; the two directions contract over other axes of W."""
    sizes = [(rows, K, N) for rows in TARGETS]
    sizes += [(4096, 4096, 11008), (4096, 11008, 4096)] * mlp
    for rows, k, n in sizes:
        for backward in (False, True):
            contracted, out = (n, k) if backward else (k, n)
            yield nf4_cycles.Product(rows=rows, contracted=contracted, out=out, backward=backward)


def measure(chip: str, wanted: list[nf4_cycles.Product]) -> list[Line]:
    here, requests = os.path.abspath(__file__), []
    for product in wanted:
        size = dataclasses.asdict(product)
        tile = dataclasses.asdict(nf4_cycles.tile(chip, product))
        requests += [
            nf4_cycles.request(chip, product),
            schedule.Request(target=f"{here}:by_kernel", arguments=dict(tile=tile, product=size)),
            schedule.Request(target=f"{here}:by_xla", arguments=dict(product=size)),
        ]
    programs = iter(schedule.compile_for(chip, requests, timeout=7200))
    return [_line(chip, product, *(next(programs) for _ in range(3))) for product in wanted]


def _line(chip, product, ours, same, xla) -> Line:
    for program in (ours, same, xla):
        if program.error:
            raise RuntimeError(f"{chip}, {product}: {program.error}")
    hardware, tile = chips.CHIPS[chip], nf4_cycles.tile(chip, product)
    module = hlo.parse(xla.hlo)
    (ours,), (same,) = ours.kernels.values(), same.kernels.values()
    cycles = nf4_cycles.cycles(same, tile, product, cores=hardware.cores, ahead=0)
    expected = nf4_tiles.seconds(
        chip, rows=product.rows, contracted=product.contracted, out=product.out
    )
    return Line(
        product=product,
        nf4=1e6 * nf4_cycles.seconds(chip, product, ours),
        bfloat16=1e6 * cycles / hardware.clock,
        xla=1e6 * sum(i.cycles for i in module.computations[module.entry]) / hardware.clock,
        expected=1e6 * expected,
        ideal=1e6 * product.flops / hardware.peak,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--mlp", action="store_true", help="products of 7B's MLP as well")
    options = parser.parse_args()
    started, worst, results = time.monotonic(), 0.0, {}
    print("scheduled cycles / clock, us; peak: what the matrix units need alone")
    print(f"{'':10}{'rows':>6}{'contracted':>11}{'out':>7}{'NF4':>9}{'bf16':>9}{'XLA':>9}", end="")
    print(f"{'NF4/bf16':>10}{'bf16/XLA':>10}{'NF4/XLA':>9}{'peak/NF4':>10}{'expected':>10}")
    for chip in options.chips:
        for line in measure(chip, list(products(options.mlp))):
            product = line.product
            over, over_xla = line.nf4 / line.bfloat16, line.bfloat16 / line.xla
            good = True
            if {product.contracted, product.out} == {K, N}:
                target = (TARGETS_V4 if chip == "v4" else TARGETS)[product.rows]
                worst = max(worst, over / target, over_xla / XLA_TARGET)
                good = over <= target and over_xla <= XLA_TARGET
            print(
                f"{chip:4}{'backward' if product.backward else 'forward':>9}{product.rows:>6,}"
                f"{product.contracted:>8,}{product.out:>8,}"
                f"{line.nf4:9,.0f}{line.bfloat16:9,.0f}{line.xla:9,.0f}"
                f"{over:10.3f}{over_xla:10.3f}{line.nf4 / line.xla:9.3f}"
                f"{line.ideal / line.nf4:10.3f}{line.expected / line.nf4:10.3f}"
                f"{'' if good else '  MISSED'}",
                flush=True,
            )
            results.setdefault(chip, []).append(dataclasses.asdict(line))
    report = {
        "name": "nf4_product",
        "ratio": worst,
        "target": 1.0,
        "ok": bool(worst <= 1),
        "seconds": round(time.monotonic() - started),
        "measure": "largest of ratio / target over chips, rows and directions: of NF4 over "
        "bfloat16 weights in the same kernel, and of the latter over XLA's product; cycles",
        "chips": results,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
