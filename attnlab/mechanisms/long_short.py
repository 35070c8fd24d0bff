"""Transformer-LS: a window of tokens, and a learned summary of every segment."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Pattern, Result
from attnlab.engines import blockwise, pooling, segments
from attnlab.errors import UserError
from attnlab.mechanisms.window import Near
from attnlab.refusals import refuse_normaliser
from attnlab.registry import register


@register
@dataclass(frozen=True)
class LongShort(Mechanism):
    """A window of tokens and ``rank`` learned means of every other segment, in one softmax.

        P_g = softmax over the tokens of segment g of k W,   k̄_gr = Σ_t P_gtr k_t, v̄ likewise
        out_i = softmax over {j : |i−j| < window} of q·LN(k_j) and {g ≠ ⌊i/ℓ⌋} of q·LN'(k̄_gr)

    with ℓ = ``segment`` and W [G D rank] learned; LN, LN' are layer norms of keys and values, apart
    for tokens and summaries, because a mean is shorter than what it averages. A causal rule leaves
    the segments before the query's own, so a window >= ℓ leaves no gap. Tokens of the window are in
    the summaries too, as published. Shapes: queries [B N H D], keys [B M G D], values [B M G E] ->
    [B N H E]. Cost: O(N (window + rank N / ℓ) (D + E)) time, O(N rank) memory; decoding keeps all
    keys. Raises `UserError` for a segment, rank or window < 1.
    Source: Zhu et al., arXiv 2107.02192.
    """

    segment: int = 16
    rank: int = 1
    window: int = 256

    cost = Cost(time=2, memory=1, state=1)

    def __post_init__(self):
        if min(self.segment, self.rank, self.window) < 1:
            raise UserError(f"long_short: {self}; use segment, rank and window >= 1")

    @property
    def relative(self) -> bool:
        return False

    def init(self, key: Array, dims: Dims):
        def norm() -> dict[str, Array]:
            return {"key": jnp.ones(dims.key_dim), "value": jnp.ones(dims.value_dim)}

        shape = (dims.kv_heads, dims.key_dim, self.rank)
        weight = dims.key_dim**-0.5 * jax.random.normal(key, shape)
        return {"pool": weight, "near": norm(), "far": norm()}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("long_short", rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        tile = max(64, 1 << (self.window // 2).bit_length())
        out, lse = blockwise.attend_sets(
            queries, rule, tile, *self._seen(params, keys, pooling.attended)
        )
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("long_short", rule)
        seen = self._seen(params, keys, pooling.attended_densely)
        out, lse, probs = segments.attend_densely(queries, rule, *seen)
        return Result(out, state, {"lse": lse, "probs": probs})

    def _seen(self, params, keys: Keys, pool: Callable) -> tuple[tuple[Keys, Pattern], ...]:
        keys = keys.cleared()
        score = jnp.einsum("bmgd,gdr->bmgr", keys.k.astype(jnp.float32), params["pool"])
        sets = pool(keys, self.segment, score)
        far = pooling.parts_of(tuple(z._replace(count=None) for z in sets))
        return (
            (_normed(keys, params["near"]), Near(self.window)),
            (_normed(far, params["far"]), pooling.Elsewhere(self.segment)),
        )

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        groups = -(-length // self.segment)
        near = min(self.window, length)
        pairs = near * (near + 1) // 2 + (length - near) * near
        far = length * (groups - 1) * self.rank
        if causal:
            rest = length - (groups - 1) * self.segment
            far = self.rank * (
                self.segment * (groups - 1) * (groups - 2) // 2 + rest * (groups - 1)
            )
        else:
            pairs = 2 * pairs - length
        pooled = 2.0 * length * dims.kv_heads * self.rank * (2 * dims.key_dim + dims.value_dim)
        return pooled + 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * (pairs + far)

    @classmethod
    def examples(cls):
        return (cls(segment=4, rank=2, window=6),)


def _normed(keys: Keys, scale: dict[str, Array]) -> Keys:
    """Layer-normed keys and values, without an offset."""

    def norm(z: Array, scale: Array) -> Array:
        z32 = z.astype(jnp.float32)
        z32 -= jnp.mean(z32, -1, keepdims=True)
        power = jnp.mean(z32 * z32, -1, keepdims=True)
        return (z32 * jax.lax.rsqrt(power + 1e-6) * scale).astype(z.dtype)

    return keys._replace(k=norm(keys.k, scale["key"]), v=norm(keys.v, scale["value"]))
