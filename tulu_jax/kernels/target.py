"""The device that a computation is for: of the ambient mesh, else the default.

A dry run compiles for devices that are not there.
"""

import jax

from tulu_jax import chips


def platform() -> str:
    """What jax calls the device's platform, e.g. 'tpu'."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """What jax calls the device, e.g. 'TPU v5p'."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def chip() -> str | None:
    """The generation of a TPU, e.g. 'v5p'; None for every other device."""
    return chips.name(device_kind())


def cores() -> int:
    """Cores of the device that share a kernel's work."""
    found = chip()
    return 1 if found is None else chips.CHIPS[found].cores
