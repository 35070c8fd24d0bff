"""H-matrix attention: exact near by, coarser and coarser far off."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from jax import lax

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Pattern, Queries, Result, Rule
from attnlab.engines import blockwise, pooling, pyramid, segments
from attnlab.errors import UserError
from attnlab.refusals import refuse_normaliser
from attnlab.registry import register


@dataclass(frozen=True)
class Neighbours(Pattern):
    """Means of 2^level tokens in the blocks beside the query's own block of ``size`` tokens.

    What the level below has shown already is left out: of the block before, the half next to a
    query that stands in the first half of its own; of the block behind, the mirror image.
    """

    size: int

    def visible(self, q_pos, k_pos):
        q_late = q_pos % self.size >= self.size // 2
        k_late = k_pos % self.size >= self.size // 2
        step = k_pos // self.size - q_pos // self.size
        return ((step == -1) & (q_late | ~k_late)) | ((step == 1) & (~q_late | k_late))

    def reaches(self, q_low, q_high, k_low, k_high):
        # In halves of blocks: 2 away, or 3 back from a late half, 3 on from an early one.
        low, high, first, last = (pos // (self.size // 2) for pos in (q_low, q_high, k_low, k_high))
        both = high > low
        before = (high - first >= 2) & (low - last <= 2 + (both | (low % 2 == 1)))
        behind = (last - low >= 2) & (first - high <= 2 + (both | (low % 2 == 0)))
        return before | behind


@dataclass(frozen=True)
class Near(Pattern):
    """The query's own block of ``size`` tokens and the two beside it."""

    size: int

    def visible(self, q_pos, k_pos):
        return abs(q_pos // self.size - k_pos // self.size) <= 1

    def reaches(self, q_low, q_high, k_low, k_high):
        return (k_high // self.size >= q_low // self.size - 1) & (
            k_low // self.size <= q_high // self.size + 1
        )


@register
@dataclass(frozen=True)
class Hierarchical(Mechanism):
    """Exact attention to near blocks, and to means of 2, 4, 8, … tokens the farther the longer.

    At level l blocks have ``block`` 2^l tokens. At level 0 a query sees the tokens of its own block
    and of those beside it; at level l >= 1 the ``block`` means of 2^l tokens in the blocks beside
    its own, but for the half that level l − 1 has shown. Every visible token is covered once:
        out = softmax over all levels of q·k̄ + ln c,   c the number of tokens in a mean
    so a query of 0 gives the exact mean of all visible values, and keys that are constant in groups
    give softmax attention. Means are taken before rotation and stand at the middle of their tokens.
    The published form also coarsens the queries of far levels, which saves the logarithm and lets
    all tokens of a group share one far context. Single far tokens are blurred by design.
    Rows of one document whose tokens stand in the slots of their positions take a third to half of
    the time of others, in which what a query sees is looked for.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N block log(N / block) (D + E)) time, O(N log N) memory; decoding keeps all keys. Raises
    `UserError` for a block that is odd or < 2. Source: Zhu & Soricut, arXiv 2107.11906.
    """

    block: int = 32

    cost = Cost(time=1, memory=1, state=1)

    def __post_init__(self):
        if self.block < 2 or self.block % 2:
            raise UserError(f"hierarchical: block={self.block} must be even and at least 2")

    @property
    def relative(self) -> bool:
        return False

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("hierarchical", rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        part = segments.part_of(rule)
        if rule.kernels != "xla" or keys.pos.shape != queries.pos.shape:
            out, lse = self._anywhere(queries, keys, part)
        else:
            plain = pyramid.straight(queries) & pyramid.straight(keys)
            out, lse = lax.cond(plain, self._in_place, self._anywhere, queries, keys, part)
        return Result(rule.tap("heads", out), state, {"lse": lse})

    def _in_place(self, queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
        means = pooling.halvings(keys, levels_from_0(keys.pos.shape[1], self.block))
        return pyramid.attend(queries, rule, self.block, *self._levels(keys, means))

    def _anywhere(self, queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
        tile = segments.tile_of(2 * self.block)
        levels = self._levels(keys, self._means(keys, pooling.mean))
        tiles = (tile, *[max(16, self.block)] * (len(levels) - 1))
        return blockwise.attend_sets(queries, rule, 2 * tile, *levels, key_tiles=tiles)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("hierarchical", rule)
        levels = self._levels(keys, self._means(keys, pooling.mean_densely))
        out, lse, probs = segments.attend_densely(queries, rule, *levels)
        return Result(out, state, {"lse": lse, "probs": probs})

    def _means(self, keys: Keys, mean: Callable[[Keys, int], Keys]) -> list[Keys]:
        return [mean(keys, 2**level) for level in range(1, depth(keys.pos.shape[1], self.block))]

    def _levels(self, keys: Keys, means: list[Keys]) -> list[tuple[Keys, Pattern]]:
        sizes = (self.block * 2**level for level in range(1, len(means) + 1))
        return [(keys, Near(self.block)), *zip(means, map(Neighbours, sizes))]

    def limit(self, length: int):
        return dataclasses.replace(self, block=length + length % 2)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        return (
            2.0
            * dims.heads
            * (dims.key_dim + dims.value_dim)
            * count_pairs(length, self.block, causal)
        )

    @classmethod
    def examples(cls):
        return (cls(block=4),)


def depth(length: int, block: int) -> int:
    """Levels that ``length`` consecutive positions need, wherever they begin."""
    return max(1, (-(-length // block)).bit_length() + 1)


def levels_from_0(length: int, block: int) -> int:
    """Levels of means that any of the positions from 0 to ``length`` − 1 sees."""
    return max(1, (-(-length // block) - 1).bit_length()) - 1


def count_pairs(length: int, block: int, causal: bool) -> int:
    """Pairs of a query and a token or a mean, of one document, in the whole blocks that are
    computed: about half as many again as are seen."""
    near, beside = (2, 1) if causal else (3, 2)
    slots = -(-length // block) * block
    return slots * block * (near + beside * levels_from_0(length, block))
