"""Block-local attention: exact inside blocks of positions, nothing across them."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Pattern, Result, count_pairs
from attnlab.engines import dense, neighbours
from attnlab.errors import UserError
from attnlab.registry import register


@dataclass(frozen=True)
class Same(Pattern):
    """⌊(i + offset) / block⌋ = ⌊(j + offset) / block⌋."""

    block: int
    offset: int = 0

    def visible(self, q_pos, k_pos):
        return self.index(q_pos) == self.index(k_pos)

    def reaches(self, q_low, q_high, k_low, k_high):
        low, high = self.index(q_low), self.index(q_high)
        return (low <= self.index(k_high)) & (self.index(k_low) <= high)

    def index(self, pos: Array) -> Array:
        """The block that a position lies in."""
        return (pos + self.offset) // self.block


@register
@dataclass(frozen=True)
class Block(Mechanism):
    """Exact attention inside blocks: softmax over {j : ⌊(i+o)/S⌋ = ⌊(j+o)/S⌋}, S = ``block``.

    Causal rules add j <= i. Blocks are counted from the start of each document; the first one is
    ``offset`` tokens short. Layers of the same offset never let blocks meet, however many there
    are: alternate offsets (0 and S/2) or mechanisms. Shapes: queries [B N H D], keys [B M G D],
    values [B M G E] -> [B N H E].
    Cost: O(N S (D + E)) time, O(N) memory; the decoding state holds S − 1 tokens whatever the
    length. Raises `UserError` unless block >= 1 and 0 <= offset < block.
    Source: Qiu et al., arXiv 1911.02972; Child et al., 1904.10509.
    """

    block: int = 256
    offset: int = 0

    cost = Cost(time=1, memory=1, state=0)
    spreads = True

    def __post_init__(self):
        if self.block < 1 or not 0 <= self.offset < self.block:
            raise UserError(
                f"block: block={self.block}, offset={self.offset}; use block >= 1 and "
                "0 <= offset < block"
            )

    @property
    def relative(self) -> bool:
        return self.block == 1

    @property
    def pattern(self) -> Same:
        return Same(self.block, self.offset)

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> Keys:
        return Keys.empty(dims, batch, self.block - 1, dtype)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        keys, state = self._remember(keys, state)
        tile = min(512, max(64, self.block))
        rule = rule.restrict(self.pattern)
        out, lse = neighbours.attend(queries, keys, rule, tile, self.block)
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        keys, state = self._remember(keys, state)
        out, lse, probs = dense.attend(queries, keys, rule.restrict(self.pattern))
        return Result(out, state, {"lse": lse, "probs": probs})

    def _remember(self, keys: Keys, state) -> tuple[Keys, Keys | tuple[()]]:
        """All keys in sight, and the newest S − 1 tokens of the latest document: a later token sees
        those of its own block among them."""
        if state == ():
            return keys, state
        keys = state.extended(keys)
        latest = jnp.max(keys.seg, 1, keepdims=True)
        alive = (keys.seg == latest) & (keys.seg >= 0)
        rank, slots = jax.lax.top_k(jnp.where(alive, keys.pos, -1), self.block - 1)

        def kept(z: Array) -> Array:
            return jnp.take_along_axis(z, slots.reshape(slots.shape + (1,) * (z.ndim - 2)), 1)

        state = jax.tree.map(kept, keys)
        return keys, state._replace(seg=jnp.where(rank >= 0, state.seg, -1))

    def limit(self, length: int):
        return dataclasses.replace(self, block=length, offset=0)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        first = min(length, self.block - self.offset)
        whole, rest = divmod(length - first, self.block)
        pairs = count_pairs(first, None, causal) + whole * count_pairs(self.block, None, causal)
        pairs += count_pairs(rest, None, causal)
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(block=5), cls(block=7, offset=3))
