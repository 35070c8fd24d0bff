"""Memory as gate: attention in a window, scaled by what a memory that learns answers."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Result, Rule, count_pairs
from attnlab.engines import momentum, persistent, segments
from attnlab.errors import UserError
from attnlab.mechanisms.titans import Titans, validate
from attnlab.mechanisms.window import Near
from attnlab.refusals import key_of, refuse_bidirectional, refuse_normaliser
from attnlab.registry import register


class State(NamedTuple):
    """The memory after the newest token, and the newest window − 1 tokens of its document."""

    memory: momentum.State
    local: Keys


@register
@dataclass(frozen=True)
class TitansGate(Mechanism):
    """Attention in a window and to learned tokens, gated by the memory of `titans` (Titans MAG).

        y_i = softmax over [P; j : i − window < j <= i] of (q_i · k) v,   m_i = M_iᵀ q_i
        out = norm(y) ∘ sigmoid(norm'(m))

    with M the memory of `titans`, which learns from the same k and v, and P ``persistent`` learned
    keys and values that all queries see. norm and norm' divide each head by its root mean square
    and multiply by a learned vector. P and the memory know no positions; the window takes rotations
    and biases. In the paper memory and attention project queries, keys and values each for itself,
    and the memory reads P first; here they share those of the layer, and P is of the attention.
    The rest is as there: its nonlinearity σ is taken to be the sigmoid of the memory.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: that of `titans` and O(N (window + persistent) (D + E)) time, O(N) memory; the decoding
    state is that of `titans` and window − 1 tokens. Raises `UserError` for a window < 1, persistent
    < 0, steps that `titans` refuses and, when called, without an order of time.
    Source: Behrouz et al., arXiv 2501.00663.
    """

    window: int = 256
    persistent: int = 4
    rate: float = 1.0
    chunk: int = 32

    cost = Cost(time=1, memory=1, state=0)

    def __post_init__(self):
        if self.window < 1 or self.persistent < 0:
            raise UserError(
                f"{key_of(self)}: window={self.window}, persistent={self.persistent}; "
                "use window >= 1 and persistent >= 0"
            )
        validate(self, self.rate, self.chunk)

    @property
    def titans(self) -> Titans:
        """The memory."""
        return Titans(self.rate, self.chunk)

    def init(self, key: Array, dims: Dims):
        for_memory, for_slots = jax.random.split(key)
        scale = jnp.ones((dims.heads, dims.value_dim))
        return {
            "memory": self.titans.init(for_memory, dims),
            "persistent": persistent.init(for_slots, dims, self.persistent),
            "norm": {"attention": scale, "memory": scale},
        }

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> State:
        memory = self.titans.initial_state(dims, batch, dtype)
        return State(memory, Keys.empty(dims, batch, self.window - 1, dtype))

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        tile = max(64, 1 << (self.window // 4).bit_length())
        forms = self.titans, partial(persistent.attend, tile=tile)
        return self._combined(*forms, params, queries, keys, rule, state, x)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        forms = self.titans.reference, persistent.attend_densely
        return self._combined(*forms, params, queries, keys, rule, state, x)

    def _combined(self, recall, attend, params, queries, keys, rule, state, x) -> Result:
        refuse(self, rule)
        memory, local = state or ((), ())
        found = recall(params["memory"], queries, keys, Rule(), memory, x=x)
        seen, local = segments.remember(keys, local)
        near = rule.restrict(Near(self.window))
        out, _ = attend(params["persistent"], queries, seen, near)
        out = gated(params["norm"], out, found.out).astype(queries.q.dtype)
        return Result(rule.tap("heads", out), State(found.state, local) if state else (), {})

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = count_pairs(length, self.window)
        attention = 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs
        slots = persistent.count_flops(dims, length, self.persistent)
        return attention + slots + self.titans.flops(dims, length)

    @classmethod
    def examples(cls):
        return (cls(window=5, persistent=3, chunk=8), cls(window=7, persistent=0, chunk=8))


def gated(scale: dict[str, Array], y: Array, m: Array) -> Array:
    """norm(y) ∘ sigmoid(norm'(m)), f32 [B N H E], with the ``scale`` of each [H E]."""
    return normed(y, scale["attention"]) * jax.nn.sigmoid(normed(m, scale["memory"]))


def normed(z: Array, scale: Array) -> Array:
    """Divided by the root mean square along the last axis, times ``scale``, f32; 0 stays 0."""
    z = z.astype(jnp.float32)
    return z * jax.lax.rsqrt(jnp.mean(z * z, -1, keepdims=True) + 1e-6) * scale


def refuse(mechanism: Mechanism, rule: Rule) -> None:
    """Raises `UserError` for what attention in parts, or a memory of the past, cannot serve."""
    refuse_bidirectional(key_of(mechanism), rule, "it learns from what earlier tokens wrote")
    refuse_normaliser(key_of(mechanism), rule)
