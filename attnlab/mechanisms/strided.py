"""Strided attention: the nearest keys and every l-th key, one softmax."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.core import (
    Array,
    Cost,
    Dims,
    Keys,
    Mechanism,
    Pattern,
    Queries,
    Result,
    Rule,
    count_pairs,
)
from attnlab.engines import blockwise, dense, segments
from attnlab.engines.slots import permuted
from attnlab.errors import UserError
from attnlab.mechanisms.window import Near
from attnlab.registry import register


@dataclass(frozen=True)
class Comb(Pattern):
    """|i − j| < stride, or stride divides i − j."""

    stride: int

    def visible(self, q_pos, k_pos):
        far = q_pos - k_pos
        return (jnp.abs(far) < self.stride) | (far % self.stride == 0)

    def reaches(self, q_low, q_high, k_low, k_high):
        near = Near(self.stride).reaches(q_low, q_high, k_low, k_high)
        return near | ((q_high - k_low) // self.stride * self.stride >= q_low - k_high)


@dataclass(frozen=True)
class Apart(Pattern):
    """i ≠ j."""

    def visible(self, q_pos, k_pos):
        return q_pos != k_pos

    def reaches(self, q_low, q_high, k_low, k_high):
        return (q_low != k_high) | (q_high != k_low)


@register
@dataclass(frozen=True)
class Strided(Mechanism):
    """Exact attention over the nearest and every l-th key: {j : |i−j| < l or l divides i−j}.

    l = ``stride``; causal rules add j <= i; heads see both parts in one softmax. Tokens sorted by
    pos mod l lie in l columns, inside which attention is full; it is merged by log-sum-exp with
    a window of l, and the one key in both, j = i, is left out of the columns.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N (l + N / l) (D + E)) time, so O(N √N) with l = √N, where two layers connect all
    tokens; O(N) memory; decoding keeps all keys and values, and reads them all. A rule whose
    parts cannot be merged is served in one pass over all pairs. Raises `UserError` for a
    stride < 1. Source: Child et al., arXiv 1904.10509.
    """

    stride: int = 32

    cost = Cost(time=2, memory=1, state=1)

    def __post_init__(self):
        if self.stride < 1:
            raise UserError(f"strided: stride={self.stride}; use stride >= 1")

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        few = queries.pos.shape[1] < self.stride  # for columns
        if rule.observed or not rule.separable or few:
            out, lse = blockwise.attend(queries, keys, rule.restrict(Comb(self.stride)))
            return Result(out, state, {"lse": lse})
        plain = dataclasses.replace(rule, taps=())
        tile = max(64, 1 << (self.stride // 2).bit_length())
        near = blockwise.attend(queries, keys, plain.restrict(Near(self.stride)), tile)
        far = self._columns(queries, keys, plain.restrict(Apart()))
        out, lse = segments.join(near, far)
        return Result(rule.tap("heads", out), state, {"lse": lse})

    def _columns(self, queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
        """Full attention inside every column of every document: a column is a segment."""
        first = jnp.minimum(_first_document(queries), _first_document(keys))
        queries, keys = self._relabelled(queries, first), self._relabelled(keys, first)
        order, back = _order(queries)
        queries = permuted(queries, order)
        keys = permuted(keys, _order(keys)[0])
        per_column = max(16, min(512, -(-keys.pos.shape[1] // self.stride)))
        out, lse = blockwise.attend(queries, keys, rule, per_column)
        return permuted(out, back), permuted(lse.swapaxes(1, 2), back).swapaxes(1, 2)

    def _relabelled(self, tokens, first):
        # Counted from the first of the row: documents of a long stream have large numbers.
        column = (tokens.seg - first) * self.stride + tokens.pos % self.stride
        return tokens._replace(seg=jnp.where(tokens.seg >= 0, column, -1))

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, lse, probs = dense.attend(queries, keys, rule.restrict(Comb(self.stride)))
        return Result(out, state, {"lse": lse, "probs": probs})

    def limit(self, length: int):
        return dataclasses.replace(self, stride=1)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        whole, rest = divmod(length, self.stride)
        pairs = count_pairs(length, self.stride, causal) - length
        pairs += rest * count_pairs(whole + 1, None, causal)
        pairs += (self.stride - rest) * count_pairs(whole, None, causal)
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(stride=3), cls(stride=7))


def _first_document(tokens: Queries | Keys) -> Array:
    """The lowest segment of full slots, [B 1]."""
    far = jnp.iinfo(jnp.int32).max
    return jnp.min(jnp.where(tokens.seg >= 0, tokens.seg, far), 1, keepdims=True)


def _order(tokens: Queries | Keys) -> tuple[Array, Array]:
    """Slots by segment and position [B N], and the inverse of that permutation."""
    order = jnp.lexsort((tokens.pos, tokens.seg))
    return order, jnp.argsort(order)
