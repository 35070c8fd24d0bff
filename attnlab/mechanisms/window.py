"""Sliding-window attention with optional attention-sink tokens."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Pattern, Result, count_pairs
from attnlab.engines import dense, neighbours
from attnlab.errors import UserError
from attnlab.registry import register


@dataclass(frozen=True)
class Near(Pattern):
    """|i − j| < window, or j among the first ``sinks`` positions of the document."""

    window: int
    sinks: int = 0

    def visible(self, q_pos, k_pos):
        return (jnp.abs(q_pos - k_pos) < self.window) | (k_pos < self.sinks)

    def reaches(self, q_low, q_high, k_low, k_high):
        near = (q_low - k_high < self.window) & (k_low - q_high < self.window)
        return near | (k_low < self.sinks)


@register
@dataclass(frozen=True)
class Window(Mechanism):
    """Exact attention over the nearest keys: softmax over {j : |i−j| < window or j < sinks}.

    Causal rules add j <= i, so that ``window`` counts the visible keys including the query itself.
    ``sinks`` first tokens of each document stay visible to all its later tokens.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N (window + sinks) (D + E)) time, O(N) memory; the decoding state holds window − 1 +
    sinks tokens whatever the length. In a layer stack of depth L the receptive field is
    L (window − 1) tokens. Raises `UserError` for a window < 1 or sinks < 0.
    Source: Beltagy et al., arXiv 2004.05150; sinks: Xiao et al., 2309.17453.
    """

    window: int = 256
    sinks: int = 0

    cost = Cost(time=1, memory=1, state=0)
    spreads = True

    def __post_init__(self):
        if self.window < 1 or self.sinks < 0:
            raise UserError(
                f"window: window={self.window}, sinks={self.sinks}; use window >= 1 and sinks >= 0"
            )

    @property
    def relative(self) -> bool:
        return self.sinks == 0

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> Keys:
        return Keys.empty(dims, batch, self.window - 1 + self.sinks, dtype)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        keys, state = self._remember(keys, state)
        tile = max(64, 1 << (self.window // 4).bit_length())
        rule = rule.restrict(Near(self.window, self.sinks))
        out, lse = neighbours.attend(queries, keys, rule, tile, self.window, self.sinks)
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        keys, state = self._remember(keys, state)
        out, lse, probs = dense.attend(queries, keys, rule.restrict(Near(self.window, self.sinks)))
        return Result(out, state, {"lse": lse, "probs": probs})

    def _remember(self, keys: Keys, state) -> tuple[Keys, Keys | tuple[()]]:
        """All keys in sight, and those that a later token may still see: the sinks and the newest
        window − 1 tokens of the latest document. Slots are in no order: tokens know their place."""
        if not state:
            return keys, state
        keys = state.extended(keys)
        latest = jnp.max(keys.seg, 1, keepdims=True)
        alive = (keys.seg == latest) & (keys.seg >= 0)
        wanted = jnp.where(keys.pos < self.sinks, jnp.iinfo(jnp.int32).max, keys.pos)
        rank, slots = jax.lax.top_k(jnp.where(alive, wanted, -1), state.pos.shape[1])

        def kept(z: Array) -> Array:
            return jnp.take_along_axis(z, slots.reshape(slots.shape + (1,) * (z.ndim - 2)), 1)

        state = jax.tree.map(kept, keys)
        return keys, state._replace(seg=jnp.where(rank >= 0, state.seg, -1))

    def limit(self, length: int):
        return dataclasses.replace(self, window=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = count_pairs(length, self.window, causal)
        for sink in range(min(self.sinks, length)):  # pairs beyond the window on either side
            pairs += max(0, length - self.window - sink)
            pairs += 0 if causal else max(0, sink - self.window + 1)
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(window=5), cls(window=1, sinks=2), cls(window=7, sinks=3))
