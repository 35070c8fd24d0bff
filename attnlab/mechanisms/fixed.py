"""Fixed sparse attention: the own block, and the last columns of every block."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.core import Cost, Dims, Keys, Mechanism, Pattern, Result, count_pairs
from attnlab.engines import blockwise, dense
from attnlab.engines.slots import permuted
from attnlab.errors import UserError
from attnlab.mechanisms.block import Same
from attnlab.registry import register


@dataclass(frozen=True)
class Columns(Pattern):
    """j mod block >= block − columns, in a block other than that of i."""

    block: int
    columns: int

    def visible(self, q_pos, k_pos):
        other = q_pos // self.block != k_pos // self.block
        return other & (k_pos % self.block >= self.block - self.columns)

    def reaches(self, q_low, q_high, k_low, k_high):
        start = k_high // self.block * self.block
        last = jnp.where(k_high - start >= self.block - self.columns, k_high, start - 1)
        one = (q_low // self.block == k_high // self.block) & (
            q_high // self.block == k_low // self.block
        )
        return (last >= k_low) & ~one


@dataclass(frozen=True)
class SameOrColumns(Pattern):
    """`Same` or `Columns`."""

    block: int
    columns: int

    def visible(self, q_pos, k_pos):
        same, columns = Same(self.block), Columns(self.block, self.columns)
        return same.visible(q_pos, k_pos) | columns.visible(q_pos, k_pos)

    def reaches(self, q_low, q_high, k_low, k_high):
        same, columns = Same(self.block), Columns(self.block, self.columns)
        bounds = (q_low, q_high, k_low, k_high)
        return same.reaches(*bounds) | columns.reaches(*bounds)


@register
@dataclass(frozen=True)
class Fixed(Mechanism):
    """Exact attention over {j : ⌊i/l⌋ = ⌊j/l⌋ or j mod l >= l − c}, l = ``block``, c = ``columns``.

    The last c tokens of every block are seen by all later tokens (by all others without an order
    of time), so that they can summarise it; causal rules add j <= i. One softmax runs over the own
    block and the columns of the others, which stand together.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N (l + N c / l) (D + E)) time, so O(N √(c N)) with l = √(c N); O(N) memory; decoding
    keeps all keys and values, and reads them all. A rule whose parts cannot be merged is served in
    one pass over all pairs. Raises `UserError` unless 1 <= columns <= block.
    Source: Child et al., arXiv 1904.10509.
    """

    block: int = 128
    columns: int = 8

    cost = Cost(time=2, memory=1, state=1)

    def __post_init__(self):
        if not 1 <= self.columns <= self.block:
            raise UserError(
                f"fixed: block={self.block}, columns={self.columns}; use 1 <= columns <= block"
            )

    @property
    def relative(self) -> bool:
        return self.columns == self.block

    @property
    def pattern(self) -> SameOrColumns:
        return SameOrColumns(self.block, self.columns)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        if rule.observed or not rule.separable:
            out, lse = blockwise.attend(queries, keys, rule.restrict(self.pattern))
            return Result(out, state, {"lse": lse})
        tile = min(512, max(64, self.block))
        own = keys, Same(self.block)
        others = self._columns_first(keys), Columns(self.block, self.columns)
        out, lse = blockwise.attend_sets(queries, rule, tile, own, others)
        return Result(out, state, {"lse": lse})

    def _columns_first(self, keys: Keys) -> Keys:
        """The tokens of all columns in the first slots, the others emptied: as many slots as
        before, since documents of any length are packed, but whole tiles without a key."""
        column = keys.pos % self.block >= self.block - self.columns
        keys = keys._replace(seg=jnp.where(column, keys.seg, -1))
        order = jnp.argsort(keys.seg < 0, axis=1, stable=True)
        return permuted(keys, order)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, lse, probs = dense.attend(queries, keys, rule.restrict(self.pattern))
        return Result(out, state, {"lse": lse, "probs": probs})

    def limit(self, length: int):
        return dataclasses.replace(self, columns=self.block)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        whole, rest = divmod(length, self.block)
        pairs = whole * count_pairs(self.block, None, causal) + count_pairs(rest, None, causal)
        later = whole * (whole - 1) // 2 * self.block + whole * rest
        pairs += self.columns * later  # the columns of a block, by all tokens behind it
        if not causal:  # and by all tokens before it; a last, short block has fewer columns
            pairs += self.columns * whole * (whole - 1) // 2 * self.block
            pairs += max(0, rest - self.block + self.columns) * whole * self.block
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(block=5, columns=2), cls(block=8, columns=1))
