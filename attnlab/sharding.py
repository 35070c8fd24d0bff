"""Devices: the mesh of a config, and where the state and the batches of a run lie on it.

Axes: ``data`` splits the batch; ``fsdp`` splits the batch and every large parameter.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from attnlab.errors import UserError

AXES = ("data", "fsdp")
SMALL = 2**14
"""Parameters with fewer elements are kept whole on every device."""


def make_mesh(text: str) -> Mesh:
    """The mesh of ``"data:4,fsdp:2"``; a size of -1 takes the devices that are left.

    Raises `UserError` for an unknown axis, a size that is no number, or a product that is not the
    number of devices.
    """
    count = jax.device_count()
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not re.fullmatch(rf"({'|'.join(AXES)}):(-1|[1-9][0-9]{{0,8}})", part):
            raise UserError(
                f"mesh={text!r}: {part!r} is not AXIS:SIZE with AXIS in {', '.join(AXES)} and SIZE "
                "at least 1, or -1 for the devices left"
            )
        axis, _, size = part.partition(":")
        sizes[axis] = int(size)
    if len({part.partition(":")[0] for part in parts}) < len(parts):
        raise UserError(f"mesh={text!r} names an axis twice")
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh={text!r}: only one size may be -1")
    known = math.prod(size for size in sizes.values() if size > 0)
    sizes = {axis: count // known if size == -1 else size for axis, size in sizes.items()}
    places = math.prod(sizes.values())
    if places != count:
        raise UserError(
            f"mesh={text!r} has {places} places for {count} devices; use data:{count} or data:-1"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    if jax.process_count() > 1:  # so that the rows of a process lie side by side, see `spread`
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        return Mesh(np.array(devices).reshape(tuple(sizes.values())), AXES, axis_types=kinds)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds)


def reading() -> tuple[Sharding, NamedSharding | None]:
    """Where parameters lie that are only read, and the rows of what they are applied to: on one
    device; for several processes whole on every device, and spread over all of them."""
    if jax.process_count() == 1:
        return SingleDeviceSharding(jax.local_devices()[0]), None
    mesh = make_mesh("data:-1")
    return NamedSharding(mesh, P()), NamedSharding(mesh, P(AXES))


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Rows of a batch over all devices. Raises `UserError` where they do not divide."""
    if batch % mesh.size:
        raise UserError(
            f"task.batch={batch} does not divide among {mesh.size} devices (mesh "
            f"{dict(mesh.shape)}); use {-(-batch // mesh.size) * mesh.size}"
        )
    return NamedSharding(mesh, P(AXES))


def spread(batch: int, sharding: NamedSharding | None) -> tuple[int, slice]:
    """A number of rows made a multiple of the devices, and which of them are this process's."""
    if sharding is None:
        return batch, slice(None)
    batch = -(-batch // sharding.num_devices) * sharding.num_devices
    part = batch // jax.process_count()
    return batch, slice(part * jax.process_index(), part * (jax.process_index() + 1))


def state_shardings(mesh: Mesh, shapes: Any) -> Any:
    """An explicit sharding for every leaf of a tree of shapes: the largest axis that ``fsdp``
    divides, for large arrays; whole on every device otherwise."""
    parts = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % parts == 0]
        if parts == 1 or leaf.size < SMALL or not axes:
            return NamedSharding(mesh, P())
        split = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, P(*[None] * split, "fsdp"))

    return jax.tree.map(place, shapes)


def put(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows of a batch as parts of global arrays."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
