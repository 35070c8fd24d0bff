"""Softmax attention behind short convolutions of queries, keys and values."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Queries, Result, count_pairs
from attnlab.engines import blockwise, dense
from attnlab.errors import UserError
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Convolutional(Mechanism):
    """Exact attention whose queries, keys and values are each convolved with their predecessors.

        z̃_t = Σ_r w_r ∘ z_(t−r),  0 <= r < ``taps``, for z = q, k, v each,   z = 0 before a document
        out = softmax(q̃ k̃ᵀ / √D) ṽ

    w [taps D] (of values [taps E]) is shared by all heads, and 1 at r = 0 and 0 else at first: it
    begins as softmax. The position module turns and biases what was convolved, so that
    ``position=transformer_xl`` makes it relative convolutional multi-head attention (RCMHA, there
    with learned vectors of the distances in place of projected sinusoids), and ``position=none``
    multi-dconv-head attention. As published, keys of a cache are convolved with what was before
    them and queries are not: the first ones of a segment meet zeros, so outputs depend on where a
    sequence is cut. Here both are convolved across the cut. Neighbours are told by their positions:
    tokens are in order, and a position that is missing counts as 0.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N M (D + E)) time, O(N + M) memory; decoding keeps all keys and values as they were
    projected, convolves them again at every call, and keeps the last taps − 1 queries. Raises
    `UserError` for taps < 1. Source: Sugiharto et al., arXiv 2308.03429; So et al., 2109.08668.
    """

    taps: int = 3

    cost = Cost(time=2, memory=1, state=1)
    recalls = True

    def __post_init__(self):
        if self.taps < 1:
            raise UserError(f"convolutional: taps={self.taps}; use taps >= 1")

    def init(self, key: Array, dims: Dims):
        sizes = {"query": dims.key_dim, "key": dims.key_dim, "value": dims.value_dim}
        return {name: jnp.zeros((self.taps, D)).at[0].set(1.0) for name, D in sizes.items()}

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> Queries:
        slots = batch, self.taps - 1
        q = jnp.zeros((*slots, dims.heads, dims.key_dim), dtype)
        return Queries(q, jnp.zeros(slots, jnp.int32), jnp.full(slots, -1, jnp.int32))

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        tokens, state = self._convolved(shifted, params, queries, keys, state)
        out, lse = blockwise.attend(*tokens, rule)
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        tokens, state = self._convolved(looked_up, params, queries, keys, state)
        out, lse, probs = dense.attend(*tokens, rule)
        return Result(out, state, {"lse": lse, "probs": probs})

    def _convolved(self, form, params, queries: Queries, keys: Keys, state: Any):
        """Queries and keys as they meet, and the next state."""
        N, keys = queries.pos.shape[1], keys.cleared()
        joined = (_after(state, queries) if state else queries).cleared()
        q = convolve(form, params["query"], joined.q, joined.pos, joined.seg)[:, -N:]
        k, v = (
            convolve(form, params[name], z, keys.pos, keys.seg)
            for name, z in (("key", keys.k), ("value", keys.v))
        )
        after = _newest(joined, self.taps - 1) if state else state
        return (queries._replace(q=q), keys._replace(k=k, v=v)), after

    def limit(self, length: int):
        return self

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        return (
            2.0 * dims.heads * (dims.key_dim + dims.value_dim) * count_pairs(length, None, causal)
        )

    @classmethod
    def examples(cls):
        return (cls(), cls(taps=4), cls(taps=1))


def convolve(form, w: Array, z: Array, pos: Array, seg: Array) -> Array:
    """Σ_r w_r ∘ z_(t−r) of tokens [B M heads D], in their dtype; ``form`` finds those at t − r."""
    total = w[0] * z.astype(jnp.float32)
    for back in range(1, w.shape[0]):
        total += w[back] * form(z.astype(jnp.float32), pos, seg, back)
    return total.astype(z.dtype)


def shifted(z: Array, pos: Array, seg: Array, back: int) -> Array:
    """For each token the one ``back`` positions before it in its document, from the slot that many
    places before; 0 where that holds another."""

    def moved(a: Array, fill: int) -> Array:
        widths = [(0, 0), (back, 0)] + [(0, 0)] * (a.ndim - 2)
        return jnp.pad(a, widths, constant_values=fill)[:, : a.shape[1]]

    own = (moved(seg, -1) == seg) & (seg >= 0) & (moved(pos, 0) == pos - back)
    return jnp.where(own[..., None, None], moved(z, 0), 0)


def looked_up(z: Array, pos: Array, seg: Array, back: int) -> Array:
    """The same, from wherever it stands."""
    own = (seg[:, :, None] == seg[:, None]) & (seg >= 0)[:, None]
    own &= pos[:, :, None] - back == pos[:, None]
    return jnp.einsum("bnm,bmhd->bnhd", own.astype(jnp.float32), z)


def _after(past: Queries, new: Queries) -> Queries:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], 1), past, new)


def _newest(queries: Queries, count: int) -> Queries:
    """The last full slots, in order, behind empty ones where there are fewer."""
    slots = jnp.where(queries.seg >= 0, jnp.arange(queries.seg.shape[1]), -1)
    slots = jnp.flip(lax.top_k(slots, count)[0], 1)

    def take(z: Array) -> Array:
        at = jnp.maximum(slots, 0)
        return jnp.take_along_axis(z, at.reshape(at.shape + (1,) * (z.ndim - 2)), 1)

    kept = jax.tree.map(take, queries)
    return kept._replace(seg=jnp.where(slots >= 0, kept.seg, -1))
