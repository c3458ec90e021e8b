"""Meshes, and the presets that say what each mesh axis is for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from loom_jax.core import ConfigError


@dataclasses.dataclass(frozen=True)
class Preset:
    """One way to use a mesh.

    Attributes:
      axes: mesh axis -> size; one is -1 and takes the devices that the others leave. A size that does not divide the
        devices falls to the largest divisor that does.
      rules: logical axis of a parameter -> the mesh axes that shard it, outermost first. What is absent is replicated.
    """

    axes: Mapping[str, int]
    rules: Mapping[str, tuple[str, ...]]


DATA_AXES = ("data", "fsdp")
"""Mesh axes that cut the rows of a batch, outermost first."""

_FSDP = {"embed": ("fsdp",), "channel": ("fsdp",)}
_FSDP_TENSOR = {
    "embed": ("fsdp",),
    "channel": ("fsdp", "tensor"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
_FSDP_CONTEXT = {"embed": ("fsdp", "context"), "channel": ("fsdp", "context")}

PRESETS: dict[str, Preset] = {
    "single": Preset({"fsdp": 1}, {}),
    "fsdp": Preset({"fsdp": -1}, _FSDP),
    "hsdp": Preset({"data": 2, "fsdp": -1}, _FSDP),
    "fsdp+tensor": Preset({"fsdp": -1, "tensor": 4}, _FSDP_TENSOR),
    "fsdp+context": Preset({"fsdp": -1, "context": 2}, _FSDP_CONTEXT),
}
"""single: one device. fsdp: parameters cut over all devices. hsdp: cut within a slice or node, copied across them
(`data`, the axis for slow links). fsdp+tensor: heads, mlp and vocabulary cut too. fsdp+context: activations are cut
along the packed length over `context`, parameters over both axes."""


def make_mesh(axes: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh whose axes are all Auto.

    Args:
      axes: a key of PRESETS, or mesh axis -> size, where one size may be -1: the devices that the others leave.
      devices: which; all of them by default, for `single` the first.

    Raises:
      ConfigError: the preset is not known, the sizes do not make up the number of devices, or axis `data` is no
        multiple of the number of TPU slices: only it may go over the links between slices.
    """
    if isinstance(axes, str):
        if axes not in PRESETS:
            raise ConfigError(f"sharding preset {axes!r} is not one of {', '.join(PRESETS)}")
        if axes == "single":
            devices = (devices or jax.devices())[:1]
        devices = list(devices or jax.devices())
        sizes = {name: math.gcd(size, len(devices)) if size > 0 else size for name, size in PRESETS[axes].axes.items()}
        if "data" in sizes and slice_count(devices) > 1:
            sizes["data"] = slice_count(devices)
    else:
        devices, sizes = list(devices or jax.devices()), dict(axes)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for name, size in sizes.items() if name not in free):
        raise ConfigError(f"mesh axes {sizes}: sizes must be positive, and at most one may be -1")
    if free:
        fixed = math.prod(size for size in sizes.values() if size != -1)
        sizes[free[0]] = max(1, len(devices) // fixed)
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"mesh axes {sizes} make {math.prod(sizes.values())} devices, but there are {len(devices)}")
    types = (AxisType.Auto,) * len(sizes)
    if slice_count(devices) > 1:
        return Mesh(arrange_slices(sizes, devices), tuple(sizes), axis_types=types)
    # jax.make_mesh cannot cut an axis of a torus in two, such as 4 x 4 x 4 chips into 2 x 32.
    arranged = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(arranged, tuple(sizes), axis_types=types)


def slice_count(devices: Sequence[jax.Device]) -> int:
    """Returns the number of TPU slices; other devices are one."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def arrange_slices(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Returns the devices of several slices in the shape of a mesh whose axis `data` alone crosses slices."""
    slices = slice_count(devices)
    if sizes.get("data", 1) % slices:
        raise ConfigError(
            f"mesh axes {dict(sizes)} on {slices} TPU slices: give axis `data` a multiple of {slices}, "
            "since no other axis may cross the links between slices"
        )
    within = [size // slices if name == "data" else size for name, size in sizes.items()]
    across = [slices if name == "data" else 1 for name in sizes]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
