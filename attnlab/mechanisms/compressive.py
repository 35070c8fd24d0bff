"""Segments with a cache of earlier ones, and of still earlier ones at a coarser grain."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Pattern, Queries, Result, Rule
from attnlab.engines import blockwise, segments
from attnlab.engines.segments import Span
from attnlab.errors import UserError, did_you_mean
from attnlab.refusals import refuse_bidirectional, refuse_normaliser
from attnlab.registry import register

POOLS = ("conv", "mean")


class State(NamedTuple):
    """The newest tokens, and the newest groups of tokens as one each."""

    recent: Keys
    coarse: Keys


@register
@dataclass(frozen=True)
class Compressive(Mechanism):
    """A cache of earlier segments, and before it a first-in-first-out store of compressed tokens.

    With s the first position of a query's segment, groups of ``rate`` tokens by position, and
    f(group) = Σ_r k_r W_r for keys and alike for values (pool "conv"; or their mean):
        softmax over the own segment s <= j <= i, stopped tokens s − memory <= j < s, and the
        ``compressed`` newest f(group) that lie before s − memory, as tokens at the groups' centres.
    W is trained by the reconstruction of attention alone: with stopped q, k, v and no positions,
        loss = Σ |A(q; oldest segment of the cache) − A(q; f of its groups)|² / (tokens H E),
    of which nothing reaches q, k and v. A group that is not whole (a document seen
    from its middle) is dropped. Shapes: queries [B N H D], keys [B N G D], values [B N G E] ->
    [B N H E]; W [rate G D D] and [rate G E E]. Cost: O(N (segment + memory + compressed) (D + E))
    time, O(N) memory; the state holds memory + segment tokens and compressed + (memory + segment) /
    rate groups. Raises `UserError` for sizes that ``rate`` does not divide, an unknown pool, a
    bidirectional rule. Source: Rae et al., arXiv 1911.05507.
    """

    segment: int = 256
    memory: int = 256
    compressed: int = 256
    rate: int = 4
    pool: str = "conv"

    cost = Cost(time=1, memory=1, state=0)
    carries = True

    def __post_init__(self):
        sizes = self.segment, self.memory
        if self.rate < 1 or self.compressed < 1 or any(z < 1 or z % self.rate for z in sizes):
            raise UserError(
                f"compressive: segment={self.segment}, memory={self.memory}, "
                f"compressed={self.compressed}, rate={self.rate}; use positive sizes, a segment "
                "and a memory that are multiples of the rate"
            )
        if self.pool not in POOLS:
            raise UserError(f"compressive: no pool {self.pool!r}; {did_you_mean(self.pool, POOLS)}")

    @property
    def relative(self) -> bool:
        return False

    def init(self, key: Array, dims: Dims):
        if self.pool == "mean":
            return {}

        def mean(size: int) -> Array:
            shape = self.rate, dims.kv_heads, size, size
            return jnp.broadcast_to(jnp.eye(size) / self.rate, shape)

        return {"key": mean(dims.key_dim), "value": mean(dims.value_dim)}

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> State:
        groups = self.compressed + (self.memory + self.segment) // self.rate
        recent = Keys.empty(dims, batch, self.memory + self.segment - 1, dtype)
        return State(recent, Keys.empty(dims, batch, groups, dtype))

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        recent, after = segments.remember(keys, state.recent if state else ())
        coarse = self._grouped(params, recent, keys.pos.shape[1])
        coarse, groups = segments.remember(coarse, state.coarse if state else ())
        tile = segments.tile_of(self.segment)
        out, lse = blockwise.attend_sets(queries, rule, tile, *self._seen(recent, coarse))
        aux = {"lse": lse}
        if self.pool == "conv":
            before, behind = self._reconstruction(queries, rule, recent, coarse)
            target, _ = blockwise.attend(*before, tile)
            aux["loss"] = _loss(queries, target, *blockwise.attend(*behind, tile))
        return Result(out, State(after, groups) if state else (), aux)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        recent, after = segments.remember(keys, state.recent if state else ())
        coarse = self._at_every_token(params, recent, keys.pos.shape[1])
        coarse, groups = segments.remember(coarse, state.coarse if state else ())
        out, lse, probs = segments.attend_densely(queries, rule, *self._seen(recent, coarse))
        aux = {"lse": lse, "probs": probs}
        if self.pool == "conv":
            everywhere = Span(1, -(2**30), 2**30)  # the pattern stands in the rule already
            before, behind = self._reconstruction(queries, rule, recent, coarse)
            target, *_ = segments.attend_densely(before[0], before[2], (before[1], everywhere))
            guess, found, _ = segments.attend_densely(behind[0], behind[2], (behind[1], everywhere))
            aux["loss"] = _loss(queries, target, guess, found)
        return Result(out, State(after, groups) if state else (), aux)

    def limit(self, length: int):
        return dataclasses.replace(self, segment=-(-length // self.rate) * self.rate)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        """The auxiliary loss, which only training computes, is not counted."""
        pairs = segments.count_pairs(length, self.segment, self.memory)
        reach = self.compressed * self.rate
        through = segments.count_pairs(length, self.segment, self.memory + reach) - pairs
        sizes = dims.key_dim**2 + dims.value_dim**2 if self.pool == "conv" else 0
        pairs += through // self.rate
        attention = 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs
        return attention + 2.0 * length * dims.kv_heads * sizes

    @classmethod
    def examples(cls):
        return (
            cls(segment=4, memory=6, compressed=3, rate=2),
            cls(segment=3, memory=3, compressed=2, rate=3, pool="mean"),
        )

    def _seen(self, recent: Keys, coarse: Keys) -> tuple[tuple[Keys, Pattern], ...]:
        far = -self.memory - self.compressed * self.rate
        return (
            (recent, segments.own(self.segment)),
            (segments.stopped(recent), Span(self.segment, -self.memory, 0)),
            (segments.stopped(coarse), Span(self.segment, far, -self.memory)),
        )

    def _reconstruction(self, queries: Queries, rule: Rule, recent: Keys, coarse: Keys):
        """(queries, keys, rule) of the content that the cache will lose next, whole and in groups.
        A stopped copy of what is compressed, so that the loss reaches ``coarse`` alone."""
        oldest = Span(self.segment, -self.memory, min(self.segment, self.memory) - self.memory)
        bare = Rule(scale=rule.scale, soft_cap=rule.soft_cap).restrict(oldest)
        asking = queries._replace(q=lax.stop_gradient(queries.q))
        return (asking, segments.stopped(recent), bare), (asking, coarse, bare)

    def _grouped(self, params, keys: Keys, new: int) -> Keys:
        """The groups that end in the last ``new`` slots: as many slots as can end there."""
        M, c = keys.pos.shape[1], self.rate
        fresh = jnp.broadcast_to(jnp.arange(M) >= M - new, keys.seg.shape)
        order = jnp.argsort(keys.seg >= 0, axis=1, stable=True)  # empty slots first
        keys, fresh = segments.take((segments.stopped(keys.cleared()), fresh), order)
        first = jnp.maximum(jnp.arange(M) - c + 1, 0)
        whole = (keys.seg[:, first] == keys.seg) & (keys.pos[:, first] == keys.pos - c + 1)
        ends = whole & fresh & (keys.seg >= 0) & (keys.pos % c == c - 1)
        place, ends = lax.top_k(jnp.where(ends, jnp.arange(M), -1), min(M, -(-new // c)))
        place, ends = place[:, ::-1], ends[:, ::-1]
        at = jnp.maximum(ends[..., None] - c + 1 + jnp.arange(c), 0)
        tokens = segments.take(keys, at.reshape(at.shape[0], -1))
        k, v = (z.reshape(*at.shape, *z.shape[2:]) for z in tokens[:2])
        pos, seg = segments.take((keys.pos, keys.seg), ends)
        seg = jnp.where(place >= 0, seg, -1)
        return Keys(*self._pooled(params, k, v), pos - c + 1 + (c - 1) // 2, seg)

    def _at_every_token(self, params, keys: Keys, new: int) -> Keys:
        """The same, literally: a slot for every token, full where a group ends. Needs the tokens of
        a document side by side."""
        M, c = keys.pos.shape[1], self.rate
        keys, last = segments.stopped(keys.cleared()), jnp.arange(M) >= M - new
        groups = [jax.tree.map(lambda z, r=r: jnp.roll(z, c - 1 - r, 1), keys) for r in range(c)]
        whole = last & (keys.seg >= 0) & (keys.pos % c == c - 1) & (jnp.arange(M) >= c - 1)
        for r, group in enumerate(groups):
            whole &= (group.seg == keys.seg) & (group.pos == keys.pos - c + 1 + r)
        k, v = (jnp.stack([group[i] for group in groups], 2) for i in range(2))
        pos = groups[(c - 1) // 2].pos
        return Keys(*self._pooled(params, k, v), pos, jnp.where(whole, keys.seg, -1))

    def _pooled(self, params, k: Array, v: Array) -> tuple[Array, Array]:
        """[B n rate G D] -> [B n G D]."""
        if self.pool == "mean":
            return jnp.mean(k, 2, dtype=jnp.float32), jnp.mean(v, 2, dtype=jnp.float32)
        k, v = (z.astype(jnp.float32) for z in (k, v))
        form = "bnrgd,rgde->bnge"
        return jnp.einsum(form, k, params["key"]), jnp.einsum(form, v, params["value"])


def _loss(queries: Queries, target: Array, guess: Array, found: Array) -> Array:
    """Squared error of the queries for which there is a group (``found`` [B H N], lse), a mean over
    all tokens."""
    error = guess.astype(jnp.float32) - lax.stop_gradient(target.astype(jnp.float32))
    some = jnp.swapaxes(found, 1, 2)[..., None] > MASK
    tokens = jnp.maximum(jnp.sum(queries.seg >= 0), 1)
    return jnp.sum(jnp.where(some, jnp.square(error), 0)) / (tokens * error[0, 0].size)


def _refuse(rule: Rule) -> None:
    refuse_bidirectional("compressive", rule, "its memory is what came before a segment")
    refuse_normaliser("compressive", rule)
