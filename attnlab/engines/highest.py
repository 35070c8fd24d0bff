"""The largest logit of each query, without the attention: for what is chosen relative to it."""

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import blockwise
from attnlab.engines.tiling import Tokens, cut, reach, spans


def highest(queries: Queries, keys: Keys, rule: Rule, limit: int | None = None) -> Array:
    """max of the logits over the keys that the rule shows, without its taps: f32 [B H N], `MASK`
    where there are none.

    Queries [B N H D], keys [B M G D]; ``limit`` bounds the tokens of a tile. No gradient. Only
    tiles in reach are visited. Cost: O(visited pairs D) time, O(N + M) memory.
    """
    queries, keys = lax.stop_gradient((queries.cleared(), keys.cleared()))
    rule = lax.stop_gradient(rule)
    (B, N, H, _), M = queries.q.shape, keys.pos.shape[1]
    tile, key_tile = (blockwise.tile_size(length, B * H, limit) for length in (N, M))
    q = cut(rule.rotate(queries.q, queries.pos, "query"), tile, 0).swapaxes(2, 3)
    k = cut(rule.rotate(keys.k, keys.pos, "key"), key_tile, 0).swapaxes(2, 3)
    asking = Tokens(cut(queries.pos, tile, 0), cut(queries.seg, tile, -1))
    answering = Tokens(cut(keys.pos, key_tile, 0), cut(keys.seg, key_tile, -1))
    key_spans = spans(answering)

    def query_tile(part) -> Array:
        q, pos, seg, span = part
        near = reach(rule, jax.tree.map(lambda z: z[None], span), key_spans)[0]
        visited = jnp.argsort(~near, stable=True)

        def step(t: Array, top: Array) -> Array:
            tokens = answering.at(visited[t])
            k_t = lax.dynamic_index_in_dim(k, visited[t], 0, keepdims=False)
            seen = rule.visible(pos, seg, tokens.pos, tokens.seg)[:, None]
            z = rule.biased(q, k_t, pos, tokens.pos)
            return jnp.maximum(top, jnp.max(jnp.where(seen, z, MASK), -1))

        return lax.fori_loop(0, jnp.sum(near), step, jnp.full(q.shape[:3], MASK))

    top = lax.map(query_tile, (q, asking.pos, asking.seg, spans(asking)))
    return jnp.moveaxis(top, 0, 2).reshape(B, H, -1)[..., :N]
