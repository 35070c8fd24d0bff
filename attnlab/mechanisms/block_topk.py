"""Routed blocks: every query attends to its own block and to the past blocks it scores highest."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import (
    MASK,
    Array,
    Cost,
    Dims,
    Keys,
    Mechanism,
    Queries,
    Result,
    Rule,
    count_pairs,
)
from attnlab.engines import blockwise, dense, parts
from attnlab.engines.blocksparse import Tiled, blocks_of, by_position, visit
from attnlab.engines.gathered import group
from attnlab.errors import UserError
from attnlab.mechanisms.block import Same
from attnlab.refusals import key_of, refuse_bidirectional, refuse_normaliser
from attnlab.registry import register


@register
@dataclass(frozen=True)
class BlockTopK(Mechanism):
    """Exact attention over the own block and the past blocks of the highest mean logit.

    Blocks J hold b = ``block`` positions of a document. With k̄_J the mean of their keys as the
    position module turns them, a query of block I scores u_J = q·k̄_J for whole blocks J < I, takes
    the κ = ``chosen`` highest for each head, and attends to their tokens and, causally, to those of
    its own block, in one softmax. No gradient passes the choice: the router learns through the keys
    chosen. A block of which a token is missing (the first of a document that does not begin at a
    multiple of b) is seen from inside only. Shapes: queries [B N H D], keys [B M G D], values
    [B M G E] -> [B N H E].
    Pairs of query and chosen block are sorted by block, so that a block is read once for a tile of
    queries that chose it; the parts are merged by log-sum-exp.
    Cost: O(N M / b D) time for the scores and O(N (κ + 1) b (D + E)) for attention, O(N κ (D + E))
    memory; decoding keeps all keys and values, and reads all keys for their means. Causal only;
    raises `UserError` for a rule that is not, or block or chosen < 1.
    Source: Lu et al., arXiv 2502.13189.
    """

    block: int = 64
    chosen: int = 4

    cost = Cost(time=2, memory=1, state=1)

    def __post_init__(self):
        if self.block < 1 or self.chosen < 1:
            raise UserError(
                f"{key_of(self)}: block={self.block}, chosen={self.chosen}; use block, chosen >= 1"
            )

    @property
    def relative(self) -> bool:
        return self.block == 1

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        self._refuse(rule)
        plain = dataclasses.replace(rule, taps=())
        tile = min(512, max(64, self.block))
        out, lse = blockwise.attend(queries, keys, plain.restrict(Same(self.block)), tile)
        keys = by_position(keys.cleared(), self.block)
        queries = jax.tree.map(jnp.asarray, queries.cleared())
        far, far_lse = self._attend_past(params, queries, keys, rule)
        out, lse = parts.merge([out.swapaxes(1, 2), *far], [lse, *far_lse])
        out = rule.tap("heads", out.swapaxes(1, 2).astype(queries.q.dtype))
        return Result(out, state, {"lse": lse})

    def _refuse(self, rule: Rule) -> None:
        refuse_bidirectional(key_of(self), rule, "only blocks that are past can be chosen")
        refuse_normaliser(key_of(self), rule)

    def _attend_past(self, params, queries: Queries, keys: Keys, rule: Rule):
        """What the chosen blocks give every query, one after the other: out [κ B H N E], and the
        logarithms of their weights [κ B H N]."""
        choice = self._choose(queries, keys, rule)
        return self._attend_chosen(queries, keys, dataclasses.replace(rule, taps=()), choice)

    def _choose(self, queries: Queries, keys: Keys, rule: Rule) -> Array:
        """The blocks every query attends to, −1 where there are fewer: int32 [B H N κ], in f32
        whatever the inputs, a tile of queries at a time."""
        B, N, H, D = queries.q.shape
        G = keys.k.shape[2]
        q, k = jax.lax.stop_gradient((queries.q, keys.k))
        q = rule.rotate(q.astype(jnp.float32), queries.pos, "query")
        k = rule.rotate(k.astype(jnp.float32), keys.pos, "key")
        mean = jnp.mean(k.reshape(B, -1, self.block, G, D), 2)
        number, seg = keys.pos[:, :: self.block] // self.block, keys.seg[:, :: self.block]
        chosen = min(self.chosen, seg.shape[1])

        def choose(tile):
            q, pos, q_seg = tile  # [B H D], [B], [B]: one query of every row
            past = (number < pos[:, None] // self.block) & (seg == q_seg[:, None]) & (seg >= 0)
            score = jnp.einsum("bgrd,bmgd->bgrm", q.reshape(B, G, -1, D), mean).reshape(B, H, -1)
            score, block = jax.lax.top_k(jnp.where(past[:, None], score, -jnp.inf), chosen)
            return jnp.where(score > -jnp.inf, block, -1)

        tokens = (jnp.swapaxes(z, 0, 1) for z in (q, queries.pos, queries.seg))
        choice = jax.lax.map(choose, tuple(tokens), batch_size=min(N, 128))
        return jnp.moveaxis(choice, 0, 2)

    def _attend_chosen(self, queries: Queries, keys: Keys, rule: Rule, choice: Array):
        """Attention of every query to each of its blocks apart: out [κ B H N E], lse [κ B H N]."""
        B, H, N, chosen = choice.shape
        blocks = blocks_of(keys, rule, self.block)
        tile = self._tile(N, chosen)
        groups = jax.vmap(jax.vmap(lambda z: group(z, blocks.pos.shape[1], tile)))(
            choice.reshape(B, H, -1)
        )
        token = groups.pair // chosen  # [B H n T]
        q = rule.rotate(queries.q, queries.pos, "query").swapaxes(1, 2)
        row, head = jnp.ogrid[:B, :H]
        here = row[..., None, None], head[..., None, None]
        tiles = Tiled(
            q[*here, token],
            queries.pos[here[0], token],
            jnp.where(groups.pair >= 0, queries.seg[here[0], token], -1),
        )
        out, lse = visit(tiles, blocks, rule, groups.table[..., None])
        slot = groups.slot.reshape(B, H, N, chosen)
        out, lse = (z.reshape(B, H, -1, *z.shape[4:])[*here, slot] for z in (out, lse))
        lse = jnp.where(choice >= 0, lse, MASK)
        return jnp.moveaxis(out, 3, 0), jnp.moveaxis(lse, 3, 0)

    def _tile(self, queries: int, chosen: int) -> int:
        """Pairs of a query and a block in a tile."""
        return min(queries * chosen, 128, max(8, self.block * chosen // 2))

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        self._refuse(rule)
        out, lse, probs = dense.attend(queries, keys, rule, self._seen(queries, keys, rule))
        return Result(out, state, {"lse": lse, "probs": probs})

    def _seen(self, queries: Queries, keys: Keys, rule: Rule) -> Array:
        """The choice as a mask [B H N M], literally: blocks are known by their first token."""
        queries, keys = jax.lax.stop_gradient((queries.cleared(), keys.cleared()))
        q = rule.rotate(queries.q.astype(jnp.float32), queries.pos, "query")
        k = rule.rotate(keys.k.astype(jnp.float32), keys.pos, "key")
        number = keys.pos // self.block
        same = (number[:, :, None] == number[:, None]) & (keys.seg[:, :, None] == keys.seg[:, None])
        same &= (keys.seg >= 0)[:, None]
        mean = jnp.einsum("bjm,bmgd->bjgd", same / self.block, k)
        whole = jnp.sum(same, -1) == self.block
        past = number[:, None] < (queries.pos // self.block)[:, :, None]
        past &= queries.seg[:, :, None] == keys.seg[:, None]
        past &= ((keys.pos % self.block == 0) & whole)[:, None]
        mean = jnp.repeat(mean, q.shape[2] // mean.shape[2], 2)
        score = jnp.where(past[:, None], jnp.einsum("bnhd,bmhd->bhnm", q, mean), -jnp.inf)
        score, first = jax.lax.top_k(score, min(self.chosen, score.shape[-1]))
        picked = jax.nn.one_hot(first, same.shape[1]) * (score > -jnp.inf)[..., None]
        routed = jnp.einsum("bhncj,bjm->bhnm", picked, same.astype(jnp.float32)) > 0
        own = Same(self.block).visible(queries.pos[:, :, None], keys.pos[:, None])
        return routed | own[:, None]

    def limit(self, length: int):
        return dataclasses.replace(self, chosen=-(-length // self.block))

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        whole, rest = divmod(length, self.block)
        pairs = whole * count_pairs(self.block) + count_pairs(rest)
        few = min(whole, self.chosen)  # blocks that have so few behind them that they see all
        past = few * (few - 1) // 2 + (whole - few) * self.chosen
        past = past * self.block + few * rest
        unfilled = self._tile(length, min(self.chosen, -(-length // self.block))) // 2
        slots = past + whole * unfilled  # of its last tile, a block leaves half on average
        attention = (dims.key_dim + dims.value_dim) * (pairs + slots * self.block)
        return 2.0 * dims.heads * (attention + dims.key_dim * length * whole)

    @classmethod
    def examples(cls):
        return (cls(block=4, chosen=2), cls(block=5, chosen=1))
