"""A row of any length cut into a fixed number of cells, and the keys of the best of them.

A query at position i sees the L = i + 1 positions of its document so far. Cell m of T holds those
from ⌊m L / T⌋ to ⌊(m + 1) L / T⌋ − 1: each position is in one cell, the largest has w = ⌈L / T⌉,
and where L < T some are empty.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from attnlab.core import Array


class Listed(NamedTuple):
    """The keys that queries keep: ``pos`` [B N H W] int32, -1 for none, and the ``score`` of the
    cell that each is in."""

    pos: Array
    score: Array


def cell_of(pos: Array, length: Array, cells: int) -> Array:
    """The cell of position ``pos`` < ``length`` among ``cells``."""
    return ((pos + 1) * cells - 1) // length


def start_of(cell: Array, length: Array, cells: int) -> Array:
    """The first position of a cell, and one more than the last of the cell before."""
    return cell * length // cells


def complete(pos: Array, cells: int, kept: int) -> Array:
    """Whether queries at ``pos`` keep all positions they see."""
    length = pos + 1
    return jnp.minimum(length, cells) * -(-length // cells) <= kept


def best(score: Array, pos: Array, kept: int) -> Listed:
    """The keys of the cells that score highest, for queries at ``pos`` [B N] with scores
    [B H N T].

    A cell takes w of the ``kept`` places, for its keys from the last to the first; the first cell
    that does not fit gives its last keys. Of equal cells the later is first. No gradient passes the
    choice. Cost: a sort of T for each query.
    """
    T = score.shape[-1]
    length = pos[..., None] + 1  # [B N 1]
    every = jnp.arange(T)
    some = start_of(every, length, T) < start_of(every + 1, length, T)
    ranked = jnp.where(some[:, None], lax.stop_gradient(score), -jnp.inf)[..., ::-1]
    top, place = lax.top_k(ranked, min(kept, T))
    size, slot = -(-length // T), jnp.arange(kept)
    rank = jnp.broadcast_to((slot // size)[:, None], (*score.shape[:-1], kept))
    at = jnp.minimum(rank, top.shape[-1] - 1)
    cell = T - 1 - jnp.take_along_axis(place, at, -1)
    chosen = (rank < top.shape[-1]) & (jnp.take_along_axis(top, at, -1) > -jnp.inf)
    length, slot = length[:, None], (slot % size)[:, None]
    place = start_of(cell + 1, length, T) - 1 - slot
    place = jnp.where(chosen & (place >= start_of(cell, length, T)), place, -1)
    return Listed(*(jnp.moveaxis(z, 1, 2) for z in (place, jnp.take_along_axis(score, cell, -1))))


def spread(score: Array, pos: Array, k_pos: Array, kept: int) -> tuple[Array, Array]:
    """`best`, literally, for keys at ``k_pos`` [B M] of which the later ones do not count: the
    score of each key's cell, and whether it is kept, [B H N M]."""
    T, length = score.shape[-1], pos[..., None] + 1
    cell = jnp.clip(cell_of(k_pos[:, None], length, T), 0, T - 1)
    every = jnp.arange(T)
    some = start_of(every, length, T) < start_of(every + 1, length, T)
    larger = score[..., None, :] > score[..., :, None]
    later = (score[..., None, :] == score[..., :, None]) & (every > every[:, None])
    rank = jnp.sum((larger | later) & some[:, None, :, None], -1)
    before = start_of(cell + 1, length, T) - 1 - k_pos[:, None]
    wide = jnp.broadcast_to(cell[:, None], (*score.shape[:3], cell.shape[-1]))
    place = jnp.take_along_axis(rank, wide, -1) * -(-length // T)[:, None] + before[:, None]
    return jnp.take_along_axis(score, wide, -1), place < kept
