"""Relative position vectors of Shaw et al."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Position
from attnlab.errors import UserError
from attnlab.positions.lookup import collect, distances, look_up
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Shaw(Position):
    """A learned vector for every clipped distance, added to the key and to the value.

    logits (q_i·k_j + q_i·a_r) / √D, out Σ_j p_ij (v_j + b_r), r = clip(j − i, −reach, reach).
    Parameters: ``a`` [2 reach + 1, D], ``b`` [2 reach + 1, E], shared by the heads; every layer has
    its own. The products of a query with all ``a`` are formed once and looked up; weights are
    summed by r before they meet ``b``. Shapes: q [B H N D], weights [B H N M], pos [B N], [B M].
    Cost: O((D + E) reach) per query and head, one look-up and one one-hot product of 2 reach + 1
    per logit; since weights are needed whole, all N M pairs are visited, hidden ones included.
    Raises `UserError` for reach < 1. Source: Shaw et al., arXiv 1803.02155.
    """

    reach: int = 16

    biased = True
    whole = True

    def __post_init__(self):
        if self.reach < 1:
            raise UserError(f"position shaw: reach={self.reach} must be at least 1")

    def init(self, key, dims):
        a, b = jax.random.split(key)
        size = 2 * self.reach + 1
        return {
            "a": 0.02 * jax.random.normal(a, (size, dims.key_dim)),
            "b": 0.02 * jax.random.normal(b, (size, dims.value_dim)),
        }

    def bias(self, params, q, q_pos, k_pos):
        products = jnp.einsum("bhnd,rd->bhnr", q.astype(jnp.float32), params["a"])
        return look_up(products * q.shape[-1] ** -0.5, self._index(q_pos, k_pos))

    def row_values(self, params, probs, q_pos, k_pos):
        weights = collect(probs, self._index(q_pos, k_pos), 2 * self.reach + 1)
        return jnp.einsum("bhnr,re->bnhe", weights, params["b"])

    def _index(self, q_pos: Array, k_pos: Array) -> Array:
        return jnp.clip(-distances(q_pos, k_pos), -self.reach, self.reach) + self.reach
