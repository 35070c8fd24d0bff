"""Gated slot attention: slots that forget at a learned rate and attend like keys."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Mechanism, Result
from attnlab.engines import recurrent
from attnlab.errors import UserError
from attnlab.mechanisms.linear import rotated
from attnlab.mechanisms.slots import count_flops, refuse_unordered, scale_of
from attnlab.registry import register


class State(NamedTuple):
    """The slots' keys [B G D m] and values [B G m E]."""

    keys: recurrent.State
    values: recurrent.State


@register
@dataclass(frozen=True)
class GatedSlots(Mechanism):
    """Attention to slots that mix every token in and forget the past at rates read off the input.

        α_t = σ(W x_t)^(1/τ),  K̃_t = α_t ∘ K̃_(t-1) + (1 − α_t) k_tᵀ,  Ṽ_t likewise,
        out_t = softmax(K̃_t q_t / √D) Ṽ_t,    K̃ = Ṽ = 0 before the first token

    W [width G m] is learned; ``damping`` τ keeps α near 1, so that slots remember.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N m (D + E)) time in chunks of ``chunk`` tokens, O(N m) memory; the decoding state is
    m (D + E) numbers for each kv head. Raises `UserError` for slots < 1, damping <= 0 or chunk < 1
    and, when called, without an order of time, for biased positions and for taps on logits.
    Source: Zhang et al., arXiv 2409.07146.
    """

    slots: int = 64
    damping: float = 8.0
    chunk: int = 64

    cost = Cost(time=1, memory=1, state=0)
    spreads = True

    def __post_init__(self):
        if self.slots < 1 or self.damping <= 0 or self.chunk < 1:
            raise UserError(
                f"gated_slots: slots={self.slots}, damping={self.damping}, chunk={self.chunk}; "
                "use slots >= 1, damping > 0, chunk >= 1"
            )

    def init(self, key: Array, dims: Dims):
        shape = (dims.width, dims.kv_heads, self.slots)
        return {"gate": 0.02 * jax.random.normal(key, shape)}

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        heads, m = dims.kv_heads, self.slots
        return State(
            recurrent.initial_state(batch, heads, dims.key_dim, m),
            recurrent.initial_state(batch, heads, m, dims.value_dim),
        )

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_unordered("gated_slots", rule)
        q, k = rotated(queries, keys, rule)
        past_keys, past_values = state or ((), ())
        decay = self._log_gate(params, x)
        write = -jnp.expm1(decay)
        options = {"chunk": self.chunk, "kernels": rule.kernels}
        z, slot_keys = recurrent.attend(
            q, k, write, keys.seg, past_keys, value_decay=decay, **options
        )
        p = jax.nn.softmax(z * scale_of(rule, q), -1)
        out, values = recurrent.attend(
            p, write, keys.v, keys.seg, past_values, key_decay=decay, **options
        )
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, State(slot_keys, values) if state else state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_unordered("gated_slots", rule)
        q, k = rotated(queries, keys, rule)
        decay = jnp.where(keys.seg[..., None, None] >= 0, self._log_gate(params, x), 0)
        seen = rule.allowed(queries, keys)[:, :, :, None, None]
        total = jnp.cumsum(decay, 1)  # [B N G m]
        between = jnp.where(seen, total[:, :, None] - total[:, None], 0)
        share = jnp.where(seen, jnp.exp(between) * -jnp.expm1(decay)[:, None], 0)
        k, v = (jnp.einsum("bnjgm,bjgd->bngmd", share, z) for z in (k, keys.cleared().v))
        k, v = (jnp.repeat(z, q.shape[2] // k.shape[2], 2) for z in (k, v))
        p = jax.nn.softmax(jnp.einsum("bnhd,bnhmd->bnhm", q, k) * scale_of(rule, q), -1)
        out = jnp.einsum("bnhm,bnhme->bnhe", p, v).astype(queries.q.dtype)
        return Result(rule.tap("heads", out), state)

    def _log_gate(self, params, x: Array | None) -> Array:
        """log α [B N G m], f32."""
        assert x is not None, "gates read the block's input"
        z = jnp.einsum("bnw,wgm->bngm", x.astype(jnp.float32), params["gate"])
        return jax.nn.log_sigmoid(z) / self.damping

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        return count_flops(dims, length, self.slots, self.chunk)

    @classmethod
    def examples(cls):
        return (cls(slots=3, chunk=8),)
