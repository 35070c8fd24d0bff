"""How attention spreads over its keys: one row of weights a query, summed up in a few numbers.

With weights p_j over the n keys that a query sees, and shares s = p / Σp:

    entropy H = −Σ s ln s        support e^H        evenness H / ln n        participation 1 / Σ s²

Equal logits give H = ln n, so support and participation n. The masses are sums of the weights
themselves: the largest, the `top` largest, those of the first positions of the document (a sink),
those of the keys that matter. They are exact, and [N, M] logits are never in memory: softmax rows
are streamed over tiles of keys, with

    m = max z,   l = Σ e^(z−m),   f = Σ e^(z−m) (z − m),   g = Σ e^(2(z−m)),   the largest logits

rescaled together when m moves, so that H = ln l − f / l and 1 / Σ s² = l² / g. Any other normaliser
needs its whole row, and gets it for a tile of queries at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import blockwise

TOP, SINKS = 8, 4
LOGITS_IN_FLIGHT = 2**22
"""Logits of one tile of queries where a row must be whole."""


class Rows(NamedTuple):
    """Statistics of rows of weights, f32 [B H N]; all 0 where a query sees no key.

    ``visible`` n, the keys seen; ``total`` Σp; ``entropy`` in nats and ``participation`` of the
    shares p / Σp; and sums of weights: ``largest``, ``leading`` (the `TOP` largest), ``sink`` (the
    first `SINKS` positions of the document), ``signal`` (the keys said to matter).
    """

    visible: Array
    total: Array
    entropy: Array
    participation: Array
    largest: Array
    leading: Array
    sink: Array
    signal: Array

    @property
    def support(self) -> Array:
        """e^H: as many equal weights would have this entropy."""
        return jnp.where(self.visible > 0, jnp.exp(self.entropy), 0.0)

    @property
    def evenness(self) -> Array:
        """H / ln n, from 0 (one key) to 1 (all alike); 1 where there is one key to see."""
        return jnp.where(self.visible > 1, self.entropy / jnp.log(jnp.maximum(self.visible, 2)), 1)

    @property
    def noise(self) -> Array:
        """The weight on keys that do not matter."""
        return self.total - self.signal

    def named(self) -> dict[str, Array]:
        """All of them by name: `NAMES`."""
        return {name: getattr(self, name) for name in NAMES}


NAMES = (*Rows._fields, "support", "evenness")
"""The columns of a table of rows; `Rows.noise` is total − signal."""


class _Asking(NamedTuple):
    """A tile of queries, heads first, and the positions of the keys that matter to each [B t R]."""

    q: Array
    pos: Array
    seg: Array
    matters: Array


class _Answering(NamedTuple):
    """A tile of keys, heads first."""

    k: Array
    pos: Array
    seg: Array


class _Sums(NamedTuple):
    """What one pass over the keys carries for every query; see the module."""

    high: Array
    total: Array
    first: Array
    second: Array
    visible: Array
    sink: Array
    signal: Array
    best: Array


@partial(jax.jit, static_argnames=("tile",))
def measure_rows(
    queries: Queries,
    keys: Keys,
    rule: Rule,
    matters: Array | None = None,
    *,
    tile: int | None = None,
) -> Rows:
    """The `Rows` of the weights that ``rule`` gives ``queries`` over ``keys``.

    ``matters`` [B N R] int32: positions, in the query's document, of the keys that count as signal;
    one that is not visible counts nothing. Values and taps play no part. ``tile`` bounds the tokens
    of a tile (chosen by shape when None). Cost: O(N M D) time; O(N + M) memory, O(N + tile M) where
    the rule needs whole rows.
    """
    queries, keys = queries.cleared(), keys.cleared()
    if rule.position.whole:
        keys, _ = keys.ordered()
    B, N, H, _ = queries.q.shape
    M = keys.k.shape[1]
    if matters is None:
        matters = jnp.full((B, N, 1), -1, jnp.int32)
    limit = max(1, LOGITS_IN_FLIGHT // (B * H * M))
    if rule.whole:
        size, tile = min(N, tile or min(512, limit)), M
    else:
        size = blockwise.even_tile(N, tile) if tile else blockwise.tile_size(N, B * H)
    q = _tiles(rule.rotate(queries.q, queries.pos, "query"), size, 0).swapaxes(2, 3)
    asking = _Asking(q, *(_tiles(z, size, -1) for z in (queries.pos, queries.seg, matters)))
    # As wide as memory allows: many small sums, one after another, would round off more.
    limit = max(64, blockwise.LOGITS_IN_FLIGHT // (B * H * size))
    width = blockwise.even_tile(M, tile or limit)
    k = _tiles(rule.rotate(keys.k, keys.pos, "key"), width, 0).swapaxes(2, 3)
    answering = _Answering(k, _tiles(keys.pos, width, 0), _tiles(keys.seg, width, -1))
    one: Callable[..., Rows] = _whole_rows if rule.whole else _streamed_rows
    rows = lax.map(partial(one, rule, answering), asking)
    return Rows(*(jnp.moveaxis(z, 0, 2).reshape(B, H, -1)[..., :N] for z in rows))


def _streamed_rows(rule: Rule, keys: _Answering, asking: _Asking) -> Rows:
    def step(sums: _Sums, tile: _Answering) -> tuple[_Sums, None]:
        return _add(rule, asking, sums, tile), None

    B, H, t, _ = asking.q.shape
    zero = jnp.zeros((B, H, t))
    best = jnp.full((B, H, t, TOP), MASK)
    start = _Sums(zero + MASK, zero, zero, zero, zero, zero, zero, best)
    sums, _ = lax.scan(step, start, keys)
    full = sums.total > 0
    total = jnp.where(full, sums.total, 1.0)
    lse = jnp.where(full, sums.high + jnp.log(total), MASK)
    share = rule.normaliser.share(lse)
    weight = jnp.where(full, 1.0 if share is None else share, 0.0)
    leading = jnp.sum(
        jnp.where(sums.best > MASK / 2, jnp.exp(sums.best - sums.high[..., None]), 0), -1
    )
    return Rows(
        sums.visible,
        weight,
        jnp.where(full, jnp.log(total) - sums.first / total, 0.0),
        jnp.where(full, total * total / jnp.where(full, sums.second, 1.0), 0.0),
        weight / total,
        *(weight * mass / total for mass in (leading, sums.sink, sums.signal)),
    )


def _add(rule: Rule, asking: _Asking, sums: _Sums, tile: _Answering) -> _Sums:
    """The sums with one more tile of keys."""
    seen, sink, signal = _kinds(rule, asking, tile)
    z = jnp.where(seen, rule.biased(asking.q, tile.k, asking.pos, tile.pos), MASK)
    high = jnp.maximum(sums.high, jnp.max(z, -1))
    shift = sums.high - high
    shrink, below = jnp.exp(shift), z - high[..., None]
    weight = jnp.where(seen, jnp.exp(below), 0.0)

    def add(old: Array, part: Array) -> Array:
        return shrink * old + jnp.sum(part, -1)

    return _Sums(
        high,
        add(sums.total, weight),
        add(sums.first + shift * sums.total, weight * below),
        shrink * shrink * sums.second + jnp.sum(weight * weight, -1),
        sums.visible + jnp.sum(seen, -1),
        add(sums.sink, jnp.where(sink, weight, 0.0)),
        add(sums.signal, jnp.where(signal, weight, 0.0)),
        lax.top_k(jnp.concatenate([sums.best, z], -1), TOP)[0],
    )


def _whole_rows(rule: Rule, keys: _Answering, asking: _Asking) -> Rows:
    tile = _Answering(*(z[0] for z in keys))
    seen, sink, signal = _kinds(rule, asking, tile)
    z = jnp.where(seen, rule.rows(asking.q, tile.k, seen, asking.pos, tile.pos), MASK)
    weight = rule.weights(z, seen)
    total = jnp.sum(weight, -1)
    share = weight / jnp.where(total > 0, total, 1.0)[..., None]
    square = jnp.sum(share * share, -1)
    best = lax.top_k(weight, min(TOP, weight.shape[-1]))[0]
    return Rows(
        jnp.broadcast_to(jnp.sum(seen, -1), total.shape).astype(jnp.float32),
        total,
        -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)), -1),
        jnp.where(square > 0, 1.0 / jnp.where(square > 0, square, 1.0), 0.0),
        best[..., 0],
        jnp.sum(best, -1),
        jnp.sum(jnp.where(sink, weight, 0.0), -1),
        jnp.sum(jnp.where(signal, weight, 0.0), -1),
    )


def _kinds(rule: Rule, asking: _Asking, tile: _Answering) -> tuple[Array, Array, Array]:
    """Which keys are seen, are sinks, matter: bool, broadcastable to [B H N M]."""
    seen = rule.visible(asking.pos, asking.seg, tile.pos, tile.seg)[:, None]
    signal = jnp.any(tile.pos[:, None, :, None] == asking.matters[:, :, None], -1)[:, None]
    return seen, (tile.pos < SINKS)[:, None, None], signal


def _tiles(z: Array, tile: int, fill: int) -> Array:
    """[B N ...] -> [tiles B tile ...], padded with ``fill``."""
    B, N = z.shape[:2]
    z = jnp.pad(z, [(0, 0), (0, -N % tile)] + [(0, 0)] * (z.ndim - 2), constant_values=fill)
    return jnp.moveaxis(z.reshape(B, -1, tile, *z.shape[2:]), 1, 0)
