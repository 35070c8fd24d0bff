"""Linformer: keys and values projected along the length to a fixed number of rows."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import recurrent
from attnlab.errors import UserError
from attnlab.mechanisms.linear import rotated
from attnlab.refusals import refuse_bias, refuse_causal, refuse_normaliser, refuse_taps
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Linformer(Mechanism):
    """Softmax over k rows, each a learned mixture of all keys by their position; for encoders.

        K̄ = Eᵀ K,  V̄ = Fᵀ V,   out = softmax(q K̄ᵀ / √D) V̄

    E, F [max_length k] are learned, shared by the heads; row j belongs to the token at position j
    of its document, and a token from ``max_length`` on is not seen. Each document is projected on
    its own: with p = softmax(Σ_j (q·k_j) E_j / √D) and out = Σ_j (p·F_j) v_j both steps are kernel
    sums over the document, so packing costs nothing. A triangular mask cannot make it causal, since
    every row of K̄ holds every token.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N k (D + E)) time, O(N k) memory, 2 k max_length parameters a layer. Raises `UserError`
    for rank, max_length or chunk < 1 and, when called, for more than ``max_length`` tokens, causal
    rules, biased positions and taps on logits. Source: Wang et al., arXiv 2006.04768.
    """

    rank: int = 128
    max_length: int = 4096
    chunk: int = 64

    cost = Cost(time=1, memory=1, state=1)
    isotropic = False

    def __post_init__(self):
        if min(self.rank, self.max_length, self.chunk) < 1:
            raise UserError(f"linformer: {self}; use rank, max_length and chunk >= 1")

    @property
    def relative(self) -> bool:
        return False

    def init(self, key: Array, dims: Dims):
        shape, scale = (self.max_length, self.rank), self.rank**-0.5
        a, b = jax.random.split(key)
        return {
            "keys": scale * jax.random.normal(a, shape),
            "values": scale * jax.random.normal(b, shape),
        }

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        if queries.q.shape[1] != keys.k.shape[1]:  # a few queries: the products of all pairs do
            return self.reference(params, queries, keys, rule, state)
        q, k, v, mix_k, mix_v = self._prepare(params, queries, keys, rule)
        G = k.shape[2]

        def per_head(mix: Array) -> Array:
            return jnp.broadcast_to(mix[:, :, None], (*mix.shape[:2], G, self.rank))

        z = recurrent.attend_both_ways(q, k, per_head(mix_k), keys.seg, self.chunk)
        p = jax.nn.softmax(z, -1)
        out = recurrent.attend_both_ways(p, per_head(mix_v), v, keys.seg, self.chunk)
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        q, k, v, mix_k, mix_v = self._prepare(params, queries, keys, rule)
        own = rule.allowed(queries, keys).astype(jnp.float32)
        repeats = q.shape[2] // k.shape[2]
        short_k = jnp.einsum("bnm,bmr,bmgd->bngrd", own, mix_k, k)
        short_v = jnp.einsum("bnm,bmr,bmge->bngre", own, mix_v, v)
        short_k, short_v = (jnp.repeat(z, repeats, 2) for z in (short_k, short_v))
        p = jax.nn.softmax(jnp.einsum("bnhd,bnhrd->bnhr", q, short_k), -1)
        out = jnp.einsum("bnhr,bnhre->bnhe", p, short_v)
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def _prepare(self, params, queries: Queries, keys: Keys, rule: Rule):
        """Scaled q, k and v in f32, and each token's rows of E and F: [B M k]."""
        refuse_causal(
            "linformer", rule, "each projected key mixes all tokens", ("long_short", "slots")
        )
        refuse_normaliser("linformer", rule)
        refuse_bias("linformer", rule)
        refuse_taps("linformer", rule)
        if keys.k.shape[1] > self.max_length:
            raise UserError(
                f"attention linformer projects at most max_length={self.max_length} tokens, not "
                f"{keys.k.shape[1]}; raise max_length before training"
            )
        q, k = rotated(queries, keys, rule)
        scale = q.shape[-1] ** -0.5 if rule.scale is None else rule.scale
        inside = (keys.seg >= 0) & (keys.pos >= 0) & (keys.pos < self.max_length)
        rows = jnp.where(inside, keys.pos, 0)
        mix_k, mix_v = (
            jnp.where(inside[..., None], jnp.asarray(params[name])[rows], 0)
            for name in ("keys", "values")
        )
        return q * scale, k, keys.cleared().v.astype(jnp.float32), mix_k, mix_v

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        return sum(
            recurrent.count_flops(each, length, self.chunk, causal=False)
            for each in (dims._replace(value_dim=self.rank), dims._replace(key_dim=self.rank))
        )

    @classmethod
    def examples(cls):
        return (cls(rank=6, max_length=2**15, chunk=8),)
