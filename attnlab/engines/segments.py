"""Documents cut into segments of equally many tokens, by position and never by place in a call:
which keys a segment sees, and what a memory keeps of them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Keys, Pattern, Queries, Rule
from attnlab.engines import matching, parts


@dataclass(frozen=True)
class Span(Pattern):
    """first <= j − s < last, where s is the first position of the query's segment."""

    segment: int
    first: int
    last: int

    def visible(self, q_pos, k_pos):
        offset = k_pos - q_pos // self.segment * self.segment
        return (offset >= self.first) & (offset < self.last)

    def reaches(self, q_low, q_high, k_low, k_high):
        low, high = (pos // self.segment * self.segment for pos in (q_low, q_high))
        return (k_high >= low + self.first) & (k_low < high + self.last)


def own(segment: int) -> Span:
    """The query's own segment."""
    return Span(segment, 0, segment)


def tile_of(segment: int) -> int:
    """Tokens per tile that waste little of a segment."""
    return max(64, 1 << (segment // 2).bit_length())


def newest(keys: Keys, length: int) -> Keys:
    """The last ``length`` tokens of the latest document, in order, behind empty slots."""
    index = jnp.arange(keys.pos.shape[1])
    last = jnp.max(jnp.where(keys.seg >= 0, index, 0), 1, keepdims=True)
    latest = jnp.take_along_axis(keys.seg, last, 1)
    place = jnp.where((keys.seg == latest) & (keys.seg >= 0), index, -1)
    place, slots = lax.top_k(place, length)
    kept = take(keys, slots[:, ::-1])
    return kept._replace(seg=jnp.where(place[:, ::-1] >= 0, kept.seg, -1))


def take(tokens, slots: Array):
    """The tokens [B M ...] of any pytree at ``slots`` [B L]."""

    def one(z: Array) -> Array:
        return jnp.take_along_axis(z, slots.reshape(slots.shape + (1,) * (z.ndim - 2)), 1)

    return jax.tree.map(one, tokens)


def remember(keys: Keys, state: Any) -> tuple[Keys, Any]:
    """All keys in sight, and the newest of them, as many as ``state`` holds; without a state, the
    keys as they are."""
    if not state:
        return keys, state
    keys = state.extended(keys)
    return keys, newest(keys, state.pos.shape[1])


def stopped(keys: Keys) -> Keys:
    """The same tokens, through which no gradient flows."""
    return keys._replace(k=lax.stop_gradient(keys.k), v=lax.stop_gradient(keys.v))


def precise(tokens: Any) -> Any:
    """Queries or keys in f32."""
    return jax.tree.map(lambda z: z.astype(jnp.float32) if z.ndim == 4 else z, tokens)


def as_before(tokens: Any, before: Any) -> Any:
    """The same arrays, in the dtypes of ``before``."""
    return jax.tree.map(lambda z, old: z.astype(old.dtype), tokens, before)


def part_of(rule: Rule) -> Rule:
    """The rule for a part of an attention: its heads are tapped when they are complete."""
    return dataclasses.replace(rule, taps=tuple(t for t in rule.taps if t[0] != "heads"))


def attend_densely(
    queries: Queries, rule: Rule, *seen: tuple[Keys, Pattern]
) -> tuple[Array, Array, Array]:
    """`blockwise.attend_sets`, literally, and ``probs`` [B H N M] with the sets side by side."""
    sets = ((queries, k, rule.restrict(pattern).allowed(queries, k)) for k, pattern in seen)
    return matching.attend_densely(rule, *sets)


def join(*attended: tuple[Array, Array]) -> tuple[Array, Array]:
    """One attention from its ``(out, lse)`` over disjoint sets of keys, as `blockwise.attend` gives
    them: ``out`` [B N H E] in the dtype of the first, ``lse`` [B H N]."""
    outs, lses = zip(*attended)
    out, lse = parts.merge(outs, (jnp.swapaxes(z, -1, -2) for z in lses))
    return out.astype(outs[0].dtype), jnp.swapaxes(lse, -1, -2)


def number(seg: Array, length: int, last: Array, count: Array) -> tuple[Array, Array]:
    """Numbers the segments of ``length`` tokens that documents fall into, counted from the first
    token of each: [B N] -> [B N], the running one 0, later ones 1, 2, ..., empty slots −1.

    ``last`` [B] is the document of the token before the call (< 0: none) and ``count`` [B] the
    tokens of its segment so far, whose next value is returned too.
    """
    full = seg >= 0
    place = jnp.cumsum(full, 1)
    index = lax.cummax(jnp.where(full, jnp.arange(seg.shape[1]), -1), axis=1)
    before = jnp.pad(index[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    known = jnp.take_along_axis(seg, jnp.maximum(before, 0), 1)
    start = full & (seg != jnp.where(before >= 0, known, last[:, None]))
    base = lax.cummax(jnp.where(start, place - 1, -count[:, None]), axis=1)
    rank = place - 1 - base
    first = full & (rank % length == 0)
    count = jnp.where(rank[:, -1] < 0, 0, rank[:, -1] % length + 1)
    return jnp.where(full, jnp.cumsum(first, 1), -1), count


def count_pairs(length: int, segment: int, memory: int) -> int:
    """(query, key) pairs of ``length`` tokens of one document, each of which sees what its segment
    holds so far and ``memory`` tokens before the segment."""
    whole, rest = divmod(length, segment)
    pairs = whole * segment * (segment + 1) // 2 + rest * (rest + 1) // 2
    filling = min(whole, -(-memory // segment))
    pairs += segment * segment * filling * (filling - 1) // 2
    pairs += segment * memory * (whole - filling)
    return pairs + rest * min(memory, whole * segment)
