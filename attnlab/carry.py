"""What is handed on from batch to batch: the states of the layers whose mechanism ``carries``.

A row goes on from the state that the row in its place left behind if its first token is the next
one of the same document; any other row (the first batch, a new document, a batch that was left out)
starts from the initial state, as if nothing stood before it. So a mechanism meets no gap in the
positions of a document, and what a bad batch left behind is not read. No gradient crosses batches.

Every array of such a state must be finite and have the rows of the batch as its first axis.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core import Array
from attnlab.model import Memory, initial_memory
from attnlab.pointer import Trainable


class Carried(NamedTuple):
    """``seg``, ``pos`` int32 [B]: the token that each row read last; ``layers``: the state of each
    layer, () where nothing is carried."""

    seg: Array
    pos: Array
    layers: tuple[Any, ...]


def carries(model: Trainable) -> bool:
    """Whether any layer hands its state on."""
    return any(mechanism.carries for mechanism in model.mechanisms)


def nothing_read(model: Trainable, rows: int) -> Carried | tuple[()]:
    """What is carried before the first batch; () for a model that carries nothing.

    Raises `TypeError` for a mechanism that carries and has no state, or not one entry a row.
    """
    if not carries(model):
        return ()
    memory = initial_memory(model.architecture, model.mechanisms, rows, 0)
    layers = _states(model, memory)
    for mechanism, state in zip(model.mechanisms, layers):
        shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
        if mechanism.carries and not (shapes and all(shape[:1] == (rows,) for shape in shapes)):
            raise TypeError(
                f"{mechanism}: a carried state needs arrays of [{rows} ...], not {shapes}"
            )
    none = jnp.full((rows,), -1, jnp.int32)
    return Carried(none, none - 1, layers)


def resume(model: Trainable, carried: Any, batch: dict[str, Array]) -> Any:
    """The memory with which the model reads a batch: each row's own past, or none."""
    if not carries(model):
        return None
    seg, pos = batch["seg"][:, 0], batch["pos"][:, 0]
    goes_on = (seg >= 0) & (seg == carried.seg) & (pos == carried.pos + 1)

    def choose(old: Array, new: Array) -> Array:
        return jnp.where(goes_on.reshape(-1, *(1,) * (old.ndim - 1)), old, new)

    fresh: Any = nothing_read(model, seg.shape[0])
    layers = jax.tree.map(choose, carried.layers, fresh.layers)
    zero = jnp.zeros((), jnp.int32)
    return tuple(
        Memory(None, zero, state) if mechanism.carries else None
        for mechanism, state in zip(model.mechanisms, layers)
    )


def hand_on(model: Trainable, memory: Any, batch: dict[str, Array]) -> Any:
    """What is carried from a batch that was read, with the memory that the model returned."""
    if not carries(model):
        return ()
    seg, pos = batch["seg"][:, -1], batch["pos"][:, -1]
    return jax.lax.stop_gradient(Carried(seg, pos, _states(model, memory)))


def _states(model: Trainable, memory: Any) -> tuple[Any, ...]:
    pairs = zip(model.mechanisms, memory)
    return tuple(m.carried(past.state) if m.carries else () for m, past in pairs)
