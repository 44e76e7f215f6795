"""Tiles of `flash_attention` for each TPU generation and dtype.

The table beside this file was chosen by `benchmarks/attention_tune.py`, which compiles and counts;
"made_on" in it says with which versions.
"""

import dataclasses
import json
import math
import pathlib

from tulu_jax import chips
from tulu_jax.kernels.flash_attention import Tile, Tiling

TABLE = pathlib.Path(__file__).with_suffix(".json")


def takes(device_kind: str, dtype: str) -> bool:
    """Whether there are tiles for this device and operands of `dtype`; v3's are bfloat16 only,
    because the exact products of float32 do not fit in its VMEM."""
    name = chips.name(device_kind)
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
    tiles, chip = tiles[dtype], chips.CHIPS[name]
    return Tiling(
        forward=Tile(**tiles["forward"]),
        backward=Tile(**tiles["backward"]),
        vmem=chip.vmem,
        smem=chip.smem,
        cores=chip.cores,
        widened=name == "v3",
    )


def with_block(tiling: Tiling, block: int) -> Tiling:
    """`tiling` with blocks of `block` queries and keys in both passes, before `fit`."""
    return dataclasses.replace(
        tiling,
        forward=dataclasses.replace(tiling.forward, block=block),
        backward=dataclasses.replace(tiling.backward, block=block),
    )


def within(tiling: Tiling, run: int) -> Tiling:
    """`tiling` with blocks that divide runs of `run` queries, before `fit`."""
    forward, backward = (
        dataclasses.replace(tile, block=math.gcd(tile.block, run))
        for tile in (tiling.forward, tiling.backward)
    )
    return dataclasses.replace(tiling, forward=forward, backward=backward)


_INTERPRETED = Tile(
    block=128, chunk=128, sub=128, heads=2, pipelined=True, transposed=False, load=1
)
INTERPRETED = Tiling(
    forward=_INTERPRETED,
    backward=_INTERPRETED,
    vmem=chips.CHIPS["v5e"].vmem,
    smem=chips.CHIPS["v5e"].smem,
    cores=1,
    widened=False,
)
