"""Window, global and random blocks of keys."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from attnlab.core import Array, Cost, Dims, Mechanism, Pattern, Result, count_pairs
from attnlab.engines import dense, ring
from attnlab.errors import UserError
from attnlab.registry import register

TILE = 16
"""Fewest tokens of a tile."""


@dataclass(frozen=True)
class Scattered(Pattern):
    """|I − J| < window, I or J < first, or I and J joined by an edge of a fixed random graph on
    the blocks I = ⌊i / block⌋ and J = ⌊j / block⌋ of a document.

    Block I draws ``random`` edges to the blocks [first, I − window], which are cut into as many
    equal parts and one block drawn from each: no block twice, and all of them when there are no
    more than ``random``. The draw is a hash of (seed, I, part).
    """

    block: int
    window: int
    first: int
    random: int
    seed: int

    def visible(self, q_pos, k_pos):
        I, J = q_pos // self.block, k_pos // self.block
        seen = (jnp.abs(I - J) < self.window) | (self.first > I) | (self.first > J)
        for part in range(self.random):
            seen |= (self.drawn(I, part, jnp) == J) | (self.drawn(J, part, jnp) == I)
        return seen

    def reaches(self, q_low, q_high, k_low, k_high):
        asking, answering = (q_low, q_high), (k_low, k_high)
        (I, I_high), (J, J_high) = ([z // self.block for z in span] for span in (asking, answering))
        seen = (I - J_high < self.window) & (J - I_high < self.window)
        seen |= (self.first > I) | (self.first > J)
        return seen | self._joined(I, I_high, J, J_high) | self._joined(J, J_high, I, I_high)

    def _joined(self, low, high, other_low, other_high):
        """Whether a block in [low, high] draws one in [other_low, other_high], looked up one by one
        for as many blocks as an aligned tile has, and a few more."""
        # Tiles across the start of a document may have more, and then visit every tile.
        examined = max(3, TILE // self.block + 2)
        one = low[..., None] + jnp.arange(examined, dtype=jnp.int32)
        seen = high - low >= examined
        for part in range(self.random):
            to = self.drawn(one, part, jnp)
            met = (other_low[..., None] <= to) & (to <= other_high[..., None])
            seen |= jnp.any(met & (one <= high[..., None]), -1)
        return seen

    def drawn(self, I, part: int, xp):
        """The block that block ``I`` (int32) draws from its part; −1 when that part is empty."""
        count = xp.maximum(I - self.window + 1 - self.first, 0)
        size, longer = count // self.random, count % self.random
        low = part * size + xp.minimum(part, longer)
        size = size + (part < longer)
        number = mixed(I.astype(np.uint32) * np.uint32(self.random) + np.uint32(part), self.seed)
        pick = (number >> np.uint32(1)).astype(np.int32) % xp.maximum(size, 1)
        return xp.where(size > 0, self.first + low + pick, -1)


def mixed(number: Array | np.ndarray, seed: int):
    """A hash of uint32 to uint32 (the finaliser of MurmurHash3), the same in NumPy and JAX."""
    number = number ^ np.uint32((seed * 0x9E3779B1 + 0x85EBCA6B) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        number = (number ^ (number >> np.uint32(shift))) * np.uint32(factor)
    return number ^ (number >> np.uint32(16))


@register
@dataclass(frozen=True)
class BigBird(Mechanism):
    """Exact attention over near, first and random blocks of keys, each key once, one softmax.

    Query block I = ⌊i/b⌋ sees key block J when |I − J| < ``window``, when I or J is among the
    ``first`` blocks of the document, or when the two are joined by a fixed random graph, in which
    every block draws ``random`` distinct blocks behind its window from a hash of ``seed``; causal
    rules add j <= i. The table is a predicate of positions: the same in training, evaluation and
    decoding, for any length, and no key can count twice. Without an order of time an edge is seen
    from both ends, so that a block sees some ``random`` later blocks too, and the first blocks see
    everything. Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N b (window + first + random) (D + E)) time, O(N) memory; decoding keeps all keys and
    values. Raises `UserError` for sizes out of range. Source: Zaheer et al., arXiv 2007.14062.
    """

    block: int = 64
    window: int = 2  # blocks on each side, the own one included
    first: int = 1
    random: int = 3
    seed: int = 0

    cost = Cost(time=1, memory=1, state=1)
    spreads = True

    def __post_init__(self):
        if self.block < 1 or self.window < 1 or self.first < 0 or self.random < 0:
            raise UserError(
                f"bigbird: block={self.block}, window={self.window}, first={self.first}, "
                f"random={self.random}; use block, window >= 1 and first, random >= 0"
            )

    @property
    def relative(self) -> bool:
        return self.block == 1 and self.first == 0 and self.random == 0

    @property
    def pattern(self) -> Scattered:
        return Scattered(self.block, self.window, self.first, self.random, self.seed)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        tile = min(512, max(TILE, self.block))
        out, lse = ring.attend(queries, keys, rule.restrict(self.pattern), tile)
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, lse, probs = dense.attend(queries, keys, rule.restrict(self.pattern))
        return Result(out, state, {"lse": lse, "probs": probs})

    def limit(self, length: int):
        return dataclasses.replace(self, block=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        I = np.arange(-(-length // self.block), dtype=np.int32)
        sizes = np.minimum(self.block, length - I.astype(np.int64) * self.block)
        before = (
            I
            - np.maximum(I - self.window + 1, 0)
            + np.minimum(self.first, np.maximum(I - self.window + 1, 0))
        )
        drawn = [self.pattern.drawn(I, part, np) >= 0 for part in range(self.random)]
        before = before + np.sum(drawn, axis=0, dtype=np.int64)
        # Every block behind the own one is whole, and its edge is walked both ways if not causal.
        pairs = int(np.sum(before * sizes)) * self.block * (1 if causal else 2)
        pairs += sum(count_pairs(n, None, causal) for n in sizes.tolist())
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(block=3, random=2), cls(block=4, window=1, first=0, random=1, seed=3))
