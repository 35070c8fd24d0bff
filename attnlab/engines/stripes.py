"""Stripes: single keys that came near an anchor, chosen for a group of queries by an earlier group.

Groups hold g blocks of b positions of a document. The anchor of a query is its largest logit among
cheap keys: the first block, and its own group. For group γ the blocks t of group γ − a, pooled, say
by how much a key exceeds their anchors,
    m_γj = max over t of (q̄_t·k_j / √D − x̄_t),   b <= j < γ g b
and the S keys of the highest m_γj >= −θ are its stripes. With a = 1 nothing depends on what is
later; a = 0 is the published form, in which later queries of a group reach earlier outputs.
Source: Zhang et al., arXiv 2505.23520.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Dims, Keys, Pattern, Queries, Rule
from attnlab.engines import gathered, matching, pooling, segments
from attnlab.engines.highest import highest

LARGEST = 128
"""Most queries of a tile that meets stripes."""


@dataclass(frozen=True)
class Region(Pattern):
    """The first ``block`` positions of a document, and the query's own ``group`` of positions."""

    block: int
    group: int

    def visible(self, q_pos, k_pos):
        return (k_pos < self.block) | segments.own(self.group).visible(q_pos, k_pos)

    def reaches(self, q_low, q_high, k_low, k_high):
        near = segments.own(self.group).reaches(q_low, q_high, k_low, k_high)
        return near | (k_low < self.block)


class State(NamedTuple):
    """The newest group: of its blocks so far the sums of rotated queries ``q`` [B g H D] and of
    anchors ``x`` [B g H], f32, their ``count`` [B g] f32, first position ``pos`` and document
    ``seg`` [B g] (< 0: none yet); the positions of its ``stripes`` [B H S], -1 behind the last."""

    q: Array
    x: Array
    count: Array
    pos: Array
    seg: Array
    stripes: Array


class Pooled(NamedTuple):
    """Whole groups: the means of their blocks, ``q`` [B n g H D], ``x`` [B n g H], f32; their first
    position ``pos`` and document ``seg`` [B n] (< 0: no such group)."""

    q: Array
    x: Array
    pos: Array
    seg: Array


class Choice(NamedTuple):
    """``which`` int32 [B N] of ``lists`` [B H n S] a query meets, -1: none; a list has the slots of
    keys in the order of m, then -1. ``left_out``: the share of the keys above −θ that were more
    than S."""

    which: Array
    lists: Array
    left_out: Array


@dataclass(frozen=True)
class Stripes:
    """How stripes are chosen: b = ``block``, g = ``step``, S = ``most``, θ = ``threshold``, a =
    ``ago``."""

    block: int
    step: int
    most: int
    threshold: float
    ago: int = 1

    @property
    def group(self) -> int:
        """Positions of a group."""
        return self.block * self.step

    @property
    def region(self) -> Region:
        """Where the anchor of a query is looked for."""
        return Region(self.block, self.group)

    def initial_state(self, dims: Dims, batch: int) -> State:
        """No past."""
        shape, H = (batch, self.step), dims.heads
        pos = jnp.zeros(shape, jnp.int32)
        x, stripes = jnp.zeros((*shape, H)), jnp.full((batch, H, self.most), -1, jnp.int32)
        q = jnp.zeros((*shape, H, dims.key_dim))
        return State(q, x, jnp.zeros(shape), pos, pos - 1, stripes)

    def choose(self, queries: Queries, keys: Keys, rule: Rule, state: Any) -> tuple[Choice, Any]:
        """The stripes of all groups of a call that may have begun before it, in f32 whatever the
        inputs and without a gradient; and the next state, () for ()."""
        queries, keys, rule = lax.stop_gradient(
            (segments.precise(queries), segments.precise(keys), rule)
        )
        groups, after = self._pool(queries, keys, rule, state)
        back, pos, seg = self.ago * self.group, groups.pos, groups.seg
        if state:
            pos = jnp.append(pos, state.pos[:, :1] - back, 1)
            seg = jnp.append(seg, jnp.max(state.seg, 1, keepdims=True), 1)
        begin = queries.pos // self.group * self.group - back
        which = matching.locate(begin, queries.seg, pos, seg)
        asked = jnp.any(which[..., None] == jnp.arange(groups.pos.shape[1]), (0, 1))
        lists, wanted = self._search(groups, asked, keys, rule)
        length = lists.shape[-1]
        left_out = jnp.sum(jnp.maximum(wanted - length, 0)) / jnp.maximum(jnp.sum(wanted), 1)
        if not state:
            return Choice(which, lists, left_out), state
        own = _slots(state.stripes[..., :length], jnp.max(state.seg, 1), keys)
        lists = jnp.append(lists, own[:, :, None], 2)
        document = jnp.max(after.seg, 1, keepdims=True)
        newest = matching.locate(after.pos[:, :1] - back, document, pos, seg)
        fill = [(0, 0), (0, 0), (0, self.most - length)]
        stripes = jnp.pad(_places(lists, newest, keys), fill, constant_values=-1)
        return Choice(which, lists, left_out), after._replace(stripes=stripes)

    def _search(self, groups: Pooled, asked: Array, keys: Keys, rule: Rule) -> tuple[Array, Array]:
        """The slots of what each of ``groups`` chooses, int32 [B H n S], and how many keys it
        wanted, [n B H]; a group at a time, of those that are ``asked``, bool [n]."""
        B, _, _, H = groups.x.shape
        b, length = self.block, min(self.most, keys.pos.shape[1])
        k = rule.rotate(keys.k, keys.pos, "key").swapaxes(1, 2)

        def nothing(group: Pooled) -> tuple[Array, Array]:
            return jnp.full((B, H, length), -1, jnp.int32), jnp.zeros((B, H), jnp.int32)

        def search(group: Pooled) -> tuple[Array, Array]:
            middle = group.pos[:, None] + jnp.arange(self.step) * b + (b - 1) // 2
            z = rule.biased(group.q.swapaxes(1, 2), k, middle, keys.pos)
            margin = jnp.max(z - group.x.swapaxes(1, 2)[..., None], 2)
            past = (keys.pos >= b) & (keys.pos < group.pos[:, None] + self.ago * self.group)
            past &= (keys.seg == group.seg[:, None]) & (keys.seg >= 0)
            kept = past[:, None] & (margin >= -self.threshold)
            top, slot = lax.top_k(jnp.where(kept, margin, -jnp.inf), length)
            return jnp.where(top > -jnp.inf, slot, -1), jnp.sum(kept, -1, dtype=jnp.int32)

        by_group = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), groups)
        found = lax.map(lambda one: lax.cond(one[1], search, nothing, one[0]), (by_group, asked))
        return jnp.moveaxis(found[0], 0, 2), found[1]

    def _pool(self, queries: Queries, keys: Keys, rule: Rule, state: Any) -> tuple[Pooled, State]:
        """The whole groups of a call, of which the first may have begun before it, and the state
        after it, without stripes."""
        b, G, (B, N, H, D) = self.block, self.group, queries.q.shape
        x = highest(queries, keys, rule.restrict(self.region), segments.tile_of(G))
        new = rule.rotate(queries.q, queries.pos, "query"), x.swapaxes(1, 2), jnp.ones((B, N))
        past = state or self.initial_state(Dims(0, H, H, D, D), B)
        sums = [jnp.append(a, z, 1) for a, z in zip(past[:3], new)]
        pos, seg = (jnp.append(a, z, 1) for a, z in zip(past[3:5], queries[1:]))
        blocks, groups = (pooling.group(Queries(sums[0], pos, seg), size) for size in (b, G))
        size = pooling.total(sums[2], groups.number)
        sums = [pooling.total(z, blocks.number) for z in sums]

        def of_groups(begin: Array, seg: Array) -> tuple[Array, list[Array]]:
            """Slots [B n g] of the blocks of groups that begin there, and what they hold."""
            middle = begin[..., None] + jnp.arange(self.step) * b + (b - 1) // 2
            asking = middle.reshape(B, -1), jnp.repeat(seg, self.step, 1)
            slot = matching.locate(*asking, blocks.pos, blocks.seg)
            held = segments.take(sums, jnp.maximum(slot, 0))
            return slot.reshape(middle.shape), [
                z.reshape(*middle.shape, *z.shape[2:]) for z in held
            ]

        most = max(1, (N + G * bool(state)) // G)
        first = jnp.argsort(size != G, 1, stable=True)[:, :most]
        count, begin, known = segments.take((size, groups.pos // G * G, groups.seg), first)
        known = jnp.where(count == G, known, -1)
        _, (q, x, _) = of_groups(begin, known)
        last = jnp.max(jnp.where(seg >= 0, jnp.arange(seg.shape[1]), 0), 1, keepdims=True)
        newest, document = (jnp.take_along_axis(z, last, 1) for z in (pos // G * G, seg))
        slot, held = of_groups(newest, document)
        places = newest + jnp.arange(self.step) * b
        document = jnp.where(slot[:, 0] >= 0, document, -1)
        sums, anchors, count = (z[:, 0] for z in held)
        after = State(sums, anchors, count, places, document, past.stripes)
        return Pooled(q / b, x / b, begin, known), after

    def plan(self, choice: Choice) -> gathered.Plan:
        """Tiles of queries that meet the same list, in one round."""
        which, lists = choice.which, choice.lists
        (B, H, n, _), N, T = lists.shape, which.shape[1], self.tile(which.shape[1])
        groups = jax.vmap(lambda z: gathered.group(z, n, T))(which)
        table = groups.table[:, None, :, None]
        listed = jnp.take_along_axis(lists, jnp.maximum(table, 0), 2)
        listed = jnp.where(table >= 0, listed, -1)
        slot = jnp.where(which >= 0, groups.slot, -1)
        tiles = groups.pair.shape[1:]
        return gathered.Plan(
            jnp.broadcast_to(groups.pair[:, None], (1, B, H, *tiles)),
            jnp.broadcast_to(slot[:, None], (1, B, H, N)),
            listed[None],
            jnp.zeros((1, *listed.shape)),
        )

    def tile(self, queries: int) -> int:
        """Queries of a group in a tile: all, or equal parts."""
        return min(queries, -(-self.group // -(-self.group // LARGEST)))


def _slots(places: Array, seg: Array, keys: Keys) -> Array:
    """The slots of keys at ``places`` [B H S] of document ``seg`` [B], -1 where there are none."""
    own = (keys.seg == seg[:, None]) & (keys.seg >= 0)
    first = jnp.argmax(own, 1, keepdims=True)
    slot = places + (first - jnp.take_along_axis(keys.pos, first, 1))[..., None]
    there = (places >= 0) & jnp.any(own, 1)[:, None, None]
    return jnp.where(there & (slot >= 0) & (slot < own.shape[1]), slot, -1)


def _places(lists: Array, which: Array, keys: Keys) -> Array:
    """The positions of the keys in list ``which`` [B 1] of ``lists`` [B H n S]: [B H S]."""
    slot = jnp.take_along_axis(lists, jnp.maximum(which, 0)[..., None, None], 2)[:, :, 0]
    pos = jax.vmap(lambda pos, at: pos[at])(keys.pos, jnp.maximum(slot, 0))
    return jnp.where((slot >= 0) & (which >= 0)[..., None], pos, -1)
