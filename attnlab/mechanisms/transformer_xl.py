"""Segments with a cache of earlier ones."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.core import Cost, Dims, Keys, Mechanism, Pattern, Result, Rule
from attnlab.engines import blockwise, segments
from attnlab.engines.segments import Span
from attnlab.errors import UserError
from attnlab.refusals import refuse_bidirectional, refuse_normaliser
from attnlab.registry import register


@register
@dataclass(frozen=True)
class TransformerXL(Mechanism):
    """Segments of tokens that also see a cache of earlier ones, without a gradient into it.

    With s_i = ⌊i / segment⌋ segment the first position of the query's segment:
        out_i = softmax over {j : s_i <= j <= i} of own keys and {j : s_i − memory <= j < s_i} of
        stop_gradient(k_j), stop_gradient(v_j).
    The published cache holds the hidden states of a layer, this one their keys and values, so that
    the projections get no gradient through the memory either. Relative distances and their biases
    are the position module's. Shapes: queries [B N H D], keys [B M G D], values [B M G E] ->
    [B N H E]. Cost: O(N (segment + memory) (D + E)) time, O(N) memory; the state holds the newest
    memory + segment − 1 tokens of the document; context grows by ``memory`` a layer. Raises
    `UserError` for a segment < 1, a memory < 0, a bidirectional rule.
    Source: Dai et al., arXiv 1901.02860.
    """

    segment: int = 256
    memory: int = 256

    cost = Cost(time=1, memory=1, state=0)
    carries = True

    def __post_init__(self):
        if self.segment < 1 or self.memory < 0:
            raise UserError(
                f"transformer_xl: segment={self.segment}, memory={self.memory}; "
                "use segment >= 1 and memory >= 0"
            )

    @property
    def relative(self) -> bool:
        return False

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> Keys:
        return Keys.empty(dims, batch, self.memory + self.segment - 1, dtype)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        keys, state = segments.remember(keys, state)
        tile = segments.tile_of(self.segment)
        out, lse = blockwise.attend_sets(queries, rule, tile, *self._seen(keys))
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        keys, state = segments.remember(keys, state)
        out, lse, probs = segments.attend_densely(queries, rule, *self._seen(keys))
        return Result(out, state, {"lse": lse, "probs": probs})

    def _seen(self, keys: Keys) -> tuple[tuple[Keys, Pattern], ...]:
        cached = segments.stopped(keys), Span(self.segment, -self.memory, 0)
        return (keys, segments.own(self.segment)), *((cached,) if self.memory else ())

    def limit(self, length: int):
        return dataclasses.replace(self, segment=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = segments.count_pairs(length, self.segment, self.memory)
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(segment=5, memory=7), cls(segment=8, memory=3))


def _refuse(rule: Rule) -> None:
    refuse_bidirectional("transformer_xl", rule, "its memory is what came before a segment")
    refuse_normaliser("transformer_xl", rule)
