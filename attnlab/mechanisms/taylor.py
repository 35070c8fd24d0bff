"""Attention whose exponential is cut off after its square: a recurrence, and never negative."""

from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import recurrent, undecayed
from attnlab.engines.recurrent import quotient, with_one
from attnlab.errors import UserError
from attnlab.mechanisms.linear import rotated
from attnlab.mechanisms.slots import scale_of
from attnlab.refusals import refuse_bias, refuse_every_normaliser, refuse_taps
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Taylor(Mechanism):
    """Attention with 1 + s + s²/2 in place of e^s: all positive, and linear in the length.

        s_ij = q_i·k_j / √D,   T = 1 + s + s²/2 >= 1/2,   out_i = Σ_j T_ij v_j / Σ_j T_ij

    over the visible keys. T = φ(q)·φ(k) with the F = (D + 1)(D + 2) / 2 features
        φ(z) = [1, z', z'_a z'_b (a < b), z'_a² / √2],   z' = z D^(-1/4),
    so that it is a recurrence. Near softmax, with an error of s³/6, where logits are small; large
    ones weigh like their squares, whatever their sign.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N F (C + E)) time in chunks of C = ``chunk`` tokens, O(N F E / C) memory; the decoding
    state is one F x (E + 1) matrix for each kv head. Raises `UserError` for a chunk < 1 and, when
    called, for biased positions, normalisers and taps on logits.
    Source: Arora et al., arXiv 2402.18668; the approximate form of "Deconstructing Attention",
    2510.11602, with one denominator, since that of each order alone may be 0.
    """

    chunk: int = 64

    cost = Cost(time=1, memory=1, state=0)
    spreads = True

    def __post_init__(self):
        if self.chunk < 1:
            raise UserError(f"taylor: chunk={self.chunk}; use chunk >= 1")

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        sizes = count_features(dims.key_dim), dims.value_dim + 1
        return recurrent.initial_state(batch, dims.kv_heads, *sizes)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        q, k = _scaled(queries, keys, rule)
        after = state
        if rule.causal:
            options = {"chunk": self.chunk, "mean": True, "features": features}
            out, after = undecayed.attend(q, k, keys.v, keys.seg, state, **options)
        else:
            tokens = features(q), features(k), with_one(keys.cleared().v), keys.seg
            out = quotient(recurrent.attend_both_ways(*tokens, self.chunk))
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, after if state else state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        q, k = _scaled(queries, keys, rule)
        k, v = (jnp.repeat(z, q.shape[2] // z.shape[2], 2) for z in (k, with_one(keys.cleared().v)))
        s = jnp.einsum("bnhd,bmhd->bhnm", q, k)
        weight = jnp.where(rule.allowed(queries, keys)[:, None], 1 + s + s * s / 2, 0)
        out = quotient(jnp.einsum("bhnm,bmhe->bnhe", weight, v)).astype(queries.q.dtype)
        return Result(rule.tap("heads", out), state)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        sums = dims._replace(key_dim=count_features(dims.key_dim), value_dim=dims.value_dim + 1)
        return recurrent.count_flops(sums, length, self.chunk, causal)

    @classmethod
    def examples(cls):
        return (cls(chunk=8),)


def count_features(dim: int) -> int:
    return (dim + 1) * (dim + 2) // 2


def features(z: Array) -> Array:
    """φ of [... D]: [... F], with φ(a)·φ(b) = 1 + a·b + (a·b)² / 2."""
    D = z.shape[-1]
    # Pairs by their distance: slices, where a gather would make the gradient a scatter.
    pairs = [z[..., far:] * z[..., : D - far] for far in range(1, D)]
    return jnp.concatenate([jnp.ones_like(z[..., :1]), z, z * z * 0.5**0.5, *pairs], -1)


def _scaled(queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
    """Queries and keys, turned, whose products are the logits: f32."""
    refuse_every_normaliser("taylor", rule)
    refuse_bias("taylor", rule)
    refuse_taps("taylor", rule)
    q, k = rotated(queries, keys, rule)
    root = scale_of(rule, q) ** 0.5
    return q * root, k * root
