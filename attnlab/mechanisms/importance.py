"""Attention in which a token weighs the same for whoever asks."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import recurrent, running
from attnlab.engines.recurrent import quotient, with_one
from attnlab.errors import UserError
from attnlab.mechanisms.linear import rotated
from attnlab.mechanisms.slots import scale_of
from attnlab.refusals import refuse_bias, refuse_every_normaliser, refuse_taps
from attnlab.registry import register


class State(NamedTuple):
    """The highest score so far, and the weighted sum of [v, 1], [B H 1 E + 1], scaled by it."""

    top: running.Top
    sums: recurrent.State


@register
@dataclass(frozen=True)
class Importance(Mechanism):
    """A mean of the past in which each token weighs by a score of its own, for whoever asks.

        s_j = SiLU(q_j)·k_j / √D,   out_i = Σ_j e^(s_j) v_j / Σ_j e^(s_j)   over the visible keys

    No query meets another token's key: all that a query sees depends on how far it may look. Both
    directions at once give one mean for all tokens of a document. Rotations are applied before the
    SiLU, so with rope a score depends on where its token is.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N C E) time in chunks of C = ``chunk`` tokens, O(N) memory; the decoding state is E + 2
    numbers for each head. Raises `UserError` for a chunk < 1 and, when called, for biased
    positions, normalisers and taps on logits.
    Source: the Non-approximate form of "Deconstructing Attention", arXiv 2510.11602.
    """

    chunk: int = 64

    cost = Cost(time=1, memory=1, state=0)
    isotropic = False

    def __post_init__(self):
        if self.chunk < 1:
            raise UserError(f"importance: chunk={self.chunk}; use chunk >= 1")

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        return State(
            running.initial_top(batch, dims.heads, 1),
            recurrent.initial_state(batch, dims.heads, 1, dims.value_dim + 1),
        )

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        scores = _scores(queries, keys, rule)
        v, seg = _of_heads(keys, scores), keys.seg
        one, after = jnp.ones_like(scores), state
        if rule.causal:
            top, sums = state or ((), ())
            weight, decay, _, top = running.rescale(scores, seg, top)
            options = {"key_decay": decay, "chunk": self.chunk, "kernels": rule.kernels}
            out, sums = recurrent.attend(one, weight, v, seg, sums, **options, mean=True)
            after = State(top, sums)
        else:
            weight, _ = running.rescale_both_ways(scores, seg)
            out = quotient(recurrent.attend_both_ways(one, weight, with_one(v), seg, self.chunk))
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, after if state else state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        scores = _scores(queries, keys, rule)
        seen = rule.allowed(queries, keys)[..., None]
        weight = jax.nn.softmax(jnp.where(seen, scores[:, None, ..., 0], MASK), 2)
        weight = jnp.where(seen, weight, 0)  # [B N M H]
        out = jnp.einsum("bnmh,bmhe->bnhe", weight, _of_heads(keys, scores).astype(jnp.float32))
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        sums = dims._replace(kv_heads=dims.heads, key_dim=1, value_dim=dims.value_dim + 1)
        own = 2.0 * length * dims.heads * dims.key_dim
        return own + recurrent.count_flops(sums, length, self.chunk, causal)

    @classmethod
    def examples(cls):
        return (cls(chunk=8),)


def _scores(queries: Queries, keys: Keys, rule: Rule) -> Array:
    """s [B N H 1], f32."""
    refuse_every_normaliser("importance", rule)
    refuse_bias("importance", rule)
    refuse_taps("importance", rule)
    q, k = rotated(queries, keys, rule)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
    return jnp.einsum("bnhd,bnhd->bnh", jax.nn.silu(q), k)[..., None] * scale_of(rule, q)


def _of_heads(keys: Keys, scores: Array) -> Array:
    """Values [B N H E]: each head weighs those of its kv head in its own way."""
    v = keys.cleared().v
    return jnp.repeat(v, scores.shape[2] // v.shape[2], 2)
