"""Cycles of the decode kernel and of jax's ragged paged attention, counted without a TPU.

    python benchmarks/decode_attention.py --chips v5e v5p v6e

For Llama 7B and 70B over 8 devices, and of 7B for as few rows as one or two on a core:
milliseconds of a step's attention in one layer, by scheduled cycles and by the traffic of live
pages; the longer of the two binds. `decode_cycles.COUNTED` is made of the first. Waits for HBM
inside a kernel are not counted (`tulu_jax/planning/cycles/schedule.py`). The public kernel reads a
cache of its own layout and writes no key or value.
"""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import ragged_paged_attention

from tulu_jax import chips
from tulu_jax.planning.cycles import decode_cycles, schedule

SHAPES = {
    "7B": decode_cycles.Shape(rows=64, heads=4, kv_heads=4, page=128, table=16),
    "70B": decode_cycles.Shape(rows=64, heads=8, kv_heads=1, page=256, table=8),
}
KERNELS = {"ours": decode_cycles.TARGET, "public": f"{__file__}:public"}


def public(rows: int, heads: int, kv_heads: int, page: int, table: int):
    """jax's ragged paged attention on the same rows, one query each, with 1 MiB of pages a block.
    It reads a cache [pages, page, 2K, H] of one layer, and writes nothing."""
    shape = decode_cycles.Shape(rows=rows, heads=heads, kv_heads=kv_heads, page=page, table=table)

    def run(q, pages, lengths, table, starts, count):
        return ragged_paged_attention.ragged_paged_attention(
            q, pages, lengths, table, starts, count,
            num_kv_pages_per_block=shape.public_pages, num_queries_per_block=min(rows, 8),
        )  # fmt: skip

    def of(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    return jax.jit(run), (
        of(rows, heads, 128, dtype=jnp.bfloat16),
        of(rows * table + 1, page, 2 * kv_heads, 128, dtype=jnp.bfloat16),
        of(rows), of(rows, table), of(rows + 1), of(1),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e"])
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--seen", type=int, default=1152, help="positions of each of 64 rows")
    options = parser.parse_args()
    for chip in options.chips:
        cores = chips.CHIPS[chip].cores
        shapes = SHAPES | {
            f"7B, {few} on a core": dataclasses.replace(SHAPES["7B"], rows=few * cores)
            for few in (1, 2)
        }
        asked = [(name, which) for name in shapes for which in options.kernels
                 if name in SHAPES or which == "ours"]  # fmt: skip
        requests = [decode_cycles.request(shapes[name], KERNELS[which]) for name, which in asked]
        programs = schedule.compile_for(chip, requests, timeout=3600)
        for (name, which), program in zip(asked, programs, strict=True):
            line = {"chip": chip, "model": name, "kernel": which}
            if program.error is not None:
                print(json.dumps(line | {"error": program.error}), flush=True)
                continue
            (kernel,) = program.kernels.values()
            shape, ours = shapes[name], which == "ours"
            cycles = decode_cycles.counted(kernel)
            counted = decode_cycles.cycle_seconds(chip, shape, cycles, seen=options.seen, ours=ours)
            moved = decode_cycles.traffic(chip, shape, seen=options.seen)
            line |= dataclasses.asdict(cycles) | {
                "both cores": not kernel.primary_core_only,
                "cycles, ms": round(1e3 * counted, 4),
                "HBM, ms": round(1e3 * moved, 4),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
