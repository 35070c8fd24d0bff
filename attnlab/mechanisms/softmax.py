"""Exact softmax attention, every key visible: the baseline of the laboratory."""

from dataclasses import dataclass

from attnlab.core import Cost, Dims, Mechanism, Result, count_pairs
from attnlab.engines import dense, ring
from attnlab.errors import UserError
from attnlab.refusals import key_of
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Softmax(Mechanism):
    """Exact attention over all visible keys: softmax(q kᵀ / √D) v.

    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N M (D + E)) time, O(N + M) memory (tiles are recomputed in the backward pass); decoding
    keeps all keys and values. Raises `UserError` for a tile < 1.
    Source: Vaswani et al., arXiv 1706.03762.
    """

    tile: int | None = None  # tokens per tile, where fewer are wanted than fit into the cache

    cost = Cost(time=2, memory=1, state=1)
    spreads = True

    def __post_init__(self):
        if self.tile is not None and self.tile < 1:
            raise UserError(f"{key_of(self)}: tile={self.tile}; use at least 1, or none")

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, lse = ring.attend(queries, keys, rule, self.tile)
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, lse, probs = dense.attend(queries, keys, rule)
        return Result(out, state, {"lse": lse, "probs": probs})

    def limit(self, length: int):
        return self

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        return (
            2.0 * dims.heads * (dims.key_dim + dims.value_dim) * count_pairs(length, None, causal)
        )

    @classmethod
    def examples(cls):
        return (cls(), cls(tile=8))
