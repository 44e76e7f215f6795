"""Tiles of `flash_attention` for each TPU generation and dtype.

The table beside this file was chosen by `benchmarks/attention_tune.py`, which compiles and counts;
"made_on" in it says with which versions.
"""

import dataclasses
import json
import pathlib

from tulu_jax.kernels.flash_attention import Tile, Tiling

CHIPS = {
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
TABLE = pathlib.Path(__file__).with_suffix(".json")
# Cores a device, and bytes of a core's memories that a kernel may use. v3 and v4 have 16 MiB of
# VMEM, v5p and tpu7x 64, v5e and v6e 128, of which the compiler keeps some; v3 has little SMEM.
CORES = {"v3": 1, "v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 1}
VMEM = {"v3": 16, "v4": 16, "v5e": 100, "v5p": 56, "v6e": 100, "tpu7x": 56}
SMEM = {name: 2**14 if name == "v3" else 2**20 for name in CORES}


def chip(device_kind: str) -> str | None:
    """The name of a generation that the kernel runs on; None for every other device."""
    return CHIPS.get(device_kind)


def takes(device_kind: str, dtype: str) -> bool:
    """Whether there are tiles for this device and operands of `dtype`; v3's are bfloat16 only,
    because the exact products of float32 do not fit in its VMEM."""
    name = chip(device_kind)
    return name is not None and dtype in _tiles(name)


def _tiles(name):
    return json.loads(TABLE.read_text())["tiles"][name]


def tiling(name: str, dtype: str) -> Tiling:
    """The tuned tiles of generation `name` for operands of `dtype`, before `fit`.

    Raises `ValueError` for a dtype that the kernel does not take.
    """
    tiles = _tiles(name)
    if dtype not in tiles:
        raise ValueError(f"attention operands are {dtype}; expected one of {sorted(tiles)}")
    tiles = tiles[dtype]
    return Tiling(
        forward=Tile(**tiles["forward"]),
        backward=Tile(**tiles["backward"]),
        vmem=VMEM[name] * 2**20,
        smem=SMEM[name],
        cores=CORES[name],
        widened=name == "v3",
    )


def with_block(tiling: Tiling, block: int) -> Tiling:
    """`tiling` with blocks of `block` queries and keys in both passes, before `fit`."""
    return dataclasses.replace(
        tiling,
        forward=dataclasses.replace(tiling.forward, block=block),
        backward=dataclasses.replace(tiling.backward, block=block),
    )


_INTERPRETED = Tile(block=128, chunk=128, sub=128, heads=2, pipelined=True, transposed=False)
INTERPRETED = Tiling(
    forward=_INTERPRETED,
    backward=_INTERPRETED,
    vmem=VMEM["v5e"] * 2**20,
    smem=SMEM["v5e"],
    cores=1,
    widened=False,
)
