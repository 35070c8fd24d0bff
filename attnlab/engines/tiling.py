"""Tokens cut into tiles, and which tiles can see each other by the positions that they carry."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Rule


def cut(z: Array, tile: int, fill: int) -> Array:
    """[B N ...] -> [tiles B tile ...], padded with ``fill``."""
    B, N = z.shape[:2]
    z = jnp.pad(z, [(0, 0), (0, -N % tile)] + [(0, 0)] * (z.ndim - 2), constant_values=fill)
    return jnp.moveaxis(z.reshape(B, -1, tile, *z.shape[2:]), 1, 0)


class Tokens(NamedTuple):
    """Positions and segments of tiled tokens, [tiles B tile] int32 each, and what is added to the
    logits of each key, f32 or None."""

    pos: Array
    seg: Array
    log_count: Array | None = None

    def at(self, i: Array) -> Tokens:
        """One tile."""
        return jax.tree.map(lambda z: lax.dynamic_index_in_dim(z, i, 0, keepdims=False), self)

    def added(self, rule: Rule, q_pos: Array, q_seg: Array) -> Array:
        """What is added to the logits of the queries of a tile with these keys: f32 [B 1 n m],
        `MASK` where a key is not seen. Computed once for all heads."""
        seen = rule.visible(q_pos, q_seg, self.pos, self.seg)
        counts = 0.0 if self.log_count is None else self.log_count[:, None]
        return lax.optimization_barrier(jnp.where(seen, counts, MASK))[:, None]


class Spans(NamedTuple):
    """Lowest and highest segment and position of the full slots of each tile: [tiles B] int32."""

    seg_low: Array
    seg_high: Array
    pos_low: Array
    pos_high: Array


def spans(tokens: Tokens) -> Spans:
    """The `Spans` of tiled tokens; a tile without a full slot has low > high."""
    full, far = tokens.seg >= 0, jnp.iinfo(jnp.int32).max

    def bounds(values: Array) -> tuple[Array, Array]:
        low = jnp.min(jnp.where(full, values, far), -1)
        return low, jnp.max(jnp.where(full, values, -far), -1)

    return Spans(*bounds(tokens.seg), *bounds(tokens.pos))


def reach(rule: Rule, queries: Spans, keys: Spans) -> Array:
    """Which key tile holds a key that some query of a query tile may see: bool [n_q n_k],
    conservative (True where only the bounds of positions and segments overlap)."""
    return jnp.any(reach_by_row(rule, queries, keys), -1)


def reach_by_row(rule: Rule, queries: Spans, keys: Spans) -> Array:
    """`reach`, of each row of the batch for itself: bool [n_q n_k B]."""
    asking, answering = Spans(*(z[:, None] for z in queries)), Spans(*(z[None] for z in keys))
    near = asking.seg_low <= answering.seg_high
    near &= answering.seg_low <= asking.seg_high
    if rule.causal:
        near &= answering.pos_low <= asking.pos_high
    for pattern in rule.patterns:
        near &= pattern.reaches(
            asking.pos_low, asking.pos_high, answering.pos_low, answering.pos_high
        )
    return near
