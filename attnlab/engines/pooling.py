"""Tokens of a document in groups of equally many positions, and one token for each group.

A group holds the positions [g size, (g + 1) size) of its document, wherever in a buffer they begin
and however the sequence was cut; tokens stand in the order of their positions. Groups are numbered
as they appear and packed to the front, so the slots behind the last one are empty and engines skip
them: there are as many slots as tokens because a row may hold that many documents, and as much work
as groups.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Keys, Pattern, Queries


class Groups(NamedTuple):
    """``number`` [B M] tells the group of each token (-1: an empty slot); for each group, ``pos``
    its middle position, ``seg`` its document (-1: no such group) and ``count`` its tokens."""

    number: Array
    pos: Array
    seg: Array
    count: Array


@dataclass(frozen=True)
class Elsewhere(Pattern):
    """Another group of ``size`` positions than the query's own."""

    size: int

    def visible(self, q_pos, k_pos):
        return q_pos // self.size != k_pos // self.size

    def reaches(self, q_low, q_high, k_low, k_high):
        low, high = (q_low // self.size, q_high // self.size)
        return (k_low // self.size != high) | (k_high // self.size != low)


def group(keys: Keys | Queries, size: int) -> Groups:
    """The groups of ``size`` positions; tokens of a document in the order of their positions."""
    B, M = keys.pos.shape
    full, which = keys.seg >= 0, keys.pos // size
    slots = jax.lax.cummax(jnp.where(full, jnp.arange(M), -1), axis=1)
    before = jnp.pad(slots[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    def earlier(z: Array) -> Array:
        return jnp.take_along_axis(z, jnp.maximum(before, 0), 1)

    fresh = (before < 0) | (keys.seg != earlier(keys.seg)) | (which != earlier(which))
    number = jnp.where(full, jnp.cumsum(full & fresh, 1) - 1, -1)
    count = total(jnp.ones((B, M)), number)
    middle = which * size + (size - 1) // 2

    def of_group(z: Array) -> Array:
        place = jnp.where(number >= 0, number, M)
        return jax.vmap(lambda z, n: jnp.full(M + 1, -1).at[n].max(z))(z, place)[:, :M]

    seg = of_group(keys.seg)
    return Groups(number, jnp.where(seg >= 0, of_group(middle), 0), seg, count)


def total(z: Array, number: Array) -> Array:
    """Sums over the tokens of each group: [B M ...] -> [B M ...]; the backward pass gathers."""
    M = number.shape[1]

    def row(z: Array, n: Array) -> Array:
        return jax.ops.segment_sum(z, jnp.where(n >= 0, n, M), M + 1)[:M]

    return jax.vmap(row)(z, number)


def mean(keys: Keys, size: int) -> Keys:
    """One key and value a group, the means over its tokens, with their ``count``. Cost: O(M)."""
    keys = keys.cleared()
    groups = group(keys, size)

    def average(z: Array) -> Array:
        sums = total(z.astype(jnp.float32), groups.number)
        return (sums / jnp.maximum(groups.count, 1)[..., None, None]).astype(z.dtype)

    return Keys(average(keys.k), average(keys.v), groups.pos, groups.seg, groups.count)


def halvings(keys: Keys, levels: int) -> list[Keys]:
    """`mean` over 2, 4, 8, ... tokens that stand in the slots of their positions, one document in
    each row: a group in the slot of its number, and no slots behind the last."""
    keys = keys.cleared()
    k, v, count = keys.k.astype(jnp.float32), keys.v.astype(jnp.float32), keys.seg >= 0
    seg, found = keys.seg, []

    def pairs(z: Array, fill: float = 0) -> tuple[Array, Array]:
        ends = [(0, 0), (0, z.shape[1] % 2)] + [(0, 0)] * (z.ndim - 2)
        z = jnp.pad(z, ends, constant_values=fill)
        z = z.reshape(z.shape[0], -1, 2, *z.shape[2:])
        return z[:, :, 0], z[:, :, 1]

    count = count.astype(jnp.float32)
    for level in range(1, levels + 1):
        k, v, count = (operator.add(*pairs(z)) for z in (k, v, count))
        seg = jnp.maximum(*pairs(seg, -1))
        pos = jnp.arange(seg.shape[1]) * 2**level + (2**level - 1) // 2
        share = (1 / jnp.maximum(count, 1))[..., None, None]
        mean_k, mean_v = ((z * share).astype(keys.k.dtype) for z in (k, v))
        found.append(Keys(mean_k, mean_v, jnp.broadcast_to(pos, seg.shape), seg, count))
    return found


def attended(keys: Keys, size: int, score: Array) -> tuple[Keys, ...]:
    """R keys and values a group: means weighed by softmax over its tokens of ``score`` [B M G R].

    Returns R `Keys`, each one token a group. Cost: O(M R (D + E)).
    """
    keys, groups = keys.cleared(), group(keys, size)
    M = score.shape[1]
    place = jnp.where(groups.number >= 0, groups.number, M)
    score = score.astype(jnp.float32)
    # The largest of a group cancels, so it has no gradient; groups do not share one, because a
    # later group must not round an earlier one.
    top = jax.vmap(lambda z, n: jax.ops.segment_max(z, n, M + 1))(
        jax.lax.stop_gradient(score), place
    )
    top = jax.vmap(lambda z, n: z[n])(top, place)
    weight = jnp.where((groups.number >= 0)[..., None, None], jnp.exp(score - top), 0)
    sums = total(weight, groups.number)
    sums = jnp.where(sums > 0, sums, 1)

    def pooled(z: Array, r: int) -> Array:
        part = total(weight[..., r, None] * z.astype(jnp.float32), groups.number)
        return (part / sums[..., r, None]).astype(z.dtype)

    return tuple(
        Keys(pooled(keys.k, r), pooled(keys.v, r), groups.pos, groups.seg)
        for r in range(score.shape[-1])
    )


def mean_densely(keys: Keys, size: int) -> Keys:
    """`mean`, literally: each group in the slot of its first token, the other slots empty."""
    return attended_densely(keys, size, jnp.zeros((*keys.k.shape[:3], 1)))[0]


def attended_densely(keys: Keys, size: int, score: Array) -> tuple[Keys, ...]:
    """`attended`, literally: each group in the slot of its first token, the other slots empty, and
    with its ``count``."""
    keys, which = keys.cleared(), keys.pos // size
    same = (keys.seg[:, :, None] == keys.seg[:, None]) & (which[:, :, None] == which[:, None])
    same &= (keys.seg >= 0)[:, None]
    first = jnp.argmax(same, -1) == jnp.arange(which.shape[1])
    seg = jnp.where(first & (keys.seg >= 0), keys.seg, -1)
    z = jnp.where(same[..., None, None], score[:, None].astype(jnp.float32), MASK)
    weight = jnp.where(same[..., None, None], jax.nn.softmax(z, 2), 0)  # [B M M G R]

    def pooled(z: Array, r: int) -> Array:
        return jnp.einsum("bmng,bngd->bmgd", weight[..., r], z.astype(jnp.float32)).astype(z.dtype)

    place, count = which * size + (size - 1) // 2, jnp.sum(same, -1).astype(jnp.float32)
    return tuple(
        Keys(pooled(keys.k, r), pooled(keys.v, r), place, seg, count)
        for r in range(score.shape[-1])
    )


def parts_of(sets: tuple[Keys, ...]) -> Keys:
    """Several sets of tokens as one, side by side."""
    whole = sets[0]
    for other in sets[1:]:
        whole = whole.extended(other)
    return whole
