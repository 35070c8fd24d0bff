"""Devices: the mesh of a config, and where the state and the batches of a run lie on it.

Axes: ``data`` splits the rows of a batch; ``fsdp`` splits the rows and every large parameter;
``seq`` splits the tokens of every row; ``tensor`` splits heads and the hidden axis of the MLPs.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from attnlab.core import Mechanism
from attnlab.engines.sharded import HEADS, ROWS, SEQUENCE
from attnlab.errors import UserError

AXES = (*ROWS, SEQUENCE, HEADS)
SMALL = 2**14
"""Parameters with fewer elements are kept whole on every device."""

SPLIT = {
    ("attention", "query"): 1,
    ("attention", "key"): 1,
    ("attention", "value"): 1,
    ("attention", "out"): 0,
    ("mlp", "gate"): 1,
    ("mlp", "up"): 1,
    ("mlp", "down"): 0,
}
"""Which axis of a kernel, by the end of its path, holds heads or the hidden units of an MLP."""


def make_mesh(text: str) -> Mesh:
    """The mesh of ``"data:2,fsdp:1,seq:2,tensor:1"``; an axis that is not named has size 1, and a
    size of -1 takes the devices that are left.

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
    named = [part.partition(":")[0] for part in parts]
    if len(set(named)) < len(named):
        raise UserError(f"mesh={text!r} names an axis twice")
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh={text!r}: only one size may be -1")
    asked = {axis: sizes[axis] for axis in named}
    known = math.prod(size for size in sizes.values() if size > 0)
    sizes = {axis: count // known if size == -1 else size for axis, size in sizes.items()}
    places = math.prod(sizes.values())
    if places != count:
        raise UserError(
            f"mesh={text!r} has {places} places for {count} devices; use {_legal(asked, count)}"
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


def _legal(asked: dict[str, int], count: int) -> str:
    """The meshes of so many devices with the axes that were asked for, those nearest first."""
    if len(asked) < 2:
        axis = next(iter(asked), ROWS[0])
        return f"{axis}:{count} or {axis}:-1"

    def far(sizes: tuple[int, ...]) -> float:
        pairs = zip(sizes, asked.values())
        return sum(abs(math.log(size / wanted)) for size, wanted in pairs if wanted > 0)

    nearest = sorted(_factorisations(count, len(asked)), key=far)[:4]
    return " or ".join(",".join(map("{}:{}".format, asked, sizes)) for sizes in nearest)


def _factorisations(count: int, factors: int) -> list[tuple[int, ...]]:
    if factors == 1:
        return [(count,)]
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    return [(n, *rest) for n in divisors for rest in _factorisations(count // n, factors - 1)]


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Rows of a batch over the axes ``data`` and ``fsdp``. Raises `UserError` where they do not
    divide."""
    parts = math.prod(mesh.shape[axis] for axis in ROWS)
    if batch % parts:
        among = "devices" if parts == mesh.size else "groups of devices"
        raise UserError(
            f"task.batch={batch} does not divide among {parts} {among} (mesh "
            f"{dict(mesh.shape)}); use {-(-batch // parts) * parts}"
        )
    return NamedSharding(mesh, P(ROWS))


def check_length(mesh: Mesh, length: int) -> None:
    """Raises `UserError` where the tokens of a row do not divide among the axis ``seq``."""
    parts = mesh.shape[SEQUENCE]
    if length % parts:
        both = math.gcd(length, mesh.size)
        near = max(n for n in range(1, parts) if both % n == 0)
        longer = -(-length // parts) * parts
        raise UserError(
            f"task.length={length} does not divide among the {parts} devices of mesh axis "
            f"{SEQUENCE}; use task.length={longer}, or {SEQUENCE}:{near}"
        )


def gathered(mesh: Mesh, names: str, mechanisms: Sequence[Mechanism]) -> list[str]:
    """Those of the mechanisms of a pattern of ``names`` whose sequences the mesh asks to split, and
    which have no form for it."""
    layers = zip(itertools.cycle(names.split("+")), mechanisms)
    whole = (name for name, mechanism in layers if not mechanism.spreads)
    return list(dict.fromkeys(whole)) if mesh.shape[SEQUENCE] > 1 else []


def readers(sharding: NamedSharding) -> tuple[int, int]:
    """Into how many parts processes divide the rows of a batch, and which of them this process
    reads: (part, parts). Processes that share rows, and split their tokens, read the same part."""
    rows: dict[int, set[int]] = {}
    for device, (held, *_) in sharding.devices_indices_map((sharding.mesh.size,)).items():
        rows.setdefault(device.process_index, set()).add(held.start or 0)
    groups = sorted({tuple(sorted(held)) for held in rows.values()})
    return groups.index(tuple(sorted(rows[jax.process_index()]))), len(groups)


def spread(batch: int, sharding: NamedSharding | None) -> tuple[int, slice]:
    """A number of rows made a multiple of what they are split into, and which of them are this
    process's."""
    if sharding is None:
        return batch, slice(None)
    split = math.prod(sharding.mesh.shape[axis] for axis in ROWS if axis in sharding.mesh.shape)
    batch = -(-batch // split) * split
    part, parts = readers(sharding)
    share = batch // parts
    return batch, slice(part * share, (part + 1) * share)


def state_shardings(mesh: Mesh, shapes: Any, head_dim: int = 1) -> Any:
    """An explicit sharding for every leaf of a tree of shapes.

    ``tensor`` splits the kernels of `SPLIT`, between heads of ``head_dim`` or between hidden units;
    ``fsdp`` the largest other axis that it divides, of large arrays. Where nothing divides, an
    array is whole on every device.
    """
    fsdp = mesh.shape["fsdp"]

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        names: list[str | None] = [None] * len(leaf.shape)
        axis = tensor_axis(mesh.shape[HEADS], path, leaf.shape, head_dim)
        if axis is not None:
            names[axis] = HEADS
        axes = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0 and i != axis]
        if fsdp > 1 and leaf.size >= SMALL and axes:
            names[max(axes, key=lambda i: leaf.shape[i])] = "fsdp"
        while names and names[-1] is None:
            names.pop()
        return NamedSharding(mesh, P(*names))

    return jax.tree_util.tree_map_with_path(place, shapes)


def tensor_axis(
    parts: int, path: Sequence[Any], shape: Sequence[int], head_dim: int = 1
) -> int | None:
    """The axis of a leaf that ``tensor`` splits into so many parts, or None: of parameters, of
    their averages and moments, whose paths end alike."""
    if parts == 1 or len(path) < 3 or len(shape) != 2 or _name(path[-1]) != "kernel":
        return None
    parent = _name(path[-3])
    axis = SPLIT.get((parent, _name(path[-2])))
    unit = head_dim if parent == "attention" else 1
    return None if axis is None or shape[axis] % (parts * unit) else axis


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", "")))


def put(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows of a batch as parts of global arrays.

    Arrays with one entry a token are split along the tokens too, if their number divides among the
    mesh axis ``seq``.
    """
    length = batch["tokens"].shape[1]
    rows, parts = 1, 1
    if isinstance(sharding, NamedSharding):
        parts, rows = sharding.mesh.shape.get(SEQUENCE, 1), readers(sharding)[1]

    def place(array: np.ndarray) -> jax.Array:
        where: Any = sharding
        if parts > 1 and length % parts == 0 and array.ndim > 1 and array.shape[1] == length:
            where = NamedSharding(sharding.mesh, P(*sharding.spec, SEQUENCE))
        shape = (rows * array.shape[0], *array.shape[1:])
        return jax.make_array_from_process_local_data(where, array, shape)

    return {name: place(array) for name, array in batch.items()}
