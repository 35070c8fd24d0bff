"""Attention inside segments, plus a projection of the mean of all others."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Cost, Dims, Mechanism, Result
from attnlab.engines import blockwise, dense, matching, pooling, segments
from attnlab.errors import UserError
from attnlab.registry import register


@register
@dataclass(frozen=True)
class SegmentPool(Mechanism):
    """Attention inside segments, plus a learned projection of the mean value of all other segments.

        out_i = softmax_{j : ⌊j/S⌋ = ⌊i/S⌋}(q·k_j) v_j + m W,   m = mean{v_j : ⌊j/S⌋ ≠ ⌊i/S⌋}

    with S = ``segment`` and W [H E E] learned, 0 at first: then far segments do not exist. A causal
    rule leaves the segments before the query's own. The context is the same for all tokens of a
    segment, whatever they ask: cheap, and blind to where things stand. Taps on "logits" and "probs"
    see the part inside. Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N S (D + E) + N E²) time, O(N) memory; decoding keeps all keys. Raises `UserError` for a
    segment < 1. Source: segments as in Qiu et al., arXiv 1911.02972; the projected mean is this
    laboratory's.
    """

    segment: int = 64

    cost = Cost(time=1, memory=1, state=1)

    def __post_init__(self):
        if self.segment < 1:
            raise UserError(f"segment_pool: segment={self.segment} must be at least 1")

    @property
    def relative(self) -> bool:
        return False

    def init(self, key: Array, dims: Dims):
        return {"out": jnp.zeros((dims.heads, dims.value_dim, dims.value_dim))}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        inner, size = segments.part_of(rule).restrict(segments.own(self.segment)), self.segment
        near, _ = blockwise.attend(queries, keys, inner, segments.tile_of(size))
        keys = keys.cleared()
        groups = pooling.group(keys, size)
        value = pooling.total(keys.v.astype(jnp.float32), groups.number)
        others = _before(groups, value)
        if not rule.causal:
            behind = _before(groups, value, reverse=True)
            others = jax.tree.map(jnp.add, others, behind)
        slot = matching.locate(_middle(queries.pos, size), queries.seg, groups.pos, groups.seg)
        count, value = segments.take(others, jnp.maximum(slot, 0))
        count = jnp.where(slot >= 0, count, 0)[..., None, None]
        mean = jnp.where(count > 0, value / jnp.maximum(count, 1), 0)
        return Result(rule.tap("heads", near + _projected(params, mean, near)), state, {})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        inner = segments.part_of(rule).restrict(segments.own(self.segment))
        near, _, probs = dense.attend(queries, keys, inner)
        keys = keys.cleared()
        place, own = keys.pos[:, None] // self.segment, queries.pos[..., None] // self.segment
        other = (queries.seg[..., None] == keys.seg[:, None]) & (keys.seg >= 0)[:, None]
        other &= place < own if rule.causal else place != own
        other = other.astype(jnp.float32)
        count = jnp.maximum(jnp.sum(other, -1), 1)[..., None, None]
        mean = jnp.einsum("bnm,bmge->bnge", other, keys.v.astype(jnp.float32)) / count
        out = rule.tap("heads", near + _projected(params, mean, near))
        return Result(out, state, {"probs": probs})

    def limit(self, length: int):
        return dataclasses.replace(self, segment=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        size = min(self.segment, length)
        whole, rest = divmod(length, size)
        pairs = whole * size**2 + rest**2
        pairs = (pairs + length) // 2 if causal else pairs
        projected = 2.0 * length * dims.heads * dims.value_dim**2
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs + projected

    @classmethod
    def examples(cls):
        return (cls(segment=5),)


def _middle(pos: Array, size: int) -> Array:
    """Where the group of a position stands, see `pooling.group`."""
    return pos // size * size + (size - 1) // 2


def _before(groups: pooling.Groups, value: Array, reverse: bool = False) -> tuple[Array, Array]:
    """Tokens [B M] and their summed values [B M G E] in the groups of the same document before each
    group, or behind it. A sum starts anew with a document: what is subtracted again leaves a
    rounding error as large as the other document's values."""
    side = -1 if reverse else 1
    neighbour = jnp.roll(groups.seg, side, 1)
    edge = jnp.arange(groups.seg.shape[1]) == (groups.seg.shape[1] - 1 if reverse else 0)
    fresh = edge | (groups.seg != neighbour)

    def shifted(z: Array) -> Array:
        return jnp.where(_like(fresh, z), 0, jnp.roll(z, side, 1))

    def add(a, b):
        return a[0] | b[0], *(jnp.where(_like(b[0], y), y, x + y) for x, y in zip(a[1:], b[1:]))

    terms = fresh, shifted(groups.count), shifted(value)
    return lax.associative_scan(add, terms, reverse=reverse, axis=1)[1:]


def _like(mask: Array, z: Array) -> Array:
    return mask.reshape(*mask.shape, *[1] * (z.ndim - mask.ndim))


def _projected(params, mean: Array, near: Array) -> Array:
    wide = jnp.repeat(mean, near.shape[2] // mean.shape[2], 2)
    return jnp.einsum("bnhe,hef->bnhf", wide, params["out"]).astype(near.dtype)
