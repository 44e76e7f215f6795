"""What is known of each accelerator: a fact stands here once, and whoever needs it reads it here.

Peaks, memories, bandwidths and clocks are the published ones (v6e's and tpu7x's clocks are what
their peaks imply). Links are those of "How to Scale Your Model" (Austin et al. 2025, part 2).
"""

import dataclasses

GIB, MIB = 2**30, 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A generation of TPU; quantities are those of one jax device, with all its cores.

    `kinds` are what jax calls the device and `devices` how many of them make a chip; `cores` a
    device has that share its work. `clock` in Hz, `peak` in bfloat16 FLOP/s, `bandwidth` in bytes/s
    of HBM. `vmem` and `smem` are the bytes of a core that a kernel may use: the compiler keeps some
    of the 16 MiB (v3, v4), 64 (v5p, tpu7x) and 128 (v5e, v6e). `smallest` is the smallest slice
    that libtpu compiles for, `options` what it must be told besides.

    A chip without `hbm` is compiled for but not priced. `link` is bytes/s of one interconnect link
    in one direction as a device sees it (a v3 chip's two devices share them), and a torus axis
    closes into a ring where its length is a multiple of `wraps`; `dcn` bytes/s go between slices.
    `counted` is what the cloud's name of a slice counts a chip as: its cores, on v5e and v6e 1.
    `attention` is the cycles of a whole 512 x 512 pair of blocks for one head on one core, forward
    and backward, as `benchmarks/attention.py` counts them for the tuned tiles (docs/attention.md).
    """

    kinds: tuple[str, ...]
    devices: int = 1
    cores: int = 1
    clock: float
    peak: float
    bandwidth: float
    vmem: int
    smem: int = MIB
    smallest: str
    options: dict = dataclasses.field(default_factory=dict)
    dimensions: int
    hbm: int | None = None
    link: float = 0.0
    wraps: int = 1
    dcn: float = 6.25e9
    counted: int = 1
    attention: tuple[float, float] | None = None


CHIPS = {
    "v3": Chip(
        kinds=("TPU v3",), devices=2, clock=0.94e9, peak=61.5e12, bandwidth=0.45e12,
        vmem=16 * MIB, smem=2**14, smallest="2x2", dimensions=2, hbm=16 * GIB, link=50e9,
        wraps=32, dcn=3e9, counted=2, attention=(8422 / 4, 5360.0),
    ),
    "v4": Chip(
        kinds=("TPU v4",), cores=2, clock=1.05e9, peak=275e12, bandwidth=1.23e12,
        vmem=16 * MIB, smallest="2x2x1", dimensions=3, hbm=32 * GIB, link=45e9,
        wraps=4, counted=2, attention=(4279 / 4, 5602 / 2),
        options=dict(chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1)),
    ),
    "v5e": Chip(
        kinds=("TPU v5 lite", "TPU v5e"), clock=1.5e9, peak=197e12, bandwidth=0.82e12,
        vmem=100 * MIB, smallest="2x2", dimensions=2, hbm=16 * GIB, link=45e9,
        wraps=16, attention=(8389 / 8, 20687 / 8),
    ),
    "v5p": Chip(
        kinds=("TPU v5", "TPU v5p"), cores=2, clock=1.75e9, peak=459e12, bandwidth=2.46e12,
        vmem=56 * MIB, smallest="2x2x1", dimensions=3, hbm=95 * GIB, link=90e9,
        wraps=4, counted=2, attention=(8395 / 8, 10443 / 4),
    ),
    "v6e": Chip(
        kinds=("TPU v6 lite", "TPU v6e"), clock=1.75e9, peak=918e12, bandwidth=1.64e12,
        vmem=100 * MIB, smallest="2x2", dimensions=2, hbm=32 * GIB, link=90e9,
        wraps=16, attention=(6621 / 16, 8640 / 8),
    ),
    "tpu7x": Chip(
        kinds=("TPU7x",), devices=2, clock=2.2e9, peak=1153.5e12, bandwidth=3.69e12,
        vmem=56 * MIB, smallest="2x2x1", dimensions=3,
    ),
}  # fmt: skip

# Peak dense bfloat16 FLOP/s of what is no TPU, by what jax calls it.
GPU_PEAKS = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

_NAMES = {kind: name for name, chip in CHIPS.items() for kind in chip.kinds}


def name(device_kind: str) -> str | None:
    """The generation of a TPU, e.g. 'v5p', by what jax calls it; None for every other device."""
    return _NAMES.get(device_kind)


def peak(device_kind: str) -> float | None:
    """Published bfloat16 FLOP/s of a device; None where none is known."""
    known = name(device_kind)
    return CHIPS[known].peak if known else GPU_PEAKS.get(device_kind)
