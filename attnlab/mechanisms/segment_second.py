"""Attention inside segments, and a second attention to the means of the others, through a gate."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Result
from attnlab.engines import blockwise, dense, pooling, segments
from attnlab.errors import UserError
from attnlab.mechanisms.segment import count_pairs
from attnlab.registry import register


@register
@dataclass(frozen=True)
class SegmentSecond(Mechanism):
    """Attention inside segments, plus tanh(gate) times attention to the mean of every other one.

        near = softmax over {j : ⌊j/S⌋ = ⌊i/S⌋} of q·k_j,  far = that over {s ≠ ⌊i/S⌋} of
        q·k̄_s + ln c_s,  out = near + tanh(g) far

    with S = ``segment``, k̄_s, v̄_s the means over the c_s tokens of segment s, before rotation and
    at its middle position, and g learned per head, 0 at first: then far segments do not exist.
    Unlike in one softmax over both, near and far do not compete: weights sum to 1 + tanh(g). A
    causal rule leaves the segments before the query's own. Taps on "logits" and "probs" are called
    twice, near and far. Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N (S + N / S) (D + E)) time, O(N) memory; decoding keeps all keys. Raises `UserError`
    for a segment < 1. Source: segments as in Qiu et al., arXiv 1911.02972; the second attention is
    this laboratory's.
    """

    segment: int = 64

    cost = Cost(time=2, memory=1, state=1)

    def __post_init__(self):
        if self.segment < 1:
            raise UserError(f"segment_second: segment={self.segment} must be at least 1")

    @property
    def relative(self) -> bool:
        return False

    def init(self, key: Array, dims: Dims):
        return {"gate": jnp.zeros(dims.heads)}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        def attend(keys: Keys, pattern):
            tile = segments.tile_of(self.segment)
            return blockwise.attend(queries, keys, inner.restrict(pattern), tile)

        inner = segments.part_of(rule)
        near, _ = attend(keys, segments.own(self.segment))
        far, _ = attend(pooling.mean(keys, self.segment), pooling.Elsewhere(self.segment))
        return Result(rule.tap("heads", _gated(params, near, far)), state, {})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        inner, keys = segments.part_of(rule), keys.cleared()
        near, _, probs = dense.attend(queries, keys, inner.restrict(segments.own(self.segment)))
        far = inner.restrict(pooling.Elsewhere(self.segment))
        far, _, far_probs = dense.attend(queries, pooling.mean_densely(keys, self.segment), far)
        gate = jnp.tanh(params["gate"])[:, None, None]
        probs = jnp.concatenate([probs, gate * far_probs], -1)
        return Result(rule.tap("heads", _gated(params, near, far)), state, {"probs": probs})

    def limit(self, length: int):
        return dataclasses.replace(self, segment=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = count_pairs(length, self.segment, causal)
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(segment=5),)


def _gated(params, near: Array, far: Array) -> Array:
    return near + (jnp.tanh(params["gate"])[:, None] * far).astype(near.dtype)
