"""Exact attention for rules in which a query must meet all its keys at once.

A row of weights that is not exp(z − lse) (a projection onto the simplex, the k largest), or logits
that depend on the rest of their row, cannot be put together from parts. So a tile of queries meets
all keys, then the next one; the backward pass computes each tile again. Memory grows with the
keys, never with N M.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import dense, report_use

LOGITS_IN_FLIGHT = 2**20
"""Logits of one tile of queries (B H tile M f32: 4 MiB) where the keys leave a choice."""


def attend(
    queries: Queries, keys: Keys, rule: Rule, tile: int | None = None
) -> tuple[Array, Array]:
    """weights(logits) v for any lengths N, M and any `Rule`; a row with no visible key gives 0.

    ``tile`` queries at a time (chosen by shape when None). Returns ``out`` [B N H E] in the dtype
    of the queries and ``lse`` [B H N] f32, the log-sum-exp of the logits whatever the normaliser
    (`MASK` for an empty row). Cost: O(N M) time, hidden pairs included; O(N + tile M) memory.
    """
    report_use("rowwise", "XLA")
    dtype, (B, N, H, _), M = queries.q.dtype, queries.q.shape, keys.k.shape[1]
    queries, keys = queries.cleared(), keys.cleared()
    if rule.position.whole:
        keys, _ = keys.ordered()
    queries = queries._replace(q=rule.rotate(queries.q, queries.pos, "query"))
    k = rule.rotate(keys.k, keys.pos, "key").swapaxes(1, 2)

    log_count = keys.log_count

    @partial(jax.checkpoint, prevent_cse=False)
    def rows(tile: Queries) -> tuple[Array, Array]:
        q = tile.q.swapaxes(1, 2)
        seen = rule.visible(tile.pos, tile.seg, keys.pos, keys.seg)[:, None]
        z = rule.rows(q, k, seen, tile.pos, keys.pos)
        z = jnp.where(seen, z if log_count is None else z + log_count[:, None, None], MASK)
        out = dense.mix(rule, rule.weights(z, seen), keys.v, tile.pos, keys.pos)
        return out, dense.log_sum(z, seen)

    size = min(N, tile or max(8, min(512, LOGITS_IN_FLIGHT // max(1, B * H * M))))
    out, lse = lax.map(rows, Queries(*map(partial(_tiles, size), queries, (0, 0, -1))))
    out = jnp.moveaxis(out, 0, 1).reshape(B, -1, H, out.shape[-1])[:, :N]
    lse = jnp.moveaxis(lse, 0, 2).reshape(B, H, -1)[..., :N]
    return rule.tap("heads", out.astype(dtype)), lse


def _tiles(tile: int, z: Array, fill: int) -> Array:
    """[B N ...] -> [tiles B tile ...], padded with ``fill``."""
    B, N = z.shape[:2]
    z = jnp.pad(z, [(0, 0), (0, -N % tile)] + [(0, 0)] * (z.ndim - 2), constant_values=fill)
    return jnp.moveaxis(z.reshape(B, -1, tile, *z.shape[2:]), 1, 0)
