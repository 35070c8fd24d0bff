"""Linear attention that heeds how large the features of a query are."""

from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Mechanism, Result, Rule
from attnlab.engines import recurrent, undecayed
from attnlab.engines.recurrent import quotient, with_one
from attnlab.errors import UserError
from attnlab.mechanisms.linear import elu_plus_one, rotated
from attnlab.mechanisms.slots import scale_of
from attnlab.refusals import refuse_bias, refuse_every_normaliser, refuse_taps
from attnlab.registry import register


@register
@dataclass(frozen=True)
class MagnitudeLinear(Mechanism):
    """Linear attention whose rows sharpen as the query grows: weights β κ − γ, which sum to 1.

        κ_ij = φ(q_i)·φ(k_j) / (n_i √D),   S_i = Σ_j κ_ij,   β_i = 1 + 1 / S_i,   γ_i = S_i / n_i
        out_i = Σ_j (β_i κ_ij − γ_i) v_j

    over the n_i visible keys, φ = elu + 1. That is linear attention, κ / S, in which a factor of
    φ(q) cancels, plus κ less its mean over the keys, which sums to 0 and grows with it; so weights
    may be negative. Rotations are applied before the feature map, so with rope an output depends on
    where both tokens are. Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N (C (D + E) + D E)) time in chunks of C = ``chunk`` tokens, O(N) memory; the decoding
    state is one (D + 1) x (E + 1) matrix for each kv head: Σ [φ(k), 1] [v, 1]ᵀ. Raises `UserError`
    for a chunk < 1 and, when called, for biased positions and taps on logits.
    Source: Fan et al., arXiv 2507.00698; κ divided by n as in their code.
    """

    chunk: int = 64

    cost = Cost(time=1, memory=1, state=0)
    isotropic = False

    def __post_init__(self):
        if self.chunk < 1:
            raise UserError(f"magnitude_linear: chunk={self.chunk}; use chunk >= 1")

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        sizes = dims.key_dim + 1, dims.value_dim + 1
        return recurrent.initial_state(batch, dims.kv_heads, *sizes)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        q, k = (elu_plus_one(z) for z in rotated(queries, keys, rule))
        (B, N, H, _), G = q.shape, k.shape[2]
        tokens = _asking(q, G), with_one(k), with_one(keys.cleared().v), keys.seg
        after = state
        if rule.causal:
            sums, after = undecayed.attend(*tokens, state, chunk=self.chunk)
        else:
            sums = recurrent.attend_both_ways(*tokens, self.chunk)
        out = _weighed(sums.reshape(B, N, G, H // G + 1, -1), scale_of(rule, q))
        out = rule.tap("heads", out.reshape(B, N, H, -1).astype(queries.q.dtype))
        return Result(out, after if state else state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        q, k = (elu_plus_one(z) for z in rotated(queries, keys, rule))
        k, v = (jnp.repeat(z, q.shape[2] // z.shape[2], 2) for z in (k, keys.cleared().v))
        seen = rule.allowed(queries, keys)[:, None]
        n = jnp.maximum(jnp.sum(seen, -1, keepdims=True), 1)
        pairs = jnp.einsum("bnhd,bmhd->bhnm", q, k) * scale_of(rule, q) / n
        kappa = jnp.where(seen, pairs, 0)
        total = jnp.sum(kappa, -1, keepdims=True)
        beta = 1 + 1 / jnp.where(total > 0, total, 1)
        weight = jnp.where(seen, beta * kappa - total / n, 0)
        out = jnp.einsum("bhnm,bmhe->bnhe", weight, v.astype(jnp.float32))
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        wider = dims._replace(
            heads=dims.heads + dims.kv_heads,
            key_dim=dims.key_dim + 1,
            value_dim=dims.value_dim + 1,
        )
        return recurrent.count_flops(wider, length, self.chunk, causal)

    @classmethod
    def examples(cls):
        return (cls(chunk=8),)


def _refuse(rule: Rule) -> None:
    refuse_every_normaliser("magnitude_linear", rule)
    refuse_bias("magnitude_linear", rule)
    refuse_taps("magnitude_linear", rule)


def _asking(q: Array, kv_heads: int) -> Array:
    """[φ(q), 0] of the heads of each kv head, and after them [0, 1], which reads [Σ v, n]: from
    [B N H D], [B N H + G D + 1]."""
    B, N, H, D = q.shape
    q = jnp.pad(q.reshape(B, N, kv_heads, -1, D), [(0, 0)] * 4 + [(0, 1)])
    one = jnp.broadcast_to(jnp.eye(D + 1)[-1], (B, N, kv_heads, 1, D + 1))
    return jnp.concatenate([q, one], 3).reshape(B, N, H + kv_heads, D + 1)


def _weighed(sums: Array, scale: float) -> Array:
    """Outputs [.. R E] from what was read [.. R + 1 E + 1]."""
    read, everything = sums[..., :-1, :], sums[..., -1:, :]
    count = jnp.maximum(everything[..., -1:], 1)
    mean = everything[..., :-1] / count
    return quotient(read) + scale / count * (read[..., :-1] - read[..., -1:] * mean)
