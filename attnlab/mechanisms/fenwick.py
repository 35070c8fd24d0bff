"""Log-linear attention: a decaying memory for every scale of the past, as in a Fenwick tree."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Cost, Dims, Mechanism, Result, Rule
from attnlab.engines import recurrent, report_use
from attnlab.errors import UserError
from attnlab.mechanisms.linear import rotated
from attnlab.mechanisms.slots import scale_of
from attnlab.refusals import refuse_bias, refuse_bidirectional, refuse_every_normaliser, refuse_taps
from attnlab.registry import register


class State(NamedTuple):
    """Memories [B L G D E] of the tokens at each level, seen from the latest token, which is at
    position ``pos`` [B] of document ``seg`` [B]."""

    memory: Array
    pos: Array
    seg: Array


@register
@dataclass(frozen=True)
class Fenwick(Mechanism):
    """Log-linear attention: linear attention with a weight of its own for each scale of the past.

        out_t = norm(Σ_(s<=t) λ_t^(level(t,s)) a_(s+1) ... a_t (q_t·k_s / √D) v_s)
        level(t, s) = bits of (t XOR s), the last of ``levels`` taking the rest

    λ = softplus(W x + b) >= 0 for each head and level, a = σ(w x + c) in (0, 1) for each kv head,
    norm divides by the root mean square; t and s are positions in the document. Level 0 is the
    token itself, level l > 0 one block of 2^(l-1) tokens. In time order, level(t, s) =
    max(level(t, p), level(p, s)) for any p between: memories sorted as token p saw the past serve
    all later tokens of a chunk, wherever it begins.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N (C (D + E) + L D E)) time in chunks of C = ``chunk`` tokens, O(N + N L D E / C)
    memory; the decoding state is L matrices D x E for each kv head. Raises `UserError` for levels
    or chunk < 1 and, when called, without an order of time, for biased positions and for taps on
    logits. Source: Guo et al., arXiv 2506.04761.
    """

    levels: int = 16
    chunk: int = 64

    cost = Cost(time=1, memory=1, state=0)

    def __post_init__(self):
        if self.levels < 1 or self.chunk < 1:
            raise UserError(
                f"fenwick: levels={self.levels}, chunk={self.chunk}; use levels >= 1 and chunk >= 1"
            )

    @property
    def relative(self) -> bool:
        return self.levels == 1

    def init(self, key: Array, dims: Dims):
        a, b = jax.random.split(key)
        shape = (dims.heads, self.levels)
        return {
            "level": 0.02 * jax.random.normal(a, (dims.width, *shape)),
            "level_bias": jnp.full(shape, ONE),
            "gate": 0.02 * jax.random.normal(b, (dims.width, dims.kv_heads)),
            "gate_bias": jnp.full((dims.kv_heads,), 6.0),
        }

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        shape = (batch, self.levels, dims.kv_heads, dims.key_dim, dims.value_dim)
        return State(jnp.zeros(shape), jnp.zeros(batch, jnp.int32), jnp.full(batch, -1, jnp.int32))

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        report_use("fenwick", "XLA")
        q, k = rotated(queries, keys, rule)
        B, N, H, D = q.shape
        weight, decay = _weights(params, x)
        dims = Dims(0, H, k.shape[2], D, keys.v.shape[-1])
        size = min(self.chunk, N)

        def tiles(z: Array, fill: int = 0) -> Array:
            """[B N ...] -> [chunks B C ...]."""
            z = recurrent.pad(z, size, fill)
            return jnp.moveaxis(z.reshape(B, -1, size, *z.shape[2:]), 1, 0)

        tokens = (tiles(keys.pos), tiles(keys.seg, -1))
        tokens += tuple(tiles(z) for z in (q * scale_of(rule, q), k, keys.v, weight, decay))
        start = state or self.initial_state(dims, B)
        after, out = lax.scan(jax.checkpoint(_chunk, prevent_cse=False), start, tokens)
        out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, -1, H, dims.value_dim)[:, :N]
        out = rule.tap("heads", normalised(out).astype(queries.q.dtype))
        return Result(out, after if state else state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        q, k = rotated(queries, keys, rule)
        H, G = q.shape[2], k.shape[2]
        weight, decay = _weights(params, x)
        seen = rule.allowed(queries, keys)
        full = keys.seg[..., None] >= 0
        v = keys.cleared().v
        total = jnp.cumsum(jnp.where(full, decay, 0), 1)
        between = jnp.where(seen[..., None], total[:, :, None] - total[:, None], 0)
        k, v, decayed = (jnp.repeat(z, H // G, axis) for z, axis in ((k, 2), (v, 2), (between, 3)))
        level = level_between(queries.pos[:, :, None], keys.pos[:, None], self.levels)
        chosen = jax.nn.one_hot(level, self.levels)
        pairs = jnp.einsum("bnhd,bmhd->bnmh", q, k) * scale_of(rule, q) * jnp.exp(decayed)
        pairs = jnp.where(seen[..., None], pairs, 0) * jnp.einsum("bnhl,bnml->bnmh", weight, chosen)
        out = normalised(jnp.einsum("bnmh,bmhe->bnhe", pairs, v)).astype(queries.q.dtype)
        return Result(rule.tap("heads", out), state)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        H, G, D, E, L = dims.heads, dims.kv_heads, dims.key_dim, dims.value_dim, self.levels
        size = min(self.chunk, length)
        gates = length * dims.width * (H * L + G)
        memories = (H + G) * length * L * D * E + G * length / size * L * L * D * E
        return 2.0 * (gates + H * length * size * (D + E) + memories)

    @classmethod
    def examples(cls):
        return (cls(levels=4, chunk=5), cls(chunk=8))


ONE = 0.5413248546129181
"""softplus(ONE) = 1."""


def level_between(t: Array, s: Array, levels: int) -> Array:
    """Bits of (t XOR s), at most ``levels`` − 1; int32, on positions that broadcast."""
    return jnp.minimum(32 - lax.clz(t ^ s), levels - 1)


def normalised(out: Array) -> Array:
    """Divided by the root mean square of the last axis."""
    return out * lax.rsqrt(jnp.mean(out * out, -1, keepdims=True) + 1e-6)


def _refuse(rule: Rule) -> None:
    refuse_every_normaliser("fenwick", rule)
    refuse_bias("fenwick", rule)
    refuse_taps("fenwick", rule)
    refuse_bidirectional("fenwick", rule, "its levels reach into the past only")


def _weights(params, x: Array | None) -> tuple[Array, Array]:
    """λ [B N H L] and log a [B N G], f32."""
    assert x is not None, "levels and gates read the block's input"
    x = x.astype(jnp.float32)
    level = jnp.einsum("bnw,whl->bnhl", x, params["level"]) + params["level_bias"]
    gate = jnp.einsum("bnw,wg->bng", x, params["gate"]) + params["gate_bias"]
    return jax.nn.softplus(level), jax.nn.log_sigmoid(gate)


def _chunk(state: State, tokens: tuple) -> tuple[State, Array]:
    """One step of the scan over [B C ...] tokens; ``out`` [B G R C E]."""
    pos, seg, *arrays = tokens
    B, C = seg.shape
    L, G = state.memory.shape[1:3]
    full = seg >= 0

    def heads_first(z: Array) -> Array:
        z = jnp.where(full.reshape(B, C, *[1] * (z.ndim - 2)), z.astype(jnp.float32), 0)
        return jnp.moveaxis(z, 1, -2)

    q, k, v, weight = (heads_first(z) for z in arrays[:4])
    decay = heads_first(arrays[4][..., None])
    q, weight = (z.reshape(B, G, -1, C, z.shape[-1]) for z in (q, weight))

    def at_level(level: Array) -> Array:
        """λ_t at ``level`` [B C X]: [B G R C X]."""
        shape = (*weight.shape[:-1], level.shape[-1])
        return jnp.take_along_axis(weight, jnp.broadcast_to(level[:, None, None], shape), -1)

    seen = (seg[:, :, None] == seg[:, None]) & full[:, None] & jnp.tri(C, dtype=bool)
    pairs = jnp.where(seen[:, None, None], jnp.einsum("bgrid,bgjd->bgrij", q, k), 0)
    pairs *= at_level(level_between(pos[:, :, None], pos[:, None], L))
    pairs *= jnp.exp(recurrent.sums_between(decay))[:, :, None]
    out = jnp.einsum("bgrij,bgje->bgrie", pairs, v)

    old = (seg == state.seg[:, None]) & full
    levels, since = jnp.arange(L), level_between(pos, state.pos[:, None], L)
    asking = (
        at_level(jnp.maximum(levels, since[..., None]))
        * jnp.exp(recurrent.sums_since(decay))[:, :, None]
    )
    read = jnp.einsum("bgril,bgrid,blgde->bgrie", asking, q, state.memory)
    out += jnp.where(old[:, None, None, :, None], read, 0)
    return _advanced(state, pos, seg, k, v, decay), out


def _advanced(state: State, pos: Array, seg: Array, k: Array, v: Array, decay: Array) -> State:
    """The memories as the last token of the chunk sees the past."""
    L = state.memory.shape[1]
    latest, last = recurrent.latest_document(seg, state.seg)
    here = jnp.take_along_axis(pos, jnp.maximum(last, 0)[:, None], 1)[:, 0]
    here = jnp.where(last >= 0, here, state.pos)
    raised = jnp.maximum(jnp.arange(L), level_between(here, state.pos, L)[:, None])
    moved = jnp.einsum("blm,blgde->bmgde", jax.nn.one_hot(raised, L), state.memory)
    moved *= jnp.exp(jnp.sum(decay, 2))[:, None, :, :, None]
    moved = jnp.where((latest == state.seg)[:, None, None, None, None], moved, 0)
    kept = ((seg == latest[:, None]) & (seg >= 0))[..., None]
    place = jnp.where(kept, jax.nn.one_hot(level_between(here[:, None], pos, L), L), 0)
    k = k * jnp.exp(recurrent.sums_until(decay))
    new = jnp.einsum("bjl,bgjd,bgje->blgde", place, k, v)
    return State(moved + new, here, latest)
