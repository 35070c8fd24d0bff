"""Shortening inside a layer: exact near by, attention among groups of tokens for what is far."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Pattern, Queries, Result
from attnlab.engines import blockwise, matching, pooling, segments
from attnlab.errors import UserError
from attnlab.refusals import refuse_normaliser
from attnlab.registry import register


@dataclass(frozen=True)
class Outside(Pattern):
    """What a span does not show."""

    span: segments.Span

    def visible(self, q_pos, k_pos):
        return ~self.span.visible(q_pos, k_pos)

    def reaches(self, q_low, q_high, k_low, k_high):
        low, high = (pos // self.span.segment * self.span.segment for pos in (q_low, q_high))
        return (k_low < high + self.span.first) | (k_high >= low + self.span.last)


@register
@dataclass(frozen=True)
class Hourglass(Mechanism):
    """Groups of f tokens attend to groups, and pass what they find down to f tokens each.

    With f = ``factor``, w = ``near``, J = ⌊i/f⌋ and c_J the tokens in the mean k̄_J, v̄_J over
    positions (J−1)f < t <= Jf, which is shifted so that a group ends where its readers begin:
        near_i = {exp(q_i·k_j) : (J−w)f < j <= (J+w+1)f},  far_J = {c_I exp(q̄_J·k̄_I) : other I},
        out_i = Σ over near_i and far_J of weight v / Σ weight,    q̄_J = k̄_J W
    Every visible token is covered once: where q and W are 0, the output is the exact mean of all
    visible values. Groups ask with what is known of them at any later time: their mean key, 0 for
    a group that ends before its document begins; W is learned. Groups are rotated and masked at
    their last position Jf. The published form shortens whole layers, with projections and MLP of
    their own, and adds the result to the residual; its causal shift is the one used here.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(((N / f)² + N w f) (D + E) + N D²) time, O(N) memory; decoding keeps all keys. Raises
    `UserError` for factor < 1 or near < 1. Source: Nawrot et al., arXiv 2110.13711.
    """

    factor: int = 4
    near: int = 16

    cost = Cost(time=2, memory=1, state=1)

    def __post_init__(self):
        if min(self.factor, self.near) < 1:
            raise UserError(f"hourglass: {self}; use factor >= 1 and near >= 1")

    @property
    def relative(self) -> bool:
        return False

    @property
    def span(self) -> segments.Span:
        """The tokens that are seen as they are."""
        f, w = self.factor, self.near
        return segments.Span(f, 1 - w * f, (w + 1) * f + 1)

    def init(self, key: Array, dims: Dims):
        shape = (dims.heads, dims.key_dim, dims.key_dim)
        return {"query": dims.key_dim**-0.5 * jax.random.normal(key, shape)}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("hourglass", rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        inner, f = segments.part_of(rule), self.factor
        tile = segments.tile_of(2 * self.near * f)
        near = blockwise.attend(queries, keys, inner.restrict(self.span), tile)
        coarse = pooling.mean(keys._replace(pos=keys.pos + f - 1), f)
        coarse = coarse._replace(pos=coarse.pos // f * f)
        groups = pooling.group(Keys(queries.q, queries.q, queries.pos, queries.seg), f)
        pos = groups.pos // f * f
        slot = matching.locate(pos, groups.seg, coarse.pos, coarse.seg)
        mean = segments.take(coarse.k, jnp.maximum(slot, 0))
        mean = jnp.where((slot >= 0)[..., None, None], mean, 0)
        asking = Queries(_ask(params, mean, queries), pos, groups.seg)
        far = blockwise.attend(asking, coarse, inner.restrict(Outside(self.span)))
        # Tokens of one group share what it found.
        number = jnp.where(groups.number >= 0, groups.number, 0)
        out, lse = segments.take((far[0], far[1].swapaxes(1, 2)), number)
        lse = jnp.where(groups.number[..., None] >= 0, lse, near[1].swapaxes(1, 2))
        out, lse = segments.join(near, (out, lse.swapaxes(1, 2)))
        return Result(rule.tap("heads", out), state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("hourglass", rule)
        keys, f = keys.cleared(), self.factor
        full = (keys.seg >= 0)[:, None]
        place = (keys.pos + f - 1) // f

        def members(pos: Array, seg: Array) -> Array:
            """[B L], groups and documents -> which keys belong there [B L M]."""
            same = (seg[..., None] == keys.seg[:, None]) & full
            return (same & (pos[..., None] == place[:, None])).astype(jnp.float32)

        def mean(z: Array, among: Array) -> Array:
            count = jnp.maximum(jnp.sum(among, -1), 1)[..., None, None]
            total = jnp.einsum("blm,bmgd->blgd", among, z.astype(jnp.float32))
            return (total / count).astype(z.dtype)

        among = members(place, keys.seg)
        later = among.astype(bool) & (keys.pos[:, None] > keys.pos[..., None])
        speaks = full[:, 0] & ~jnp.any(later, -1)  # one token of a group stands for it
        k, v = mean(keys.k, among), mean(keys.v, among)
        coarse = Keys(k, v, place * f, keys.seg, jnp.sum(among, -1))
        own = queries.pos // f
        asking = members(own, queries.seg)
        asks = Queries(_ask(params, mean(keys.k, asking), queries), own * f, queries.seg)
        q_pos = queries.pos[..., None]
        near = self.span.visible(q_pos, keys.pos[:, None])
        far = speaks[:, None] & ~self.span.visible(q_pos, coarse.pos[:, None])
        parts = (queries, keys, near), (asks, coarse, far)
        out, lse, probs = matching.attend_densely(rule, *parts)
        return Result(out, state, {"lse": lse, "probs": probs})

    def limit(self, length: int):
        return dataclasses.replace(self, near=-(-length // self.factor))

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = count_pairs(length, self.factor, self.near, causal)
        asking = length * dims.heads * dims.key_dim**2  # as many slots as if no token had company
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs + 2.0 * asking

    @classmethod
    def examples(cls):
        return (cls(factor=3, near=2),)


def _ask(params, mean: Array, queries: Queries) -> Array:
    """q̄ [B N H D] of groups with the mean keys [B N G D], in the dtype of the queries."""
    wide = jnp.repeat(mean.astype(jnp.float32), queries.q.shape[2] // mean.shape[2], 2)
    return jnp.einsum("bnhd,hde->bnhe", wide, params["query"]).astype(queries.q.dtype)


def count_pairs(length: int, factor: int, near: int, causal: bool) -> int:
    """Pairs of a query and a token or of two groups, of one document."""
    place = np.arange(length, dtype=np.int64)
    base = place // factor * factor
    low = np.maximum(0, base + 1 - near * factor)
    high = place + 1 if causal else np.minimum(length, base + (near + 1) * factor + 1)
    pairs = int(np.sum(high - low))
    groups = -(-length // factor)
    own = np.arange(groups, dtype=np.int64)
    pairs += int(np.sum(np.maximum(0, own - near + 1)))
    if not causal:
        last = -(-(length - 1) // factor)
        pairs += int(np.sum(np.maximum(0, last - own - near - 1)))
    return pairs
