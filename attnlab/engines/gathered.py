"""Attention of tiles of queries, each of which has a list of single keys with weights of their own.

Where `blocksparse` reads blocks as they lie, this gathers keys one by one: what is found by a sort,
a draw or a search. With w_ij what the list adds to a logit (ln 3: this key stands for three),
    out_i = Σ_r Σ_(j in list_r(i)) e^(z_ij + w_ij − lse_i) v_j
in one softmax over all rounds r, which run one after the other, a tile of queries at a time. The
backward pass gathers and computes each tile again: dz = p ∘ (do vᵀ − rowsum(do ∘ o) + dlse).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import report_use
from attnlab.engines.blocksparse import biased_by_head, seen_by_head
from attnlab.engines.sorting import inverse, stable_order
from attnlab.products import collected, mixed, scores


class Plan(NamedTuple):
    """Who meets whom in R rounds, int32.

    ``token`` [R B H n T]: the query in each slot of a tile, −1 in an empty one, which stands behind
    the others; ``slot`` [R B H N]: the slot of each query, −1 where the round has none for it;
    ``listed`` [R B H n K]: the keys that a tile meets, each at most once, −1: none; ``weight`` f32
    [R B H n K]: what is added to the logits of these keys.
    """

    token: Array
    slot: Array
    listed: Array
    weight: Array


class Groups(NamedTuple):
    """Askers in tiles of which each has one thing to ask; see `group`."""

    pair: Array
    table: Array
    slot: Array


def group(block: Array, blocks: int, tile: int) -> Groups:
    """Lays out askers [P], each of which wants ``block`` [P] (−1: none), so that every tile of
    ``tile`` slots holds askers of one block, in their order.

    Returns ``pair`` [n tile], the asker in each slot (−1: empty); ``table`` [n], the block of each
    tile (−1: none); ``slot`` [P], where each went (anywhere for −1). None is left out:
    n = min(P, ⌊P / tile⌋ + blocks), since each block leaves less than one tile unfilled.
    """
    P = block.shape[0]
    n = min(P, P // tile + blocks)
    wanted = jnp.where(block < 0, blocks, block)
    order = stable_order(wanted, blocks + 1)
    begin = jnp.searchsorted(wanted[order], jnp.arange(blocks + 1))
    tiles_end = jnp.cumsum(-(-jnp.diff(begin) // tile))
    tiles_begin = jnp.pad(tiles_end, (1, 0))  # [blocks + 1], the last for askers without a block
    table = jnp.searchsorted(tiles_end, jnp.arange(n), side="right")
    rank = (jnp.arange(n) - tiles_begin[table])[:, None] * tile + jnp.arange(tile)
    at = begin[table][:, None] + rank
    end = jnp.append(begin[1:], 0)[table][:, None]
    pair = jnp.where(at < end, order[jnp.minimum(at, P - 1)], -1)
    place = inverse(order)  # of each asker in the sorted list
    slot = (tiles_begin[wanted] * tile) + place - begin[wanted]
    return Groups(pair, jnp.where(table < blocks, table, -1), jnp.minimum(slot, n * tile - 1))


def attend(queries: Queries, keys: Keys, rule: Rule, plan: Plan) -> tuple[Array, Array]:
    """Softmax over the keys that ``plan`` lists for each query and the rule shows.

    Queries [B N H D], keys [B M G D], values [B M G E] -> f32 ``out`` [B H N E], 0 where there are
    none, and ``lse`` [B H N], `MASK` there. Rounds list a query no key twice. Serves no taps, and
    no rule in which a query must meet all its keys at once. Cost: O(tiles T K (D + E)) time, of
    tiles with a query; O(N) memory beside the plan.
    """
    report_use("gathered", "XLA")
    queries, keys = queries.cleared(), keys.cleared()
    q = rule.rotate(queries.q, queries.pos, "query").swapaxes(1, 2)
    k = rule.rotate(keys.k, keys.pos, "key").swapaxes(1, 2)
    tokens = tuple(map(jnp.asarray, (queries.pos, queries.seg, keys.pos, keys.seg)))
    return _attend(rule, q, k, keys.v.swapaxes(1, 2), tokens, plan)


class _Tile(NamedTuple):
    """A tile of queries [B H T] and its keys [B H K]: where they lie, and what they hold."""

    at_q: tuple[Array, ...]
    at_k: tuple[Array, ...]
    q: Array
    k: Array
    v: Array
    q_pos: Array
    k_pos: Array
    seen: Array
    weight: Array


def _tile(rule: Rule, q: Array, k: Array, v: Array, tokens: tuple, plan: Plan, i: Array) -> _Tile:
    """Tile ``i`` of one round."""
    token, listed, weight = (
        lax.dynamic_index_in_dim(z, i, 2, keepdims=False)
        for z in (plan.token, plan.listed, plan.weight)
    )
    B, H = token.shape[:2]
    row, head = jnp.arange(B)[:, None, None], jnp.arange(H)[:, None]
    at_q = (row, head, jnp.maximum(token, 0))
    at_k = (row, head // (H // k.shape[1]), jnp.maximum(listed, 0))
    q_pos, q_seg, k_pos, k_seg = (z[row, at[2]] for z, at in zip(tokens, (at_q,) * 2 + (at_k,) * 2))
    q_seg, k_seg = jnp.where(token >= 0, q_seg, -1), jnp.where(listed >= 0, k_seg, -1)
    seen = seen_by_head(rule, q_pos, q_seg, k_pos, k_seg)
    return _Tile(at_q, at_k, q[at_q], k[at_k], v[at_k], q_pos, k_pos, seen, weight[:, :, None])


def _used(plan: Plan) -> tuple[Array, Array]:
    """The tiles of a round that hold a query in some row and head, before all others, and how many
    they are."""
    empty = jnp.all(plan.token[..., 0] < 0, (0, 1))
    return jnp.argsort(empty, stable=True), jnp.sum(~empty)


def _returned(tiles: Array, slot: Array) -> Array:
    """What is in the tiles [n B H T X], at their queries [B H N X]; anything where none is."""
    B, H, _ = slot.shape
    T, slot = tiles.shape[3], jnp.maximum(slot, 0)
    return tiles[slot // T, jnp.arange(B)[:, None, None], jnp.arange(H)[:, None], slot % T]


@jax.custom_vjp
def _attend(rule: Rule, q: Array, k: Array, v: Array, tokens: tuple, plan: Plan):
    """Heads first [B H N D], [B G M D] in, ``out`` [B H N E] and ``lse`` [B H N] out."""
    E = v.shape[-1]

    def add_round(carry, plan: Plan):
        tiles, used = _used(plan)

        def step(t, found):
            i = tiles[t]
            tile = _tile(rule, q, k, v, tokens, plan, i)
            z = biased_by_head(rule, tile.q, tile.k, tile.q_pos, tile.k_pos) + tile.weight
            z = jnp.where(tile.seen, z, MASK)
            peak = jnp.max(z, -1, keepdims=True)
            weight = jnp.where(tile.seen, jnp.exp(z - peak), 0.0)
            part = mixed(weight.astype(v.dtype), tile.v)
            sums = jnp.concatenate([peak, jnp.sum(weight, -1, keepdims=True), part], -1)
            return lax.dynamic_update_index_in_dim(found, sums, i, 0)

        B, H, n, T = plan.token.shape
        found = lax.fori_loop(0, used, step, jnp.zeros((n, B, H, T, 2 + E)))
        peak, more, part = jnp.split(_returned(found, plan.slot), [1, 2], -1)
        there = plan.slot >= 0
        peak, more = jnp.where(there, peak[..., 0], MASK), jnp.where(there, more[..., 0], 0.0)
        top, total, out = carry
        new_top = jnp.maximum(top, peak)
        old, new = jnp.exp(top - new_top), jnp.where(there, jnp.exp(peak - new_top), 0.0)
        out = out * old[..., None] + jnp.where(there[..., None], part, 0.0) * new[..., None]
        return (new_top, total * old + more * new, out), None

    rows = q.shape[:3]
    start = (jnp.full(rows, MASK), jnp.zeros(rows), jnp.zeros((*rows, E)))
    (top, total, out), _ = lax.scan(add_round, start, plan)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.where((total > 0)[..., None], out / safe[..., None], 0.0)
    return out, jnp.where(total > 0, top + jnp.log(safe), MASK)


def _forward(rule, q, k, v, tokens, plan):
    out, lse = _attend(rule, q, k, v, tokens, plan)
    return (out, lse), (rule, q, k, v, tokens, plan, out, lse)


def _backward(residuals, cotangents):
    rule, q, k, v, tokens, plan, out, lse = residuals
    d_out, d_lse = cotangents
    delta = jnp.einsum("...e,...e->...", d_out, out) - d_lse

    def add_round(carry, plan: Plan):
        tiles, used = _used(plan)
        d_rule, dq, dk, dv = carry

        def step(t, carry):
            d_rule, dk, dv, found = carry
            i = tiles[t]
            tile = _tile(rule, q, k, v, tokens, plan, i)
            z, pull = jax.vjp(
                lambda rule, q, k: biased_by_head(rule, q, k, tile.q_pos, tile.k_pos),
                rule,
                tile.q,
                tile.k,
            )
            do, rows = d_out[tile.at_q], lse[tile.at_q][..., None]
            p = jnp.where(tile.seen, jnp.exp(z + tile.weight - rows), 0.0)
            add_rule, add_q, add_k = pull(p * (scores(do, tile.v) - delta[tile.at_q][..., None]))
            dk = dk.at[tile.at_k].add(add_k.astype(jnp.float32))
            dv = dv.at[tile.at_k].add(collected(p, do))
            found = lax.dynamic_update_index_in_dim(found, add_q.astype(jnp.float32), i, 0)
            return jax.tree.map(jnp.add, d_rule, add_rule), dk, dv, found

        B, H, n, T = plan.token.shape
        found = jnp.zeros((n, B, H, T, q.shape[-1]))
        d_rule, dk, dv, found = lax.fori_loop(0, used, step, (d_rule, dk, dv, found))
        dq += jnp.where(plan.slot[..., None] >= 0, _returned(found, plan.slot), 0.0)
        return (d_rule, dq, dk, dv), None

    start = jax.tree.map(jnp.zeros_like, rule), *(jnp.zeros(z.shape) for z in (q, k, v))
    (d_rule, *grads), _ = lax.scan(add_round, start, plan)
    dq, dk, dv = (g.astype(z.dtype) for g, z in zip(grads, (q, k, v)))
    return d_rule, dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)
