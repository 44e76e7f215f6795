"""Tiles of `flash_attention` for each TPU generation."""

from tulu_jax.kernels.flash_attention import Tile, Tiling

CHIPS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip(device_kind: str) -> str | None:
    """The name of a generation that the kernel runs on; None for every other device."""
    return CHIPS.get(device_kind)


def _tile(block, chunk, sub, heads, pipelined, transposed):
    return Tile(
        block=block, chunk=chunk, sub=sub, heads=heads, pipelined=pipelined, transposed=transposed
    )


_WIDE = Tiling(
    forward=_tile(512, 512, 256, 8, True, True),
    backward=_tile(512, 256, 256, 4, True, True),
    vmem=100 * 2**20,
    cores=1,
)
TUNED = {
    "v4": dict.fromkeys(
        ("causal", "packed"),
        Tiling(
            forward=_tile(512, 512, 256, 4, True, False),
            backward=_tile(512, 512, 256, 1, True, False),
            vmem=16 * 2**20,
            cores=2,
        ),
    ),
    "v5e": dict.fromkeys(
        ("causal", "packed"),
        Tiling(
            forward=_tile(512, 512, 256, 8, True, False),
            backward=_tile(512, 512, 256, 8, True, False),
            vmem=100 * 2**20,
            cores=1,
        ),
    ),
    "v5p": dict.fromkeys(
        ("causal", "packed"),
        Tiling(
            forward=_tile(512, 512, 256, 8, True, False),
            backward=_tile(512, 512, 256, 4, True, False),
            vmem=56 * 2**20,
            cores=2,
        ),
    ),
    "v6e": dict.fromkeys(("causal", "packed"), _WIDE),
    "tpu7x": dict.fromkeys(("causal", "packed"), _WIDE),
}
INTERPRETED = Tiling(
    forward=_tile(128, 128, 128, 8, True, False),
    backward=_tile(128, 128, 128, 8, True, False),
    vmem=100 * 2**20,
    cores=1,
)
