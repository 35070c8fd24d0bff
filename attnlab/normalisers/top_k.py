"""Softmax over the largest logits only."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Normaliser
from attnlab.engines.ranks import reach
from attnlab.errors import UserError
from attnlab.registry import register


@register
@dataclass(frozen=True)
class TopK(Normaliser):
    """Softmax over the ``k`` largest logits of each row: p = softmax(z where z >= z_(k)), else 0.

    The keys that tie with the k-th, up to rounding, are all kept, so that the order of the keys
    means nothing; rows with fewer keys are softmax. The number of keys that dilute is k, and they
    are the largest of the noise. The choice itself has no gradient.
    A mechanism that attends in one pass hosts it. Shapes: z [B H N M] -> [B H N M]. No parameters;
    O(N M ln k). Raises `UserError` for k < 1. Source: Gupta et al., arXiv 2106.06899.
    """

    k: int = 16

    separable = False
    whole = True

    def __post_init__(self):
        if self.k < 1:
            raise UserError(f"normaliser top_k: k={self.k}; use k >= 1")

    def weights(self, params, z, seen):
        rank = jax.lax.stop_gradient(z)
        least = jax.lax.top_k(rank, min(self.k, z.shape[-1]))[0][..., -1:]
        kept = seen & reach(rank, least)
        return super().weights(params, jnp.where(kept, z, MASK), kept)
