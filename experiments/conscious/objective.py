"""What a conscious state is trained for beside a task: that it tells what comes later, and that the
choice of what enters it does not collapse.

    L = task + λ₁ agreement − λ₂ diversity

B rows of a batch; P numbers of what was said; n elements to choose from.
"""

import jax
import jax.numpy as jnp

from attnlab.core import Array


def agreement(said: Array, later: Array) -> Array:
    """−1/B Σ_i ln softmax_j(said_i·later_j)_i in nats: InfoNCE of what an earlier conscious state
    says [B P] against the state that came later [B P], the other rows being its negatives.

    ln B where nothing is said, never below ln B − I for I nats that the two have in common.
    Source: van den Oord et al., arXiv 1807.03748.
    """
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(said @ later.T, -1)))


def diversity(weights: Array) -> Array:
    """The entropy in nats of the mean over the batch of the weights [B n] with which elements are
    read: 0 where all rows read one and the same, ln n where each is read as often."""
    mean = jnp.mean(weights, 0)
    return -jnp.sum(mean * jnp.log(jnp.where(mean > 0, mean, 1.0)))


def loss(task: Array, said: Array, later: Array, weights: Array, lambdas: tuple):
    """L, of the task's own loss, of arguments as above, and λ₁, λ₂."""
    return task + lambdas[0] * agreement(said, later) - lambdas[1] * diversity(weights)
