"""Landmarks: a block is met through one key of its own, which says how much of a row it gets."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Dims, Keys, Queries, Result, Rule
from attnlab.engines import dense
from attnlab.engines.tiling import cut
from attnlab.mechanisms.block import Same
from attnlab.mechanisms.block_topk import BlockTopK
from attnlab.registry import register

TOGETHER = 128
"""Queries that meet all landmarks at once."""


@register
@dataclass(frozen=True)
class Landmark(BlockTopK):
    """Grouped softmax: a past block gets the weight of its landmark, shared out inside the block.

        k̄_J = Σ_(j in J) softmax(u·k_j) k_j,   z_ij = q_i·k_j / √D,   s_iJ = q_i·k̄_J / √D
        a_ij = p_ij in the own block I,   a_ij = p_iJ softmax_(j in J)(z_ij) in a past block J,
        p = softmax over {z_ij : j in I, j <= i} and {s_iJ : J < I among the κ highest}

    Blocks hold b = ``block`` positions of a document, κ = ``chosen``. With κ at least the number of
    blocks that is the form in which the paper trains; with few it is the one in which it retrieves,
    and gradients reach a router through p. There a landmark is a token put in behind every block,
    whose key pools what it has seen; here it is pooled from the keys of the block by u [G D],
    learned, and stands at the block's last position, so that any text can be read. A block of which
    a token is missing is seen from inside only. Shapes: queries [B N H D], keys [B M G D], values
    [B M G E] -> [B N H E].
    Cost: O(N M / b D) time for the landmarks and O(N (κ + 1) b (D + E)) for attention, O(N κ (D +
    E)) memory; decoding keeps all keys and values. Causal only; raises `UserError` for a rule that
    is not, or block or chosen < 1. Source: Mohtashami & Jaggi, arXiv 2305.16300.
    """

    def init(self, key: Array, dims: Dims):
        return {"landmark": jnp.zeros((dims.kv_heads, dims.key_dim))}

    def _attend_past(self, params, queries: Queries, keys: Keys, rule: Rule):
        score, choice = self._retrieve(params, queries, keys, rule)
        plain = dataclasses.replace(rule, taps=())
        return self._attend_chosen(queries, keys, plain, choice)[0], score

    def _retrieve(self, params, queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
        """The κ highest landmark logits [κ B H N], `MASK` where there are fewer, and their blocks
        [B H N κ], then −1; in f32 whatever the inputs, a tile of queries at a time."""
        B, N, H, _ = queries.q.shape
        G, D = keys.k.shape[2:]
        k = keys.k.astype(jnp.float32).reshape(B, -1, self.block, G, D)
        weight = jax.nn.softmax(jnp.einsum("bmtgd,gd->bmtg", k, params["landmark"]), 2)
        pos, seg = keys.pos[:, self.block - 1 :: self.block], keys.seg[:, :: self.block]
        k = rule.rotate(jnp.einsum("bmtg,bmtgd->bmgd", weight, k), pos, "key").swapaxes(1, 2)
        q = rule.rotate(queries.q.astype(jnp.float32), queries.pos, "query")
        chosen = min(self.chosen, pos.shape[1])

        @jax.checkpoint
        def retrieve(rule: Rule, k: Array, asking: Queries) -> tuple[Array, Array]:
            z = rule.biased(asking.q.swapaxes(1, 2), k, asking.pos, pos)
            past = pos[:, None] // self.block < asking.pos[:, :, None] // self.block
            past &= (seg[:, None] == asking.seg[:, :, None]) & (seg[:, None] >= 0)
            top, block = lax.top_k(jnp.where(past[:, None], z, MASK), chosen)
            return top, jnp.where(top > MASK, block, -1)

        size = min(N, TOGETHER)
        asking = Queries(cut(q, size, 0), cut(queries.pos, size, 0), cut(queries.seg, size, -1))
        found = lax.map(lambda asking: retrieve(rule, k, asking), asking)
        score, choice = (jnp.moveaxis(z, 0, 2).reshape(B, H, -1, chosen)[:, :, :N] for z in found)
        return jnp.moveaxis(score, 3, 0), choice

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        self._refuse(rule)
        queries, keys = queries.cleared(), keys.cleared()
        z = rule.logits(queries, keys)
        own = Same(self.block).visible(queries.pos[:, :, None], keys.pos[:, None])[:, None]
        own = jnp.broadcast_to(own & rule.allowed(queries, keys)[:, None], z.shape)
        same, score, chosen = self._landmarks(params, queries, keys, rule)
        both, seen = jnp.concatenate([z, score], -1), jnp.concatenate([own, chosen], -1)
        both = jnp.where(seen, both, MASK)
        near, far = jnp.split(rule.weights(both, seen), 2, -1)
        inside = jax.nn.softmax(jnp.where(same[:, None, None], z[:, :, :, None], MASK), -1)
        probs = rule.tap("probs", near + jnp.einsum("bhnm,bhnmj->bhnj", far, inside))
        out = dense.mix(rule, probs, keys.v.astype(jnp.float32), queries.pos, keys.pos)
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, state, {"lse": dense.log_sum(both, seen), "probs": probs})

    def _landmarks(
        self, params, queries: Queries, keys: Keys, rule: Rule
    ) -> tuple[Array, Array, Array]:
        """Literally, every block known by its first token: which tokens share a block [B M M],
        the logits of landmarks and whether they are chosen [B H N M]."""
        number, k = keys.pos // self.block, keys.k.astype(jnp.float32)
        same = (number[:, :, None] == number[:, None]) & (keys.seg[:, :, None] == keys.seg[:, None])
        same &= (keys.seg >= 0)[:, None]
        first = (keys.pos % self.block == 0) & (jnp.sum(same, -1) == self.block)
        score = jnp.einsum("bjgd,gd->bjg", k, params["landmark"])
        weight = jax.nn.softmax(jnp.where(same[..., None], score[:, None], MASK), 2)
        mark, pos = jnp.einsum("bmjg,bjgd->bmgd", weight, k), (number + 1) * self.block - 1
        q = rule.rotate(queries.q.astype(jnp.float32), queries.pos, "query").swapaxes(1, 2)
        mark = rule.rotate(mark, pos, "key").swapaxes(1, 2)
        past = first[:, None] & (number[:, None] < queries.pos[:, :, None] // self.block)
        past &= queries.seg[:, :, None] == keys.seg[:, None]
        z = jnp.where(past[:, None], rule.biased(q, mark, queries.pos, pos), MASK)
        top, slot = lax.top_k(z, min(self.chosen, z.shape[-1]))
        picked = jax.nn.one_hot(slot, z.shape[-1]) * (top > MASK)[..., None]
        return same, z, jnp.sum(picked, 3) > 0

    def limit(self, length: int):
        return dataclasses.replace(self, block=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pooled = 4.0 * length * dims.kv_heads * dims.key_dim
        return super().flops(dims, length, causal) + pooled

    @classmethod
    def examples(cls):
        return (cls(block=4, chosen=2),)
