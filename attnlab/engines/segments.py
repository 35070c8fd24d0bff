"""Documents cut into segments of equally many tokens, by position and never by place in a call:
which keys a segment sees, what a memory keeps of them, and how parts of an attention become one."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Keys, Pattern, Rule


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


def merge(*parts: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention over disjoint sets of keys, from ``(out, lse)`` over each: Σ e^lse out / Σ e^lse.

    ``out`` [B N H E] in the dtype of the first, ``lse`` [B H N] f32; a row that is empty in every
    part stays 0. Cost: O(N) a part.
    """
    lse = jnp.stack([part[1] for part in parts])
    top = jax.lax.stop_gradient(jnp.max(lse, 0))
    weight = jnp.exp(lse - top)
    total = jnp.sum(weight, 0)
    shares = jnp.swapaxes(weight / total, 2, 3)[..., None]
    out = sum(share * part[0].astype(jnp.float32) for share, part in zip(shares, parts))
    lse = jnp.where(top > MASK, top + jnp.log(total), MASK)
    return jnp.asarray(out).astype(parts[0][0].dtype), lse
