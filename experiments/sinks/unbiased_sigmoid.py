"""The sigmoid of the paper about sinks, which has no bias."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Normaliser
from attnlab.registry import register


@register
@dataclass(frozen=True)
class UnbiasedSigmoid(Normaliser):
    """Each key weighed by itself: p = σ(z), so that a row of n logits 0 sums to n / 2.

    `attnlab.normalisers.sigmoid` without its bias of -ln n. Shapes: z [B H N M] -> [B H N M].
    Source: Gu et al., arXiv 2410.10781.
    """

    separable = False
    whole = True

    def weights(self, params, z, seen):
        return jnp.where(seen, jax.nn.sigmoid(z), 0.0)
