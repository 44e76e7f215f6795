"""The device mesh: axes `data, fsdp, context, tensor`."""

import dataclasses
import math

import jax
import numpy as np

from tulu_jax import validation

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left.

    `data` replicates parameters (and spans slices), `fsdp` shards them over their embed axis,
    `context` shards the sequence, `tensor` shards heads, the MLP and the vocabulary. `topology` is
    the TPU slice these sizes are meant for, e.g. 'v5p:4x4x8', or '2*v5e:16x16' for two slices; the
    dry run compiles for it.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    topology: str | None = None

    def __post_init__(self):
        validation.check(self, self._rules)

    def _rules(self):
        for name in AXES:
            size = getattr(self, name)
            yield size > 0 or size == -1, f"{name} = {size}: expected a positive size or -1"
        free = [name for name in AXES if getattr(self, name) == -1]
        yield len(free) <= 1, f"axes {free} are all -1: at most one may be"

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis sizes on `num_devices` devices. Raises `ValueError` if they do not fit."""
        sizes = {name: getattr(self, name) for name in AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if -1 in sizes.values() and num_devices % fixed == 0:
            sizes = {k: num_devices // fixed if v == -1 else v for k, v in sizes.items()}
        if math.prod(sizes.values()) != num_devices:
            product = " x ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(
                f"mesh {product} does not fill {num_devices} devices; set one axis to -1 or make "
                f"the product {num_devices}"
            )
        return sizes


def make(config: MeshConfig, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh over `devices` (default: all). Raises `ValueError` if the axes do not fill them."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
        devices=np.asarray(devices),
    )


def row_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(index, count): which of `count` equal parts of a batch's rows this process loads.

    Processes whose devices hold the same rows, with `context` or `tensor` spanning them, load the
    same part. Raises `ValueError` where the rows of two processes overlap only in part.
    """
    by_rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(by_rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != len(by_rows) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"the processes hold the row shards {parts} of {len(by_rows)}: parts that overlap, or "
            "are unequal, cannot be loaded; let context x tensor divide the devices of a process, "
            "or be a multiple of them"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)
