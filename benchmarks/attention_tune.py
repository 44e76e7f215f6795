"""Chooses the tiles of the attention kernel for each TPU generation, by scheduled cycles.

    python benchmarks/attention_tune.py [--chips v4 v5e v5p v6e] [--wide] [--write]

Every candidate is compiled for the chip and counted on a causal row and on packed rows of documents
of mean 1,000 tokens (32 heads x 8,192 x 128, bfloat16); the least sum wins. `--wide` tries more,
`--write` replaces `tulu_jax/kernels/flash_attention_tuning.json`, whose versions say what it was
made on. Needs the extra `tpu`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import sys

import attention
import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax.kernels import flash_attention as flash
from tulu_jax.kernels import flash_attention_tuning as tuning
from tulu_jax.planning import schedule

HEADS = 32
TARGET = f"{pathlib.Path(__file__).resolve()}:one_pass"


def tile(block, chunk, sub, heads, pipelined, transposed):
    return flash.Tile(
        block=block, chunk=chunk, sub=sub, heads=heads, pipelined=pipelined, transposed=transposed
    )


def candidates(chip, stage, wide):
    """Tiles worth a look: a wide matrix unit wants probabilities stationary, VMEM limits heads."""
    turned = chip == "v6e"
    most = {"v4": (4, 2), "v5e": (8, 8), "v5p": (8, 4), "v6e": (16, 8)}[chip][stage == "backward"]
    # (chunk, sub, pipelined): v4 has no room for the pipeline's values in its backward pass.
    few = [(512, 128, True), (256, 128, True)]
    if turned:
        few = [(512, 256, True), (256, 256, True)]
    if chip == "v4":
        few = [(512, 128, False), (256, 128, False)]
    for chunk, sub, pipelined in few:
        yield tile(512, chunk, sub, most, pipelined, turned)
    if wide:
        for heads in (most, most // 2):
            for chunk in (512, 256, 128):
                for sub in (512, 256, 128):
                    for pipelined in (True, False):
                        yield tile(512, chunk, sub, heads, pipelined, turned)
            yield tile(1024, 512, 256, heads // 2, turned, turned)
            yield tile(256, 256, 128, heads, True, turned)
            yield tile(512, 512, 256, heads, True, not turned)


def one_pass(stage, candidate, vmem, cores):
    """A jitted pass of the kernel with this tile, and its abstract arguments."""
    chosen = flash.Tile(**candidate)
    tiling = flash.Tiling(forward=chosen, backward=chosen, vmem=vmem, cores=cores)
    ids = jax.ShapeDtypeStruct((1, attention.LENGTH), jnp.int32)

    def prepare(ids):
        return flash.prepare(
            segment_ids=ids,
            kv_segment_ids=ids,
            branches=None,
            kv_branches=None,
            query_offset=0,
            tiling=tiling,
        )

    shape = (1, HEADS, attention.LENGTH, attention.HEAD_DIM)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    stats = jax.ShapeDtypeStruct((1, HEADS, 2, attention.LENGTH), jnp.float32)
    static = flash.static_of(x, attention.HEAD_DIM, False)
    plan = jax.eval_shape(prepare, ids)
    if stage == "forward":
        run = lambda q, k, v, p: flash._forward(q, k, v, p, online=False, static=static)  # noqa: E731
        return jax.jit(run), (x, x, x, plan)
    run = lambda q, k, v, s, d, p: flash._backward(q, k, v, s, d, p, static)  # noqa: E731
    return jax.jit(run), (x, x, x, stats, x, plan)


def tune(chip, stage, wide, rows):
    """The best tile of a pass; prints what each took."""
    base = tuning.tiling(chip, "bfloat16")
    tiles = list(candidates(chip, stage, wide))
    requests = [
        schedule.Request(
            target=TARGET,
            arguments=dict(
                stage=stage, candidate=dataclasses.asdict(t), vmem=base.vmem, cores=base.cores
            ),
        )
        for t in tiles
    ]
    best, least = None, np.inf
    for candidate, program in zip(
        tiles, schedule.compile_for(chip, requests, timeout=7200), strict=True
    ):
        label = " ".join(f"{k} {v}" for k, v in dataclasses.asdict(candidate).items())
        if program.error:
            print(f"{chip} {stage:8} {label}: {program.error.splitlines()[0][:90]}", flush=True)
            continue
        tiling = flash.Tiling(
            forward=candidate, backward=candidate, vmem=base.vmem, cores=base.cores
        )
        (kernel,) = program.kernels.values()
        times = []
        for segments in (np.ones((1, attention.LENGTH), np.int32), rows):
            counts, _ = attention.count_packed(tiling, segments)
            times.append(
                attention.kernel_milliseconds(chip, kernel, candidate, stage, HEADS, counts)
            )
        print(f"{chip} {stage:8} {label}: causal {times[0]:.3f} packed {times[1]:.3f}", flush=True)
        if sum(times) < least:
            best, least = candidate, sum(times)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", nargs="+", default=list(schedule.CHIPS), choices=schedule.CHIPS)
    parser.add_argument("--wide", action="store_true", help="more candidates")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    options = parser.parse_args()
    table = json.loads(tuning.TABLE.read_text())
    rows = attention.packed_rows("mean 1,000")
    for chip in options.chips:
        for stage in ("forward", "backward"):
            best = tune(chip, stage, options.wide, rows)
            print(f"{chip} {stage}: {best}")
            table["tiles"][chip]["bfloat16"][stage] = dataclasses.asdict(best)
    table["made_on"] = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    if options.write:
        tuning.TABLE.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
