"""A memory that learns at test time: gradient steps with momentum and forgetting."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Mechanism, Result, Rule
from attnlab.engines import momentum
from attnlab.errors import UserError
from attnlab.mechanisms.delta import of_input
from attnlab.mechanisms.linear import rotated
from attnlab.refusals import (
    key_of,
    refuse_bias,
    refuse_bidirectional,
    refuse_every_normaliser,
    refuse_taps,
)
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Titans(Mechanism):
    """A linear memory trained as it reads: what surprises is written, with momentum, and forgotten.

        S_t = η_t S_(t-1) + θ_t k_t (v_t − M_(t-1)ᵀ k_t)ᵀ,   M_t = (1 − α_t) M_(t-1) + S_t,
        out_t = M_tᵀ q_t,   M = S = 0 at the start

    θ = rate σ(W x + c), η = σ(U x + d) and α = σ(Z x + f), for each kv head, at the start near
    0.1, 0.9 and 0.01: a step down the gradient of |v − Mᵀ k|² / 2, how much of earlier surprise is
    carried on, and what is lost. Queries and keys are divided by their length. With η = α = 0 it is
    the delta rule. Gradients are those at the memory just before a token. The paper takes those at
    the start of a chunk, since its memory may be deep, and its result depends on the chunk; of a
    linear memory, which is this one, the exact ones cost no more. The scale of the rule has no
    meaning without logits and is not used.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N (C² + C (D + E) + D E)) time in chunks of C = ``chunk`` tokens, O(N) memory; the
    decoding state is two D x E matrices for each kv head. Raises `UserError` for a chunk < 1 or a
    rate outside (0, 2] and, when called, without an order of time, for biased positions and for
    taps on logits. Source: Behrouz et al., arXiv 2501.00663.
    """

    rate: float = 1.0
    chunk: int = 32

    cost = Cost(time=1, memory=1, state=0)

    def __post_init__(self):
        validate(self, self.rate, self.chunk)

    def init(self, key: Array, dims: Dims):
        starts = {"write": -2.2, "carry": 2.2, "forget": -4.6}
        params = {f"{name}_bias": jnp.full(dims.kv_heads, z) for name, z in starts.items()}
        for name, part in zip(starts, jax.random.split(key, 3)):
            params[name] = 0.02 * jax.random.normal(part, (dims.width, dims.kv_heads))
        return params

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        return momentum.initial_state(batch, dims.kv_heads, dims.key_dim, dims.value_dim)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        tokens = *rotated(queries, keys, rule), keys.v, self._gates(params, x)
        out, after = momentum.attend(*tokens, keys.seg, state, chunk=self.chunk)
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, after if state else state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        tokens = *rotated(queries, keys, rule), keys.v, self._gates(params, x)
        out, after = momentum.attend_by_token(*tokens, keys.seg, state)
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, after if state else state)

    def _gates(self, params, x: Array | None) -> momentum.Gates:
        step = self.rate * jax.nn.sigmoid(of_input(params, "write", x))
        carry = jax.nn.log_sigmoid(of_input(params, "carry", x))
        return momentum.Gates(step, carry, jax.nn.log_sigmoid(-of_input(params, "forget", x)))

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        gates = 6.0 * length * dims.width * dims.kv_heads
        return gates + momentum.count_flops(dims, length, self.chunk)

    @classmethod
    def examples(cls):
        return (cls(chunk=8),)


def validate(mechanism: Mechanism, rate: float, chunk: int) -> None:
    """Raises `UserError`, in the name of the mechanism, for steps that make no sense."""
    if chunk < 1 or not 0 < rate <= 2:
        raise UserError(
            f"{key_of(mechanism)}: rate={rate}, chunk={chunk}; use 0 < rate <= 2 and chunk >= 1"
        )


def _refuse(rule: Rule) -> None:
    refuse_every_normaliser("titans", rule)
    refuse_bias("titans", rule)
    refuse_taps("titans", rule)
    refuse_bidirectional("titans", rule, "it learns from what earlier tokens wrote")
