"""Contextual position encoding."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Position
from attnlab.errors import UserError
from attnlab.positions.lookup import look_up
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Cope(Position):
    """A distance that each query counts by content: only tokens that its gate opens for count.

    logits q_i·(k_j + e[p_ij]) / √D with the gates g_it = sigmoid(q_i·k_t / √D) of the visible keys,
        p_ij = min(Σ g_it over the tokens t from j to i, both included, positions − 1)
    and e at a fractional p the mean of its two neighbours, weighted by nearness. Keys after the
    query are counted outward in the same way. Parameters: ``e`` [positions D], 0 at first, shared
    by the heads; every layer has its own. Shapes: z, seen [B H N M], q [B H N D], pos [B N], [B M].
    Cost: O(M) sums and two look-ups per query and head; since a count runs over a whole row, all
    N M pairs are visited, hidden ones included. Raises `UserError` for positions < 2.
    Source: Golovneva et al., arXiv 2405.18719.
    """

    positions: int = 64

    whole = True

    def __post_init__(self):
        if self.positions < 2:
            raise UserError(f"position cope: positions={self.positions} must be at least 2")

    def init(self, key, dims):
        return {"e": jnp.zeros((self.positions, dims.key_dim))}

    def row_bias(self, params, z, seen, q, q_pos, k_pos):
        B, H, N, M = z.shape
        last = self.positions - 1
        i, j = q_pos[:, None, :, None], k_pos[:, None, None, :]
        gates = jnp.where(seen, jax.nn.sigmoid(z), 0.0)
        back = jax.lax.cumsum(jnp.where(j <= i, gates, 0.0), 3, reverse=True)
        forth = jax.lax.cumsum(jnp.where(j >= i, gates, 0.0), 3)
        count = jnp.minimum(jnp.where(j <= i, back, forth), last)
        low = jnp.minimum(count.astype(jnp.int32), last - 1)
        part = count - low
        products = jnp.einsum("bhnd,pd->bhnp", q.astype(jnp.float32), params["e"])
        # Every head counts for itself: to a look-up, heads are rows of the batch.
        rows = (products * q.shape[-1] ** -0.5).reshape(B * H, 1, N, -1)
        index = low.reshape(B * H, N, M)
        at, after = (look_up(rows, index + step).reshape(z.shape) for step in (0, 1))
        return at * (1 - part) + after * part
