"""Gated DeltaNet: a memory that corrects what it recalls, and forgets."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Dims
from attnlab.engines import delta
from attnlab.mechanisms.delta import Delta, of_input
from attnlab.registry import register


@register
@dataclass(frozen=True)
class GatedDelta(Delta):
    """The gated delta rule: one gate says how much to correct, another how much to forget.

        S_t = a_t S_(t-1) + β_t k_t (v_t − a_t S_(t-1)ᵀ k_t)ᵀ,   out_t = S_tᵀ q_t

    β = rate σ(W x + c) and a = exp(−exp(A) softplus(U x + b)) in (0, 1], for each kv head; at the
    start exp(A) is drawn from 1 to 16 and softplus(b) from 0.001 to 0.1, so that heads forget at
    rates of their own. Queries and keys are divided by their length. Shapes, cost, state and
    refusals as `delta`. Source: Yang et al., arXiv 2412.06464.
    """

    def init(self, key: Array, dims: Dims):
        heads = (dims.kv_heads,)
        a, b, c, d = jax.random.split(key, 4)
        step = jnp.exp(jax.random.uniform(c, heads, minval=jnp.log(0.001), maxval=jnp.log(0.1)))
        return super().init(a, dims) | {
            "forget": 0.02 * jax.random.normal(b, (dims.width, *heads)),
            "forget_bias": jnp.log(jnp.expm1(step)),
            "forget_rate": jnp.log(jax.random.uniform(d, heads, minval=1.0, maxval=16.0)),
        }

    def _gates(self, params, x: Array | None) -> tuple[Array, Array]:
        write, _ = super()._gates(params, x)
        step = jax.nn.softplus(of_input(params, "forget", x))
        return write, -jnp.exp(params["forget_rate"]) * step

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        gates = 4.0 * length * dims.width * dims.kv_heads
        return gates + delta.count_flops(dims, length, self.chunk)
