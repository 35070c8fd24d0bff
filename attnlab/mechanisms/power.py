"""Power attention: blocks at distances that are powers of two, behind a window and a sink."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Cost, Dims, Mechanism, Pattern, Result, count_pairs
from attnlab.engines import blockwise, dense
from attnlab.errors import UserError
from attnlab.registry import register


@dataclass(frozen=True)
class Powers(Pattern):
    """Blocks I of the query and J of the key: |I − J| < window or a power of two, or J < sinks."""

    block: int
    window: int
    sinks: int

    def visible(self, q_pos, k_pos):
        far = jnp.abs(q_pos // self.block - k_pos // self.block)
        return (far < self.window) | (far & (far - 1) == 0) | (k_pos < self.sinks * self.block)

    def reaches(self, q_low, q_high, k_low, k_high):
        q_low, q_high, k_low, k_high = (z // self.block for z in (q_low, q_high, k_low, k_high))
        low, high = q_low - k_high, q_high - k_low
        near = (low < self.window) & (high > -self.window)
        return near | (k_low < self.sinks) | _holds(low, high) | _holds(-high, -low)


def _holds(low: Array, high: Array) -> Array:
    """A power of two is in [low, high]."""
    highest = jnp.left_shift(1, 31 - lax.clz(jnp.maximum(high, 1)))
    return (high >= 1) & (highest >= low)


@register
@dataclass(frozen=True)
class Power(Mechanism):
    """Exact attention over blocks at distances 1, 2, 4, 8, ..., the nearest and the first.

    Blocks hold b = ``block`` positions of a document. A query of block I sees block J if |I − J| <
    ``window`` or |I − J| is a power of two, or J < ``sinks``; causal rules add j <= i. With every
    layer the reach in blocks doubles: any distance is the sum of the powers in its binary digits,
    so a block d behind is met after as many layers as d has digits 1, and all n blocks after
    log2(n) layers.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N b (window + sinks + log2(N / b)) (D + E)) time, O(N) memory; decoding keeps all keys
    and values, since any block may be at a power of two again, and reads few. Raises `UserError`
    for a block or window < 1 or sinks < 0. Source: Chen et al., arXiv 2503.03588.
    """

    block: int = 64
    window: int = 5
    sinks: int = 1

    cost = Cost(time=1, memory=1, state=1)

    def __post_init__(self):
        if self.block < 1 or self.window < 1 or self.sinks < 0:
            raise UserError(
                f"power: block={self.block}, window={self.window}, sinks={self.sinks}; "
                "use block, window >= 1 and sinks >= 0"
            )

    @property
    def relative(self) -> bool:
        return self.block == 1 and self.sinks == 0

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, lse = blockwise.attend(queries, keys, self._seeing(rule), max(64, self.block))
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, lse, probs = dense.attend(queries, keys, self._seeing(rule))
        return Result(out, state, {"lse": lse, "probs": probs})

    def _seeing(self, rule):
        return rule.restrict(Powers(self.block, self.window, self.sinks))

    def limit(self, length: int):
        return dataclasses.replace(self, window=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        per_pair = 2.0 * dims.heads * (dims.key_dim + dims.value_dim)
        return per_pair * self._count_pairs(length, causal)

    def _count_pairs(self, length: int, causal: bool) -> int:
        """(query, key) pairs, by distances in blocks; the last block may be short."""
        whole, rest = divmod(length, self.block)
        blocks = whole + (rest > 0)
        sizes = (self.block, rest or self.block)  # of every block but the last, of the last

        def behind(far: int) -> int:
            """Pairs of tokens ``far`` > 0 blocks apart, the query the later one."""
            return self.block * ((blocks - far - 1) * sizes[0] + sizes[1])

        near = range(1, min(self.window, blocks))
        beyond = (1 << e for e in range(blocks.bit_length()))
        seen = {*near, *(far for far in beyond if far < blocks)}
        own = (blocks - 1) * count_pairs(sizes[0], None, causal) + count_pairs(
            sizes[1], None, causal
        )
        pairs = own + (1 if causal else 2) * sum(map(behind, seen))
        for sink in range(min(self.sinks, blocks)):
            pairs += self._count_sink(sink, blocks, sizes, seen, causal)
        return pairs

    def _count_sink(
        self, sink: int, blocks: int, sizes: tuple[int, int], seen: set[int], causal: bool
    ) -> int:
        """Pairs of one sink with the blocks that do not see it otherwise."""
        width = sizes[sink == blocks - 1]
        after = blocks - 1 - sink - sum(far < blocks - sink for far in seen)
        last = after > 0 and blocks - 1 - sink not in seen
        pairs = width * ((after - last) * sizes[0] + last * sizes[1])
        before = 0 if causal else sum(far not in seen for far in range(1, sink + 1))
        return pairs + before * width * sizes[0]

    @classmethod
    def examples(cls):
        return (cls(block=2, window=3), cls(block=1, window=1, sinks=0))
