"""Chooses the tiles of the attention kernel for each TPU generation, by scheduled cycles.

    python benchmarks/attention_tune.py [--chips v4 v6e] [--dtypes bfloat16] [--wide] [--write]

Every candidate is compiled for the chip and counted on a causal row and on packed rows of documents
of mean 1,000 tokens (32 heads x 8,192 x 128); the least sum wins, or of tiles within 1 % of it the
one that compiles soonest where that is in half the time. `--wide` tries more, `--write` replaces
`tulu_jax/kernels/flash_attention_tuning.json`, whose versions say what it was made on. Needs the
extra `tpu`.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import sys

import attention
import numpy as np

from tulu_jax import atomic, chips
from tulu_jax.kernels import flash_attention as flash
from tulu_jax.kernels import flash_attention_tuning as tuning
from tulu_jax.planning.cycles import attention_cycles as counting
from tulu_jax.planning.cycles import schedule

HEADS = 32
DTYPES = ("bfloat16", "float32")


def tile(block, chunk, sub, heads, pipelined, transposed, load=1):
    return flash.Tile(
        block=block,
        chunk=chunk,
        sub=sub,
        heads=heads,
        pipelined=pipelined,
        transposed=transposed,
        load=load,
    )


def candidates(chip, dtype, stage, wide):
    """Tiles worth a look: a wide matrix unit wants probabilities stationary, VMEM limits heads."""
    turned = chip in ("v6e", "tpu7x")
    backward = stage == "backward"
    most = {
        **{"v3": (4, 1), "v4": (4, 2), "v5e": (8, 8)},
        **{"v5p": (8, 4), "v6e": (16, 8), "tpu7x": (8, 4)},
    }[chip][backward]
    if dtype == "float32" and chip != "v3":  # twice the bytes, six products for one
        most = max(1, most // 2)
    small = chip in ("v3", "v4")  # no room for the values of a pipeline
    sub = 256 if turned else 128
    for chunk in (512, 256):
        for load in (1,) if small else (1, 2):
            yield tile(512, chunk, sub, most, not small, turned, load)
    if dtype == "float32":  # six products for one: a head alone fills the unit, in less text
        yield tile(512, 256, 256, max(1, most // 2), False, turned)
        for chunk in (512, 256):
            yield tile(512, chunk, sub, 1, not small, turned)
    if wide:
        for heads in sorted({most, max(1, most // 2)}, reverse=True):
            for chunk in (512, 256, 128):
                for sub in (512, 256, 128):
                    for pipelined in (True, False):
                        yield tile(512, chunk, sub, heads, pipelined, turned)
            yield tile(1024, 512, 256, max(1, heads // 2), turned, turned)
            yield tile(256, 256, 128, heads, True, turned)
            yield tile(256, 256, 128, 2 * heads, True, turned)
            yield tile(512, 512, 256, heads, True, not turned)


def tiling_of(chip, dtype, chosen):
    """The chip's tiling with one tile for both passes."""
    return dataclasses.replace(tuning.tiling(chip, dtype), forward=chosen, backward=chosen)


def choose(counted):
    """Of (tile, milliseconds, seconds to compile) the tile: the fastest, unless one within 1 % of
    it compiles in half the time."""
    best = min(counted, key=lambda c: c[1])
    soon = min((c for c in counted if c[1] <= 1.01 * best[1]), key=lambda c: c[2])
    return (soon if soon[2] <= best[2] / 2 else best)[0]


def tune(chip, dtype, stage, wide, rows):
    """The best tile of a pass; prints what each took."""
    tiles = list(candidates(chip, dtype, stage, wide))
    length, head_dim = attention.LENGTH, attention.HEAD_DIM
    shape = counting.Shape(
        heads=HEADS, kv_heads=HEADS, head_dim=head_dim, queries=length, keys=length, dtype=dtype
    )
    requests = [counting.request(chip, shape, stage, candidate) for candidate in tiles]
    counted = []
    programs = schedule.compile_for(chip, requests, timeout=7200)
    for candidate, program in zip(tiles, programs, strict=True):
        label = " ".join(f"{k} {v}" for k, v in dataclasses.asdict(candidate).items())
        label = f"{chip} {dtype} {stage:8} {label}"
        if program.error:
            print(f"{label}: {program.error.splitlines()[0][:90]}", flush=True)
            continue
        (kernel,) = program.kernels.values()
        times = []
        for segments in (np.ones((1, attention.LENGTH), np.int32), rows):
            counts = counting.count_packed(tiling_of(chip, dtype, candidate), segments)
            times.append(counting.milliseconds(chip, kernel, candidate, stage, HEADS, counts))
        print(
            f"{label}: causal {times[0]:.3f} packed {times[1]:.3f} ms, "
            f"compiled in {program.seconds:.0f} s",
            flush=True,
        )
        counted.append((candidate, sum(times), program.seconds))
    return choose(counted)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", nargs="+", default=list(chips.CHIPS), choices=chips.CHIPS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--stages", nargs="+", default=counting.STAGES, choices=counting.STAGES)
    parser.add_argument("--wide", action="store_true", help="more candidates")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    options = parser.parse_args()
    table = json.loads(tuning.TABLE.read_text())
    rows = attention.packed_rows("mean 1,000")
    for chip, dtype, stage in itertools.product(options.chips, options.dtypes, options.stages):
        best = tune(chip, dtype, stage, options.wide, rows)
        print(f"{chip} {dtype} {stage}: {best}", flush=True)
        table["tiles"][chip][dtype][stage] = dataclasses.asdict(best)
    table["made_on"] = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    if options.write:
        atomic.write_text(tuning.TABLE, json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
