"""Softmax with one more logit, which is 0 and holds no value."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Normaliser
from attnlab.registry import register


@register
@dataclass(frozen=True)
class SoftmaxPlusOne(Normaliser):
    """Softmax that may attend to nothing: p = e^z / (1 + Σ e^z).

    A row's weights sum to σ(lse z) and are otherwise those of softmax, so that noise is reduced and
    dilution is not. Not invariant to a shift of the logits. A mechanism that attends in one pass
    hosts it. Shapes: z [B H N M] -> [B H N M]. No parameters; free. Source: Miller, "Attention is
    off by one", 2023.
    """

    separable = False

    def share(self, lse):
        return jax.nn.sigmoid(lse)

    def weights(self, params, z, seen):
        top = jax.lax.stop_gradient(jnp.maximum(jnp.max(z, -1, keepdims=True), 0.0))
        weight = jnp.where(seen, jnp.exp(z - top), 0.0)
        return weight / (jnp.exp(-top) + jnp.sum(weight, -1, keepdims=True))
