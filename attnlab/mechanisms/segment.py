"""Attention inside segments, and to one mean for each other segment."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from attnlab.core import Cost, Dims, Keys, Mechanism, Pattern, Result
from attnlab.engines import blockwise, pooling, segments
from attnlab.errors import UserError
from attnlab.refusals import refuse_normaliser
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Segment(Mechanism):
    """Exact attention inside segments and to the mean of every other one, in a single softmax.

        out_i = softmax over {j : ⌊j/S⌋ = ⌊i/S⌋} of q·k_j and {s ≠ ⌊i/S⌋} of q·k̄_s + ln c_s

    with S = ``segment`` and k̄_s, v̄_s the means over the c_s tokens of segment s, before rotation
    and at its middle position. ln c_s makes a mean weigh as much as its tokens: a query of 0 gives
    the exact mean of all visible values. A causal rule leaves the segments before the query's own.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N (S + N / S) (D + E)) time, least at S = √N, O(N) memory; decoding keeps all keys.
    Raises `UserError` for a segment < 1. Source: sparse attention with pooled summaries as in
    Zhu & Soricut, arXiv 2107.11906, with one level.
    """

    segment: int = 64

    cost = Cost(time=2, memory=1, state=1)

    def __post_init__(self):
        if self.segment < 1:
            raise UserError(f"segment: segment={self.segment} must be at least 1")

    @property
    def relative(self) -> bool:
        return False

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("segment", rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        tile = segments.tile_of(self.segment)
        means = pooling.mean(keys, self.segment)
        out, lse = blockwise.attend_sets(queries, rule, tile, *self._seen(keys, means))
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("segment", rule)
        means = pooling.mean_densely(keys, self.segment)
        out, lse, probs = segments.attend_densely(queries, rule, *self._seen(keys, means))
        return Result(out, state, {"lse": lse, "probs": probs})

    def _seen(self, keys: Keys, means: Keys) -> tuple[tuple[Keys, Pattern], ...]:
        own, others = segments.own(self.segment), pooling.Elsewhere(self.segment)
        return (keys, own), (means, others)

    def limit(self, length: int):
        return dataclasses.replace(self, segment=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = count_pairs(length, self.segment, causal)
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(segment=5),)


def count_pairs(length: int, segment: int, causal: bool) -> int:
    """Pairs of a query and a token or a mean, of one document."""
    place = np.arange(length, dtype=np.int64)
    own = place % segment + 1 if causal else np.minimum(segment, length - place + place % segment)
    others = place // segment if causal else np.full(length, -(-length // segment) - 1)
    return int(np.sum(own + others))
