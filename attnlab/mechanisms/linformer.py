"""Linformer: keys and values projected along the length to a fixed number of rows."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import documents, kept
from attnlab.engines.blockwise import tile_size
from attnlab.engines.tiling import cut
from attnlab.errors import UserError
from attnlab.mechanisms.linear import rotated
from attnlab.products import collected, mixed, scores
from attnlab.refusals import refuse_bias, refuse_causal, refuse_normaliser, refuse_taps
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Linformer(Mechanism):
    """Softmax over k rows, each a learned mixture of all keys by their position; for encoders.

        K̄ = Eᵀ K,  V̄ = Fᵀ V,   out = softmax(q K̄ᵀ / √D) V̄

    E, F [max_length k] are learned, shared by the heads; row j belongs to the token at position j
    of its document, and a token from ``max_length`` on is not seen. Each document is projected on
    its own, one after the other. A triangular mask cannot make it causal, since every row of K̄
    holds every token.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N k (D + E)) time a document of a row, O(N k) memory, 2 k max_length parameters a layer.
    Raises `UserError` for rank or max_length < 1 and, when called, for more than ``max_length``
    tokens, causal rules, biased positions and taps on logits. Source: Wang et al., arXiv
    2006.04768.
    """

    rank: int = 128
    max_length: int = 4096

    cost = Cost(time=1, memory=1, state=1)
    isotropic = False

    def __post_init__(self):
        if min(self.rank, self.max_length) < 1:
            raise UserError(f"linformer: {self}; use rank and max_length >= 1")

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
        arrays = self._prepare(params, queries, keys, rule)
        out = documents.sum_over(_document, queries.seg, keys.seg, arrays)
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
        sides = (dims.heads + dims.kv_heads) * (dims.key_dim + dims.value_dim)
        return 2.0 * length * self.rank * sides

    @classmethod
    def examples(cls):
        return (cls(rank=6, max_length=2**15),)


def _document(own_q: Array, own_k: Array, arrays) -> Array:
    """The outputs of one document of each row, 0 elsewhere: f32 [B N H E]."""
    q, k, v, mix_k, mix_v = arrays
    short_k, short_v = (_projected(own_k, *pair) for pair in ((mix_k, k), (mix_v, v)))
    return jnp.where(own_q[..., None, None], _attend(q, short_k, short_v), 0)


def _projected(own: Array, mix: Array, z: Array) -> Array:
    """Eᵀ z over the tokens of a document: [B M k], [B M G D] -> [B G k D]."""
    rows = collected(jnp.where(own[..., None], mix, 0), z.reshape(*z.shape[:2], -1))
    return rows.reshape(*rows.shape[:2], *z.shape[2:]).swapaxes(1, 2)


def _attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q kᵀ) v: [B N H D], [B G k D], [B G k E] -> [B N H E].

    A tile of queries meets all rows, then the next one, so that pairs stay in the cache; the
    backward pass makes those of each tile again.
    """
    (B, N, H, D), G = q.shape, k.shape[1]
    size = tile_size(N, B * H)

    @partial(jax.checkpoint, prevent_cse=False)
    def some(q: Array) -> Array:
        q = q.swapaxes(1, 2).reshape(B, G, -1, D)  # heads that share keys are rows of one product
        p = kept.softmax(scores(q, k), jnp.bool_(True), -1)
        return mixed(p, v).reshape(B, H, size, -1).swapaxes(1, 2)

    out = jnp.moveaxis(lax.map(some, cut(q, size, 0)), 0, 1)
    return out.reshape(B, -1, H, v.shape[-1])[:, :N]
