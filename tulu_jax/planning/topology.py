"""TPU slices by name, and what their links and memories do.

A slice is written as the compiler takes it, 'v5p:4x8x8' (chips along each torus axis), and several
slices as '2*v5e:16x16'. A jax device is a chip, on v3 one of its two cores.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from tulu_jax import chips, validation
from tulu_jax.parallel import mesh
from tulu_jax.planning.cycles import schedule

# Those that a run can be priced on.
CHIPS = {name: chip for name, chip in chips.CHIPS.items() if chip.hbm is not None}
INSTALL = 'pip install "jax[tpu]"'


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices of `shape` chips of one generation, `chip`."""

    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def hardware(self) -> chips.Chip:
        return CHIPS[self.chip]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        return mesh.slice_devices(self.name)

    @property
    def name(self) -> str:
        slices = f"{self.slices}*" if self.slices > 1 else ""
        return f"{slices}{self.chip}:{'x'.join(map(str, self.shape))}"

    @property
    def accelerator_type(self) -> str:
        """The cloud's name of one slice: cores for v3, v4 and v5p, chips for v5e and v6e."""
        return f"{self.chip}-{math.prod(self.shape) * self.hardware.counted}"

    def devices(self) -> list:
        """jax devices that can be compiled for. Raises `UsageError` if libtpu is not installed or
        knows no such slice."""
        options = dict(self.hardware.options)
        if self.slices > 1 or options:
            options["num_slices"] = self.slices
        if math.prod(self.shape) == 1:  # of a host that has more, as those of 7B on one chip
            options["chips_per_host_bounds"] = [1, 1, 1]
        shape = "x".join(map(str, self.shape))
        try:
            description = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.chip}:{shape}", **options
            )
        except Exception as error:  # jax raises several kinds, with libtpu's text
            if "libtpu" in str(error) and "No module" in str(error):
                raise validation.UsageError(
                    f"compiling for a TPU needs libtpu: {INSTALL}"
                ) from error
            raise validation.UsageError(
                f"libtpu has no topology {self.chip}:{shape}: {str(error).splitlines()[0]}"
            ) from error
        return description.devices


def parse(name: str) -> Topology:
    """The topology called `name`. Raises `UsageError` that lists what is known."""
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    example = "expected e.g. 'v5p:4x8x8' (chips along each axis) or '2*v5e:16x16' (two slices)"
    if not found:
        raise validation.UsageError(f"topology {name!r}: {example}")
    slices, chip, shape = int(found[1] or 1), found[2], tuple(map(int, found[3].split("x")))
    if chip not in CHIPS:
        raise validation.UsageError(
            f"topology {name!r}: generation {chip!r} is unknown"
            f"{validation.nearest(chip, CHIPS)}; known are {sorted(CHIPS)}; {example}"
        )
    dimensions = CHIPS[chip].dimensions
    if len(shape) != dimensions:
        raise validation.UsageError(
            f"topology {name!r}: a {chip} slice has {dimensions} axes, found {len(shape)}; "
            f"{example}"
        )
    if min(*shape, slices) < 1:
        raise validation.UsageError(f"topology {name!r}: every size is at least 1; {example}")
    return Topology(chip, shape, slices)


def enter() -> None:
    """Makes this process one that compiles for absent devices; call it before jax uses any.

    Raises `UsageError` with the command that installs libtpu where it is missing.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise validation.UsageError(
            f"compiling for a TPU needs libtpu, which is not installed: {INSTALL}"
        )
    os.environ.update(schedule.ENVIRONMENT)
    jax.config.update("jax_platforms", schedule.ENVIRONMENT["JAX_PLATFORMS"])  # jax is imported
