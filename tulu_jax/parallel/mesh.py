"""The device mesh: axes `data, fsdp, context, tensor`."""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jaxtyping import Int

from tulu_jax import chips, validation

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left.

    `data` replicates parameters (and spans slices); `fsdp` and `context` shard them over their
    embed axis, and a batch by its rows and along the sequence; `tensor` shards heads, the MLP and
    the vocabulary. Where `context` and `tensor` share torus axes, `context_first` says that
    `context` has the most links, as suits a run whose weights are most of what moves. Where
    `tensor` lies over a line of two chips and a ring, `pairs_first` makes the two of the line
    neighbours, which exchange what rows they have before the ring gathers them
    (`sharding.gather`). `topology` is the TPU slice these sizes are meant for, e.g. 'v5p:4x4x8', or
    '2*v5e:16x16' for two slices; the dry run compiles for it.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    context_first: bool = False
    pairs_first: bool = False
    topology: str | None = None

    def __post_init__(self):
        validation.check(self, self._rules)

    def _rules(self):
        for name in AXES:
            size = getattr(self, name)
            yield size > 0 or size == -1, f"{name} = {size}: expected a positive size or -1"
        free = [name for name in AXES if getattr(self, name) == -1]
        yield len(free) <= 1, f"axes {free} are all -1: at most one may be"
        if (
            self.topology is not None
            and len(free) <= 1
            and all(getattr(self, name) for name in AXES)
        ):
            try:
                self.sizes(slice_devices(self.topology))
            except ValueError as error:
                yield False, str(error)

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis sizes on `num_devices` devices. Raises `UsageError` if they do not fit, with what
        would."""
        sizes = {name: getattr(self, name) for name in AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if -1 in sizes.values() and num_devices % fixed == 0:
            sizes = {k: num_devices // fixed if v == -1 else v for k, v in sizes.items()}
        if math.prod(sizes.values()) != num_devices:
            product = " x ".join(f"{name}={size}" for name, size in sizes.items())
            meant = "" if self.topology is None else f" (it is meant for {self.topology})"
            raise validation.UsageError(
                f"mesh {product}{meant} does not fill {num_devices} devices; set one axis to -1, "
                f"make the product {num_devices}, or choose another --pod"
            )
        return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingMesh(MeshConfig):
    """A mesh that only decodes. Its last axis, `group`, divides the query heads that share a
    key/value head (`sharding.GROUP`)."""

    group: int = 1

    def sizes(self, num_devices: int) -> dict[str, int]:
        return super().sizes(num_devices // self.group) | {"group": self.group}


def slice_devices(topology: str) -> int:
    """The jax devices of a slice, e.g. 256 of 'v5p:4x8x8' and 512 of '2*v5e:16x16'.

    A device is a chip, but on v3 one of its two cores. Raises `UsageError` for another form.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+){1,2})", topology)
    if found is None or found[2] not in chips.CHIPS:
        raise validation.UsageError(
            f"topology = {topology!r}: expected generation:chips, e.g. 'v5p:4x8x8', or "
            f"'2*v5e:16x16' for two slices; generations are {sorted(chips.CHIPS)}"
        )
    slices, generation, shape = found.groups()
    devices = chips.CHIPS[generation].devices
    return int(slices or 1) * devices * math.prod(map(int, shape.split("x")))


def make(config: MeshConfig, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh over `devices` (default: all), the axes laid along the slice's torus; over several
    slices `data` is the outer part. Raises `UsageError` if the axes do not fill the devices."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices > 1 and sizes["data"] % slices:
        raise validation.UsageError(
            f"data = {sizes['data']} cannot be divided over {slices} slices; the other axes stay "
            f"within a slice, so choose a multiple of {slices}"
        )
    if devices[0].platform != "tpu":
        placed = np.asarray(devices).reshape(tuple(sizes.values()))
    else:
        placed = _laid(sizes, devices, slices, config.context_first)
        placed = _paired(placed, list(sizes).index("tensor")) if config.pairs_first else placed
    return jax.sharding.Mesh(placed, tuple(sizes), axis_types=types)


def _laid(
    sizes: dict[str, int], devices: list[jax.Device], slices: int, context_first: bool
) -> np.ndarray:
    """TPU devices in an array of `sizes`, laid along the torus of a slice.

    Where `context` and `tensor` share a torus axis, one of them has its neighbours there. It is
    `tensor`, unless that has as many links without (a ring of every other chip has those of a line
    of half of them) and `context` more with them, or `context_first`.
    """
    chip = chips.CHIPS.get(chips.name(devices[0].device_kind))
    shape = (np.ptp([device.coords for device in devices], axis=0) + 1).tolist()

    def along(order: Sequence[str]) -> np.ndarray:
        within = [sizes[name] // (slices if name == "data" else 1) for name in order]
        split = dict(allow_split_physical_axes=True)
        if slices > 1:
            of_slices = [slices if name == "data" else 1 for name in order]
            placed = mesh_utils.create_hybrid_device_mesh(within, of_slices, devices, **split)
        else:
            placed = mesh_utils.create_device_mesh(within, devices, **split)
        return placed.transpose([order.index(name) for name in sizes])

    def found(placed: np.ndarray, axis: str) -> float:
        group = np.moveaxis(placed, list(sizes).index(axis), -1).reshape(-1, sizes[axis])[0]
        return links(np.array([device.coords for device in group]), shape, chip.wraps)

    usual = along(tuple(sizes))
    if chip is None or min(sizes["context"], sizes["tensor"]) == 1:
        return usual
    beside = along(sorted(sizes, key=["data", "fsdp", "tensor", "context", "group"].index))
    better = found(beside, "context") > found(usual, "context")
    free = context_first or found(beside, "tensor") >= found(usual, "tensor")
    return beside if better and free else usual


def _paired(placed: np.ndarray, axis: int) -> np.ndarray:
    """`placed` with neighbours along `axis` that differ, two by two, in one torus axis alone: one
    along which the devices of `axis` have two places. As it is where they have none such."""
    coords = np.moveaxis(placed, axis, -1).reshape(-1, placed.shape[axis])[0]
    coords = np.array([device.coords for device in coords])
    for torus_axis, places in enumerate(coords.T):
        values, place = np.unique(places, return_inverse=True)
        if len(values) == 2 and len(places) > 2:
            order = np.argsort(place, kind="stable").reshape(2, -1).T.ravel()
            pairs = np.delete(coords, torus_axis, 1)[order].reshape(len(places) // 2, 2, -1)
            if (pairs[:, 0] == pairs[:, 1]).all():
                return np.take(placed, order, axis)
    return placed


def links(places: Int[np.ndarray, "N axes"], shape: Sequence[int], wraps: int) -> float:
    """Torus links that serve a group of devices at `places` in a slice of `shape` chips: two along
    an axis where the group closes into a ring (the axis does if its length is a multiple of
    `wraps`), one where it is a line, shared among the groups that interleave on it. 0 on one chip.
    """
    total = 0.0
    for length, coordinates in zip(shape, places.T, strict=True):
        values = np.unique(coordinates)
        if len(values) > 1:
            stride = int(np.diff(values).min())
            ring = len(values) * stride == length and length % wraps == 0
            total += (2 if ring else 1) / stride
    return total


def row_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(index, count): which of `count` equal parts of a batch's rows this process loads.

    Processes whose devices hold the same rows, with `context` or `tensor` spanning them, load the
    same part. Raises `UsageError` where the rows of two processes overlap only in part.
    """
    by_rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(by_rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != len(by_rows) or len({len(part) for part in parts}) > 1:
        raise validation.UsageError(
            f"the processes hold the row shards {parts} of {len(by_rows)}: parts that overlap, or "
            "are unequal, cannot be loaded; let context x tensor divide the devices of a process, "
            "or be a multiple of them"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)
