"""The GPU attention kernels compiled for NVIDIA cards that are not there, and what they execute.

    python benchmarks/attention_gpu.py [--capabilities 80 90]

Pallas lowers the kernels to Triton for CUDA (1 x 8,192 tokens, bfloat16, branches) and the Triton
that PyTorch brings compiles them to machine code: registers, bytes spilled, shared memory, and
whether the tensor cores and asynchronous copies are used. Executed over useful multiply-adds is
counted from the lists, for packed rows of documents of mean 1,000 tokens. Needs the extra `bench`.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import attention
import jax
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from tulu_jax.kernels import flash_attention_gpu as flash

SHAPES = {"32 heads x 128": (32, 32, 128), "64/8 heads x 128": (64, 8, 128),
          "32/8 heads x 64": (32, 8, 64)}  # fmt: skip
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes a block may use


def lowered(N, K, H):
    """Forward and backward with branches, lowered for CUDA."""
    T, dtype = attention.LENGTH, jnp.dtype(jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    q, k = (jax.ShapeDtypeStruct((1, T, n, H), dtype) for n in (N, K))

    def both(q, k, v, d_out, ids, branches):
        plan = flash.prepare(
            segment_ids=ids,
            kv_segment_ids=ids,
            branches=branches,
            kv_branches=branches,
            query_offset=0,
            tile=flash.tile_of(H, dtype),
        )
        attend = functools.partial(flash.flash_attention, plan=plan, interpret=False)
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v)[0], q, k, v)
        return out, pullback(d_out)

    return jax.jit(both).trace(q, k, k, q, ids, ids).lower(lowering_platforms=("cuda",))


def kernels(module):
    """(name, Triton IR as text, options) of each kernel in a lowered module."""
    found = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and "triton" in str(
            op.attributes["call_target_name"]
        ):
            found.append(op.attributes["mhlo.backend_config"])
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for config in found:
        context = ir.Context()
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        kernel = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes, context)
        options = {n: ir.IntegerAttr(config[n]).value for n in ("num_warps", "num_stages")}
        yield ir.StringAttr(config["name"]).value, kernel.operation.get_asm(), options


def machine_code(text, options, capability):
    """What a card would run, as a dict of numbers."""
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        source = pathlib.Path(folder, "kernel.ttir")
        source.write_text(text)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(str(source), target=target, options=options)
        ptx = compiled.asm["ptx"]
        assembly = pathlib.Path(folder, "kernel.ptx")
        assembly.write_text(ptx)
        assembler = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        architecture = f"sm_{capability}{'a' * (capability >= 90)}"
        command = [assembler, "-v", f"-arch={architecture}", assembly, "-o", os.devnull]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", printed)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", printed)[1]),
        "shared": compiled.metadata.shared,
        "tensor core": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "async copies": ptx.count("cp.async.c"),
    }


def executed_over_useful(tile, segments):
    """Multiply-adds of the blocks that are worked over useful ones, rows [R, T] on average, weighed
    by the products of each kernel: 2 forward, 3 for dQ, 4 for dK and dV."""
    prepare = jax.jit(
        lambda ids: flash.prepare(
            segment_ids=ids,
            kv_segment_ids=ids,
            branches=None,
            kv_branches=None,
            query_offset=0,
            tile=tile,
        )
    )
    executed = 0
    for row in segments:
        plan = prepare(row[None])
        by_query = np.asarray(plan.keys_of)[..., flash.ACTIVE].sum() * tile.queries * tile.step
        by_key = np.asarray(plan.queries_of)[..., flash.ACTIVE].sum() * tile.keys * tile.step
        executed += (2 + 3) / 9 * by_query + 4 / 9 * by_key
    return float(executed / len(segments) / attention.useful(segments, None))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capabilities", nargs="+", type=int, default=[80, 90], choices=SHARED)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    options = parser.parse_args()
    good, results = True, {}
    for name in options.shapes:
        for kernel, text, sizes in kernels(lowered(*SHAPES[name]).compiler_ir()):
            for capability in options.capabilities:
                found = machine_code(text, sizes, capability)
                good = good and found["shared"] <= SHARED[capability] and found["tensor core"] > 0
                line = ", ".join(f"{value} {what}" for what, value in found.items())
                print(f"{name:17} {kernel:17} sm_{capability}: {line}", flush=True)
                results[f"{name}, {kernel}, sm_{capability}"] = found
    rows = attention.packed_rows("mean 1,000")[:32]
    ratio = executed_over_useful(flash.tile_of(128, jnp.dtype(jnp.bfloat16)), rows)
    print(f"executed over useful, documents of mean 1,000: {ratio:.2f}")
    report = {
        "name": "attention_gpu",
        "ratio": ratio,
        "target": attention.WASTE_TARGET,
        "ok": bool(good and ratio <= attention.WASTE_TARGET),
        "kernels": results,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
