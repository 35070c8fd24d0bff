"""Dilated attention: every n-th key, counted back from the query."""

from dataclasses import dataclass

from attnlab.core import Cost, Mechanism, Pattern, Result
from attnlab.engines import blockwise, dense
from attnlab.registry import register


@dataclass(frozen=True)
class Comb(Pattern):
    """i − j is a multiple of ``stride``."""

    stride: int

    def visible(self, q_pos, k_pos):
        return (q_pos - k_pos) % self.stride == 0

    def reaches(self, q_low, q_high, k_low, k_high):
        return (q_high - k_low) // self.stride * self.stride >= q_low - k_high


@register
@dataclass(frozen=True)
class Dilated(Mechanism):
    """Exact attention over every ``stride``-th key: softmax over {j : stride divides i − j}.

    Source: Child et al., arXiv 1904.10509, the strided form without its local half.
    """

    stride: int = 4

    cost = Cost(time=2, memory=1, state=1)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, lse = blockwise.attend(queries, keys, rule.restrict(Comb(self.stride)))
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, lse, probs = dense.attend(queries, keys, rule.restrict(Comb(self.stride)))
        return Result(out, state, {"lse": lse, "probs": probs})

    def limit(self, length):
        return Dilated(stride=1)

    def flops(self, dims, length, causal=True):
        whole, rest = divmod(length, self.stride)
        pairs = self.stride * whole * (whole + 1) // 2 + rest * (whole + 1)
        pairs = pairs if causal else 2 * pairs - length
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(stride=3), cls(stride=8))
