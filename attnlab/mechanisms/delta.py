"""DeltaNet: linear attention whose memory corrects what it recalls."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Mechanism, Result, Rule
from attnlab.engines import delta, recurrent
from attnlab.errors import UserError
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
class Delta(Mechanism):
    """The delta rule: a memory that replaces what a key recalls by the new value, in part.

        S_t = S_(t-1) + β_t k_t (v_t − S_(t-1)ᵀ k_t)ᵀ,   out_t = S_tᵀ q_t,   S = 0 at the start

    Queries and keys are divided by their length; β = rate σ(W x + c), for each kv head, is the
    share of the error that is corrected: with β = 1 the last value of a key is recalled exactly,
    and up to D orthogonal keys do not disturb each other. A ``rate`` above 1 lets the memory turn a
    key's content round (I − β k kᵀ has the eigenvalue 1 − β). The scale of the rule has no meaning
    without logits and is not used.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N (C (D + E) + D E)) time in chunks of C = ``chunk`` tokens, O(N) memory; the decoding
    state is one D x E matrix for each kv head. Raises `UserError` for a chunk < 1 or a rate outside
    (0, 2] and, when called, without an order of time, for biased positions and for taps on logits.
    Source: Schlag et al., arXiv 2102.11174; chunks: Yang et al., 2406.06484; rates above 1:
    Grazzi et al., 2411.12537.
    """

    rate: float = 1.0
    chunk: int = 64

    cost = Cost(time=1, memory=1, state=0)
    spreads = True

    def __post_init__(self):
        if self.chunk < 1 or not 0 < self.rate <= 2:
            raise UserError(
                f"{key_of(self)}: rate={self.rate}, chunk={self.chunk}; "
                "use 0 < rate <= 2 and chunk >= 1"
            )

    def init(self, key: Array, dims: Dims):
        return {
            "write": 0.02 * jax.random.normal(key, (dims.width, dims.kv_heads)),
            "write_bias": jnp.zeros(dims.kv_heads),
        }

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        return recurrent.initial_state(batch, dims.kv_heads, dims.key_dim, dims.value_dim)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        self._refuse(rule)
        tokens = *rotated(queries, keys, rule), keys.v, *self._gates(params, x)
        out, after = delta.attend(*tokens, keys.seg, state, chunk=self.chunk)
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, after if state else state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        self._refuse(rule)
        tokens = *rotated(queries, keys, rule), keys.v, *self._gates(params, x)
        out, _ = delta.attend_by_token(*tokens, keys.seg)
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def _refuse(self, rule: Rule) -> None:
        name = key_of(self)
        refuse_every_normaliser(name, rule)
        refuse_bias(name, rule)
        refuse_taps(name, rule)
        refuse_bidirectional(name, rule, "it corrects what earlier tokens wrote")

    def _gates(self, params, x: Array | None) -> tuple[Array, Array]:
        """β and the log decay, f32 [B N G]."""
        write = self.rate * jax.nn.sigmoid(of_input(params, "write", x))
        return write, jnp.zeros_like(write)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        gate = 2.0 * length * dims.width * dims.kv_heads
        return gate + delta.count_flops(dims, length, self.chunk)

    @classmethod
    def examples(cls):
        return (cls(chunk=8), cls(rate=2.0, chunk=5))


def of_input(params, name: str, x: Array | None) -> Array:
    """W x + c for each kv head, f32 [B N G]."""
    assert x is not None, "gates read the block's input"
    z = jnp.einsum("bnw,wg->bng", x.astype(jnp.float32), params[name])
    return z + params[f"{name}_bias"]
