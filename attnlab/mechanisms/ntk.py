"""NTK-Attention: a prefix of any length, learned as the two sums that attention needs of it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Cost, Dims, Mechanism, Queries, Result, Rule, count_pairs
from attnlab.engines import dense, ring
from attnlab.engines.segments import part_of
from attnlab.mechanisms.linear import elu_plus_one
from attnlab.refusals import refuse_normaliser
from attnlab.registry import register

FLOOR = -60.0
"""Lowest exponent that is taken out of both sums: e^60 is finite, whatever it multiplies."""


@register
@dataclass(frozen=True)
class Ntk(Mechanism):
    """Softmax attention behind a prefix of any length, which is learned as a matrix and a vector.

        out = (Σ_j e^(z_j) v_j + φ(q) Z) / (Σ_j e^(z_j) + φ(q)·|κ|),
        φ(q) = (elu(q / D^¼) + 1) / √D

    over the visible keys j. A prefix of P keys and values would give Z = Σ_p φ(k_p)ᵀ v_p and
    κ = Σ_p φ(k_p), see `of_prefix`, if φ(q)·φ(k) were e^(q·k / √D): they agree where q and k are 0,
    and differ by a first order of their size. Z [H D E] and κ [H D] are learned instead, to adapt a
    model whose other parameters may be frozen. Both are 0 at the start: softmax attention. Z has
    any sign, so an output is no mean of values. φ takes queries without rotation, since a prefix
    has no position, and 1 / √D, which the paper leaves out, so that φ(0)·φ(0) = 1. A query without
    a visible key gives 0. Shapes: queries [B N H D], keys [B M G D], values [B M G E] ->
    [B N H E]. Cost: O(N M (D + E) + N D E) time whatever the prefix, O(N + M) memory; decoding
    keeps all keys and values. Raises `UserError` when called with a normaliser or position that
    needs whole rows. Source: Liang et al., arXiv 2406.14036.
    """

    cost = Cost(time=2, memory=1, state=1)
    spreads = True

    def init(self, key: Array, dims: Dims):
        shape = (dims.heads, dims.key_dim)
        return {"values": jnp.zeros((*shape, dims.value_dim)), "weights": jnp.zeros(shape)}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("ntk", rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        out, lse = ring.attend(queries, keys, part_of(rule))
        values, total = _prefix(params, queries, rule)
        some, lse = (lse > MASK).swapaxes(1, 2), lse.swapaxes(1, 2)
        top = jax.lax.stop_gradient(jnp.where(some, jnp.maximum(lse, _exponent(total)), 0.0))
        tokens, prefix = jnp.exp(lse - top), jnp.exp(-top)
        mixed = tokens[..., None] * out.astype(jnp.float32) + prefix[..., None] * values
        # A weight of 0 is that of a row far below the floor, before κ has left 0.
        weight = tokens + prefix * total
        weight = jnp.where(some & (weight > 0), weight, 1.0)
        out = jnp.where(some[..., None], mixed / weight[..., None], 0.0)
        lse = jnp.where(some, top + jnp.log(weight), MASK).swapaxes(1, 2)
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("ntk", rule)
        seen, z = rule.allowed(queries, keys)[:, None], rule.logits(queries, keys)
        values, total = (jnp.moveaxis(a, 2, 1) for a in _prefix(params, queries, rule))
        some = jnp.any(seen, -1)
        top = jnp.maximum(jnp.max(z, -1), _exponent(total))
        top = jax.lax.stop_gradient(jnp.where(some, top, 0.0))
        each = jnp.where(seen, jnp.exp(z - top[..., None]), 0.0)
        weight = jnp.sum(each, -1) + jnp.exp(-top) * total
        weight = jnp.where(some & (weight > 0), weight, 1.0)
        probs = rule.tap("probs", each / weight[..., None])
        out = dense.mix(rule, probs, keys.cleared().v.astype(jnp.float32), queries.pos, keys.pos)
        before = jnp.where(some, jnp.exp(-top) / weight, 0.0)[..., None] * values
        out = (out + jnp.moveaxis(before, 1, 2)).astype(queries.q.dtype)
        lse = jnp.where(some, top + jnp.log(weight), MASK)
        return Result(rule.tap("heads", out), state, {"lse": lse, "probs": probs})

    def limit(self, length: int):
        return self

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = (dims.key_dim + dims.value_dim) * count_pairs(length, None, causal)
        return 2.0 * dims.heads * (pairs + length * dims.key_dim * (dims.value_dim + 1))


def features(z: Array, scale: float | None = None) -> Array:
    """φ of [... D]: (elu(z √scale) + 1) / √D, f32, with a scale of 1 / √D unless another is given;
    φ(0)·φ(0) = 1."""
    D = z.shape[-1]
    root = D**-0.25 if scale is None else scale**0.5
    return elu_plus_one(z.astype(jnp.float32) * root) * D**-0.5


def of_prefix(k: Array, v: Array, scale: float | None = None) -> dict[str, Array]:
    """The parameters that a prefix of keys [P H D] and values [P H E] stands for."""
    phi = features(k, scale)
    return {"values": jnp.einsum("phd,phe->hde", phi, v), "weights": jnp.sum(phi, 0)}


def _prefix(params, queries: Queries, rule: Rule) -> tuple[Array, Array]:
    """φ(q) Z [B N H E] and φ(q)·|κ| [B N H], f32; 0 for an empty slot's queries is as good as
    any."""
    weights = params["weights"]
    # Not abs, which has no slope at 0, where learning begins.
    weights = jnp.where(weights < 0, -weights, weights)
    both = jnp.concatenate([params["values"], weights[..., None]], -1)
    found = jnp.einsum("bnhd,hde->bnhe", features(queries.cleared().q, rule.scale), both)
    return found[..., :-1], found[..., -1]


def _exponent(total: Array) -> Array:
    return jnp.maximum(jnp.log(jnp.where(total > 0, total, 1e-30)), FLOOR)
