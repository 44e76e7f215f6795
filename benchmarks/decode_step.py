"""Products of a decoding step's layer: the kernels that stream stacked weights against XLA's form,
counted without a TPU.

    python benchmarks/decode_step.py [--chips v5e v5p v6e] [--rows 16 64 256]

For Llama 7B and 70B over 8 devices and 70B over 16, microseconds of one layer's products on a
device: ours by scheduled cycles and by traffic of HBM, of which the longer binds, and what a dry
run takes them for; XLA's by the compiler's own estimate of each product, or its traffic where that
is longer. `COUNTED` in `tulu_jax/planning/cycles/product_cycles.py` is made of the lines "weights a
cycle" and "call". The last line is JSON. Needs the extra `tpu`.
"""

import argparse
import dataclasses
import json
import os
import sys
import time

import jax
import jax.numpy as jnp

from tulu_jax import chips
from tulu_jax.kernels import decode_products
from tulu_jax.planning import hlo
from tulu_jax.planning.cycles import product_cycles, schedule

SHAPES = {
    "7B / 8": dict(embed=4096, heads=4, kv_heads=4, mlp=1376),
    "70B / 8": dict(embed=8192, heads=8, kv_heads=1, mlp=3584),
    "70B / 16": dict(embed=8192, heads=4, kv_heads=1, mlp=1792),
}
TARGET = 0.9  # of XLA's time, of a whole layer


def by_xla(shape):
    """All products of a layer in a loop over stacked weights, which is how XLA reads them."""
    size = product_cycles.Shape(**shape)
    D, F, N, K = size.embed, size.mlp, size.heads, size.kv_heads

    def layer(x, q, k, v, o, gate, up, down):
        def heads(w):
            return jnp.tensordot(x, w, ([1], [0]))

        seen = heads(q) + jnp.repeat(heads(k) + heads(v), N // K, axis=1)
        x = x + jnp.tensordot(seen, o, ([1, 2], [0, 1]))
        return x + (jax.nn.silu(x @ gate) * (x @ up)) @ down

    def run(x, *weights):
        return jax.lax.scan(lambda x, one: (layer(x, *one), None), x, weights)[0]

    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    stacked = [(D, N, 128), (D, K, 128), (D, K, 128), (N, 128, D), (D, F), (D, F), (F, D)]
    return jax.jit(run), (of(size.rows, D), *(of(4, *one) for one in stacked))


def xla_seconds(chip: str, program: schedule.Program) -> float:
    """Of one layer: the loop's body but for what is copied before it."""
    hardware, module = chips.CHIPS[chip], hlo.parse(program.hlo)
    (loop,) = (i for i in module.computations[module.entry] if i.operation == "while")
    shapes = {i.name: i.shape for body in module.computations.values() for i in body}
    body, total = module.computations[loop.attribute(r"body=%([\w.\-]+)")], 0.0
    for i in body:
        inside = [i, *module.inside(i)]
        if i.cycles and any(one.operation in ("dot", "convolution") for one in inside):
            moved = hlo.moved_bytes(module, shapes, i) / hardware.bandwidth
            total += max(i.cycles / hardware.clock, moved)
        elif i.operation in ("copy-start", "slice-start", "async-start"):
            sizes = [size for size in hlo.shape_bytes(i.shape) if size > 64]
            total += min(sizes, default=0.0) / hardware.bandwidth
    return total


def measure(chip: str, rows: list[int]) -> list[dict]:
    hardware, found, asked, requests = chips.CHIPS[chip], [], [], []
    for name, sizes in SHAPES.items():
        for count in rows:
            shape = product_cycles.Shape(rows=count, **sizes)
            kinds = [k for k in product_cycles.KINDS if shape.ring(k, hardware.cores)]
            asked.append((name, shape, kinds))
            requests += [product_cycles.request(kind, shape, hardware.cores) for kind in kinds]
            requests.append(
                schedule.Request(
                    target=f"{os.path.abspath(__file__)}:by_xla",
                    arguments=dict(shape=dataclasses.asdict(shape)),
                )
            )
    programs = iter(schedule.compile_for(chip, requests, timeout=7200))
    for name, shape, kinds in asked:
        line = {"chip": chip, "model": name, "rows": shape.rows, "kernels": {}}
        for kind in kinds:
            line["kernels"][kind] = _line(chip, kind, shape, next(programs))
        xla = next(programs)
        if xla.error:
            raise RuntimeError(f"{chip}, {name}: {xla.error}")
        line["xla"] = 1e6 * xla_seconds(chip, xla)
        if len(kinds) == len(product_cycles.KINDS):
            line["ours"] = sum(one["expected"] for one in line["kernels"].values())
            line["hbm"] = sum(one["hbm"] for one in line["kernels"].values())
        found.append(line)
    return found


def _line(chip, kind, shape, program) -> dict:
    if program.error:
        raise RuntimeError(f"{chip}, {kind}, {shape}: {program.error}")
    hardware = chips.CHIPS[chip]
    ring, (kernel,) = shape.ring(kind, hardware.cores), program.kernels.values()
    counted, call = product_cycles.counted(kernel, ring), product_cycles.call(chip, kind, shape)
    moved = ring.bytes / hardware.bandwidth
    cycles = product_cycles.cycles(kernel, ring) / hardware.clock
    expected = max(cycles, moved) if call is None else call.seconds
    return {
        "weights a cycle": round(counted.weights),
        "call": round(counted.call),
        "cycles": round(1e6 * cycles, 2),
        "hbm": round(1e6 * moved, 2),
        "expected": round(1e6 * expected, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = decode_products.COMPILED
    parser.add_argument("--chips", nargs="+", default=list(known), choices=known)
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64])
    options = parser.parse_args()
    started, lines = time.monotonic(), []
    print("us of a layer on a device; each kernel: cycles | weights a cycle | call")
    for chip in options.chips:
        for line in measure(chip, options.rows):
            lines.append(line)
            each = "".join(
                f"{kind:>5}{one['cycles']:8.2f} |{one['weights a cycle']:5d} |{one['call']:6d}"
                for kind, one in line["kernels"].items()
            )
            ours, hbm = line.get("ours"), line.get("hbm")
            whole = f"{hbm:8.2f}{ours:8.2f}" if ours else f"{'XLA goes':>16}"
            ratio = f"{ours / line['xla']:6.2f}" if ours else ""
            print(
                f"{chip:4}{line['model']:>9}{line['rows']:5d}  HBM, ours, XLA, ratio"
                f"{whole}{line['xla']:8.2f}{ratio}  {each}",
                flush=True,
            )
    worst = max(line["ours"] / line["xla"] for line in lines if "ours" in line)
    report = {
        "name": "decode_step",
        "ratio": round(worst, 3),
        "target": TARGET,
        "ok": bool(worst <= TARGET),
        "seconds": round(time.monotonic() - started),
        "measure": "largest of ours over XLA's, of a layer's products; predicted, nothing ran",
        "lines": lines,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
