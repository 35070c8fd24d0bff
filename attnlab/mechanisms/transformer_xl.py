"""Segments with a cache of earlier ones."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
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
        out, lse = attend(queries, keys, segments.part_of(rule), self.segment, self.memory)
        return Result(rule.tap("heads", out), state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        keys, state = segments.remember(keys, state)
        keys = keys.cleared()
        seen = rule.restrict(Span(self.segment, -self.memory, self.segment))
        here = rule.restrict(segments.own(self.segment)).allowed(queries, keys)[:, None]
        bare, past = dataclasses.replace(rule, taps=()), segments.stopped(keys)
        z = jnp.where(here, bare.logits(queries, keys), bare.logits(queries, past))
        z = jnp.where(seen.allowed(queries, keys)[:, None], rule.tap("logits", z), MASK)
        probs = rule.tap("probs", jnp.where(z > MASK, jax.nn.softmax(z, -1), 0))
        out = weighted(jnp.where(here, probs, 0), keys.v)
        out += weighted(jnp.where(here, 0, probs), past.v)
        lse = jnp.maximum(jax.nn.logsumexp(z, -1), MASK)
        return Result(
            rule.tap("heads", out.astype(queries.q.dtype)), state, {"lse": lse, "probs": probs}
        )

    def limit(self, length: int):
        return dataclasses.replace(self, segment=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = segments.count_pairs(length, self.segment, self.memory)
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(segment=5, memory=7), cls(segment=8, memory=3))


def attend(
    queries: Queries, keys: Keys, rule: Rule, segment: int, memory: int
) -> tuple[Array, Array]:
    """``(out, lse)`` over the own segment and ``memory`` tokens before it, the latter without a
    gradient."""
    tile, here = segments.tile_of(segment), rule.restrict(segments.own(segment))
    part = blockwise.attend(queries, keys, here, tile)
    if memory == 0:
        return part
    past = rule.restrict(Span(segment, -memory, 0))
    return segments.join(part, blockwise.attend(queries, segments.stopped(keys), past, tile))


def weighted(probs: Array, v: Array) -> Array:
    """Σ_j p_ij v_j, f32: [B H N M], [B M G E] -> [B N H E]."""
    v = jnp.repeat(v.astype(jnp.float32), probs.shape[1] // v.shape[2], 2)
    return jnp.einsum("bhnm,bmhe->bnhe", probs, v)


def _refuse(rule: Rule) -> None:
    refuse_bidirectional("transformer_xl", rule, "its memory is what came before a segment")
    refuse_normaliser("transformer_xl", rule)
