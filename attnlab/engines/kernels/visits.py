"""Which tiles of the other side a tile meets: lists of pairs, row by row, of those alone that meet.

A tile that many meet has a long list and makes no other longer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from attnlab.core import Array

NONE = np.iinfo(np.int32).max
"""No tile, and no pair."""


class Visits(NamedTuple):
    """Which tiles of the other side a tile meets, at least one.

    ``pair`` = row · others + other, int32 and ascending, where row = b · tiles + i; those of a row
    stand from ``start[row]`` up to ``start[row + 1]``, and nothing counts from ``start[-1]`` on.
    """

    pair: Array
    start: Array


class Near(NamedTuple):
    """Tiles that meet, as a table of all pairs: bool [B n_q n_k]. A tile that meets none is shown
    the first, of which the rule lets it see nothing."""

    table: Array

    def of_queries(self, queries: int, keys: int) -> Visits:
        """What each of ``queries`` tiles meets among ``keys`` tiles."""
        return _near(self.table)

    def of_keys(self, queries: int, keys: int) -> Visits:
        """What each of ``keys`` tiles meets among ``queries`` tiles."""
        return _near(self.table.swapaxes(1, 2))


class Listed(NamedTuple):
    """Tiles that meet, as lists: of each tile of queries, int32 [B n_q L], each tile of keys once
    and in order, `NONE` behind. The last tile of either side is empty: who meets none meets it."""

    table: Array

    def of_queries(self, queries: int, keys: int) -> Visits:
        """As `Near.of_queries`, from an array as long as the lists."""
        named = self.table.at[..., 0].min(keys - 1)
        row = jnp.arange(named[..., 0].size, dtype=jnp.int32).reshape(*named.shape[:2], 1)
        pair = jnp.where(named == NONE, NONE, row * keys + named)
        return _visits(pair.reshape(-1), named[..., 0].size, keys)

    def of_keys(self, queries: int, keys: int) -> Visits:
        """As `Near.of_keys`, from an array as long as the lists and the tiles of keys."""
        rows = self.table.shape[0] * keys
        batch, tile, _ = jnp.indices(self.table.shape, jnp.int32, sparse=True)
        none = self.table == NONE
        row = jnp.where(none, rows, batch * keys + self.table)
        met = jnp.zeros(rows, bool).at[row].set(True, mode="drop")
        pair = jnp.where(none, NONE, row * queries + tile)
        instead = jnp.arange(rows, dtype=jnp.int32) * queries + queries - 1
        pair = jnp.append(pair, jnp.where(met, NONE, instead))
        return _visits(pair, rows, queries)


def _near(table: Array) -> Visits:
    batch, tiles, others = table.shape
    table = table.at[..., 0].max(~jnp.any(table, -1)).reshape(-1)
    pair = jnp.where(table, jnp.arange(table.size, dtype=jnp.int32), NONE)
    return _visits(pair, batch * tiles, others)


def _visits(pair: Array, rows: int, others: int) -> Visits:
    """From pairs in any order, `NONE` where there is none."""
    pair = jnp.sort(pair)
    first = jnp.arange(rows + 1, dtype=jnp.int32) * others
    return Visits(pair, jnp.searchsorted(pair, first).astype(jnp.int32))
