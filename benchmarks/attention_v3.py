"""Attention on TPU v3: the Pallas kernel with float32 operands against the blockwise XLA form.

    python benchmarks/attention_v3.py

Neither needs a TPU: both are compiled for v3 (32 heads x 8,192 x 128, bfloat16, forward and
backward). The kernel is counted by its scheduled cycles and the bytes of the XLA code around it;
the blockwise form by XLA's own estimate of the cycles of each fusion, times how often its loops
run (which overstates fusions that only move memory). Needs the extra `tpu`.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile

import attention
import numpy as np

from tulu_jax import chips
from tulu_jax.kernels import flash_attention as flash
from tulu_jax.kernels import flash_attention_tuning as tuning
from tulu_jax.planning.cycles import attention_cycles as counting
from tulu_jax.planning.cycles import schedule

HEADS = 32
CHIP = chips.CHIPS["v3"]
BLOCKWISE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from tulu_jax.models import attention

topology = topologies.get_topology_desc(platform="tpu", topology_name="v3:2x2")
place = jax.sharding.SingleDeviceSharding(topology.devices[0])
x = jax.ShapeDtypeStruct((1, {length}, {heads}, {head_dim}), jnp.bfloat16, sharding=place)
ids = jax.ShapeDtypeStruct((1, {length}), jnp.int32, sharding=place)

def both(q, k, v, d_out, ids):
    def attend(q, k, v):
        return attention.attention(q, k, v, segment_ids=ids, kv_segment_ids=ids, query_offset=0,
                                   implementation="blockwise")
    out, pullback = jax.vjp(attend, q, k, v)
    return out, pullback(d_out)

print(jax.jit(both).lower(x, x, x, x, ids).compile().as_text())
"""


def blockwise_hlo():
    with tempfile.TemporaryDirectory() as dumps:
        sizes = dict(length=attention.LENGTH, heads=HEADS, head_dim=attention.HEAD_DIM)
        found = subprocess.run(
            [sys.executable, "-c", BLOCKWISE.format(**sizes)],
            env=schedule.child_environment(dumps, ()),
            capture_output=True,
            text=True,
            timeout=1200,
        )
    if found.returncode:
        raise RuntimeError(f"the blockwise form does not compile for v3:\n{found.stderr[-3000:]}")
    return found.stdout


def blockwise_milliseconds(hlo, tiles):
    """XLA's estimate: the entry once, the two loops over query blocks once a block, the loops over
    key blocks inside them once for each of `tiles`."""
    computations = dict(
        (re.match(r"(?:ENTRY )?%([\w.\-]+)", text.strip())[1], text)
        for text in re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", hlo)[1:]
    )
    (entry,) = (name for name, text in computations.items() if text.startswith("ENTRY"))

    def bodies(name):
        return re.findall(r" while\(.*?body=%([\w.\-]+)", computations[name])

    outer = bodies(entry)
    inner = [body for name in outer for body in bodies(name)]
    if (len(outer), len(inner)) != (2, 2):
        raise RuntimeError(f"expected two nests of two loops; found {outer} and {inner}")
    runs = {entry: 1} | dict.fromkeys(outer, attention.LENGTH // 512) | dict.fromkeys(inner, tiles)
    cycles = sum(
        times * sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', computations[name])))
        for name, times in runs.items()
    )
    return 1e3 * float(cycles) / CHIP.clock


def main():
    tiling = flash.fit(
        tuning.tiling("v3", "bfloat16"),
        queries=attention.LENGTH,
        keys=attention.LENGTH,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=attention.HEAD_DIM,
        itemsize=2,
    )
    arguments = dict(tiling=dataclasses.asdict(tiling), N=HEADS, K=HEADS, branched=False)
    request = schedule.Request(
        target=f"{os.path.abspath(attention.__file__)}:ours", arguments=arguments
    )
    (program,) = schedule.compile_for("v3", [request], timeout=1200)
    if program.error:
        raise RuntimeError(f"the kernel does not compile for v3: {program.error}")
    hlo = blockwise_hlo()
    print(f"{'rows':14} kernel: forward backward glue total  blockwise   ratio")
    ratios = {}
    for name, rows in (
        ("causal", np.ones((1, attention.LENGTH), np.int32)),
        ("mean 1,000", attention.packed_rows("mean 1,000")),
    ):
        counts = counting.count_packed(tiling, rows)
        times = attention.our_milliseconds("v3", program, tiling, HEADS, counts)
        blockwise = blockwise_milliseconds(hlo, counts["forward"]["steps"])
        ratios[name] = float(sum(times) / blockwise)
        print(
            f"{name:14} {times[0]:15.2f} {times[1]:8.2f} {times[2]:4.2f} {sum(times):5.2f}"
            f" {blockwise:10.1f} {ratios[name]:7.3f}",
            flush=True,
        )
    worst = max(ratios.values())
    print(json.dumps({"name": "attention_v3", "ratio": worst, "target": 1.0, "ok": worst <= 1.0}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
