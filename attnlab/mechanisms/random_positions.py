"""Softmax attention whose queries and keys are those of random vectors, one for each position."""

from dataclasses import dataclass

import jax

from attnlab.core import Array
from attnlab.mechanisms.softmax import Softmax
from attnlab.registry import register


@register
@dataclass(frozen=True)
class RandomPositions(Softmax):
    """Softmax attention whose queries and keys come from fixed random vectors of the positions.

        q_i = ε_i W_Q,  k_j = ε_j W_K,  v = norm(x) W_V,   out = softmax(q kᵀ / √D) v

    ε_i ~ N(0, I) of the model's width is a function of ``seed`` and of the position i, so it has no
    greatest length; W_Q, W_K are learned. Who attends to whom is thus the same in every text. All
    layers read the same ε. The paper sends ε through the layers of the network itself, one stream
    beside the other, and reads queries and keys off that: also a function of positions alone, and
    the same in the first layer. Without the model, whoever projects has to do it so: a bare call is
    that of softmax. Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: as softmax, O(N M (D + E)) time and O(N + M) memory, besides the vectors; decoding keeps
    all keys and values. Raises `UserError` for a tile < 1.
    Source: after RndEmbQK of "Deconstructing Attention", arXiv 2510.11602.
    """

    seed: int = 0

    @property
    def relative(self) -> bool:
        return False

    def source(self, x, embedded, pos):
        return draw(self.seed, pos, x.shape[-1]).astype(x.dtype)

    def limit(self, length: int):
        return None

    @classmethod
    def examples(cls):
        return (cls(),)


def draw(seed: int, pos: Array, width: int) -> Array:
    """ε [B N width] f32 of positions [B N]: the same for a position wherever it stands."""
    start = jax.random.key(seed)

    def one(place: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(start, place), (width,))

    return jax.vmap(jax.vmap(one))(pos)
