"""Documents cut into segments of equally many tokens, by position and never by place in a call:
which keys a segment sees, and what a memory keeps of them."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Keys, Pattern, Rule
from attnlab.engines import parts


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
    place, slots = jax.lax.top_k(place, length)
    kept = take(keys, slots[:, ::-1])
    return kept._replace(seg=jnp.where(place[:, ::-1] >= 0, kept.seg, -1))


def take(tokens, slots: Array):
    """The tokens [B M ...] of any pytree at ``slots`` [B L]."""

    def one(z: Array) -> Array:
        return jnp.take_along_axis(z, slots.reshape(slots.shape + (1,) * (z.ndim - 2)), 1)

    return jax.tree.map(one, tokens)


def remember(keys: Keys, state) -> tuple[Keys, Keys | tuple[()]]:
    """All keys in sight, and the newest of them, as many as ``state`` holds; without a state, the
    keys as they are."""
    if not state:
        return keys, state
    keys = state.extended(keys)
    return keys, newest(keys, state.pos.shape[1])


def stopped(keys: Keys) -> Keys:
    """The same tokens, through which no gradient flows."""
    return keys._replace(k=jax.lax.stop_gradient(keys.k), v=jax.lax.stop_gradient(keys.v))


def part_of(rule: Rule) -> Rule:
    """The rule for a part of an attention: its heads are tapped when they are complete."""
    return dataclasses.replace(rule, taps=tuple(t for t in rule.taps if t[0] != "heads"))


def join(*attended: tuple[Array, Array]) -> tuple[Array, Array]:
    """One attention from its ``(out, lse)`` over disjoint sets of keys, as `blockwise.attend` gives
    them: ``out`` [B N H E] in the dtype of the first, ``lse`` [B H N]."""
    outs, lses = (jnp.stack(z) for z in zip(*attended))
    out, lse = parts.merge(outs, jnp.swapaxes(lses, -1, -2))
    return out.astype(outs.dtype), jnp.swapaxes(lse, -1, -2)


def count_pairs(length: int, segment: int, memory: int) -> int:
    """(query, key) pairs of ``length`` tokens of one document, each of which sees what its segment
    holds so far and ``memory`` tokens before the segment."""
    whole, rest = divmod(length, segment)
    pairs = whole * segment * (segment + 1) // 2 + rest * (rest + 1) // 2
    filling = min(whole, -(-memory // segment))
    pairs += segment * segment * filling * (filling - 1) // 2
    pairs += segment * memory * (whole - filling)
    return pairs + rest * min(memory, whole * segment)
