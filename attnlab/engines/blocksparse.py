"""Exact attention in which every tile of queries visits its own list of key blocks.

The lists are a table of indices, fixed or computed at run time, one for all heads or one for each:
what a router chooses, where `blockwise` serves predicates of positions. Masks inside a block are
the rule's own. Time and memory follow the length of the lists, not M.

Forward and backward are those of `blockwise` (online softmax; p = e^(z−lse) again in the backward
pass), with one loop over the tiles of queries: dq stays with its tile, dk and dv are added to the
blocks that the list names. Source: Child et al., arXiv 1904.10509; Dao et al., 2205.14135.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import kernels, report_use
from attnlab.products import collected, mixed, scores

NONE = np.iinfo(np.int32).max


class Tiled(NamedTuple):
    """Queries laid out for `visit`, in an order of their own for every head: ``q`` (rotated)
    [B H n T D]; ``pos``, ``seg`` [B H n T] int32, seg < 0 = empty."""

    q: Array
    pos: Array
    seg: Array


class Blocks(NamedTuple):
    """Key blocks: ``k`` (rotated) [B G m C D]; ``v`` [B G m C E]; ``pos``, ``seg`` [B m C]."""

    k: Array
    v: Array
    pos: Array
    seg: Array


def attend(
    queries: Queries, keys: Keys, rule: Rule, table: Array | np.ndarray, tile: int, block: int
) -> tuple[Array, Array]:
    """softmax(logits) v over the keys of the listed blocks; a row with no visible key gives 0.

    Query tile i is slots [i tile, (i+1) tile) of the call, key block j slots [j block, (j+1)
    block); the last of each may be short. ``table`` int32, broadcastable to [B H n L] with n the
    number of query tiles, lists the blocks that a tile visits; < 0 is none, and a block that is
    listed twice counts once. Returns ``out`` [B N H E] in the dtype of the queries and ``lse``
    [B H N] f32 (`MASK` for an empty row). Taps on logits and probabilities are not served.
    Cost: O(N L block (D + E)) time, O(N + M) memory.
    """
    queries, keys = queries.cleared(), keys.cleared()
    B, N, H, _ = queries.q.shape

    def alike(z: Array) -> Array:
        """The same order for all heads."""
        z = _cut(z, tile, 1)
        return jnp.broadcast_to(z[:, None], (B, H, *z.shape[1:]))

    q = rule.rotate(queries.q, queries.pos, "query").swapaxes(1, 2)
    pos, seg = alike(queries.pos), alike(jnp.where(queries.seg < 0, -1, queries.seg))
    out, lse = visit(
        Tiled(_cut(q, tile, 2), pos, _emptied(seg, N)), blocks_of(keys, rule, block), rule, table
    )
    out = out.reshape(B, H, -1, out.shape[-1])[:, :, :N].swapaxes(1, 2)
    return rule.tap("heads", out.astype(queries.q.dtype)), lse.reshape(B, H, -1)[..., :N]


def blocks_of(keys: Keys, rule: Rule, block: int) -> Blocks:
    """The slots of ``keys``, rotated, ``block`` at a time; the last block is filled up."""
    k = rule.rotate(keys.k, keys.pos, "key").swapaxes(1, 2)
    pos, seg = _cut(keys.pos, block, 1), _cut(keys.seg, block, 1)
    seg = _emptied(seg, keys.seg.shape[1])
    return Blocks(_cut(k, block, 2), _cut(keys.v.swapaxes(1, 2), block, 2), pos, seg)


def by_position(keys: Keys, block: int) -> Keys:
    """The keys laid out anew, so that slots [j block, (j+1) block) are one whole block of
    positions {p : ⌊p / block⌋ = J} of one document, or empty.

    Tokens of a document must lie in consecutive slots, in order. Blocks of which a token is not
    there are left out. A whole block covers exactly one slot whose number is a multiple of
    ``block``, which numbers it: ⌈M / block⌉ blocks suffice for any packing. Returns [B M' ...] with
    M' = ⌈M / block⌉ block.
    """
    keys = jax.tree.map(jnp.asarray, keys)
    B, M = keys.pos.shape
    here = jnp.arange(0, M, block)
    first = keys.pos[:, here] // block * block  # the position at which the block begins
    inside = jnp.arange(block)
    slots = (here - keys.pos[:, here] + first)[..., None] + inside  # [B m block]
    there = (slots >= 0) & (slots < M)
    slots = jnp.clip(slots, 0, M - 1).reshape(B, -1)
    pos, seg = (
        jnp.take_along_axis(z, slots, 1).reshape(B, -1, block) for z in (keys.pos, keys.seg)
    )
    there &= (seg == keys.seg[:, here, None]) & (pos == first[..., None] + inside) & (seg >= 0)
    seg = jnp.where(jnp.all(there, -1, keepdims=True), seg, -1).reshape(B, -1)
    k, v = (jnp.take_along_axis(z, slots[..., None, None], 1) for z in (keys.k, keys.v))
    return Keys(k, v, pos.reshape(B, -1), seg).cleared()


def visit(queries: Tiled, blocks: Blocks, rule: Rule, table) -> tuple[Array, Array]:
    """`attend` for tokens that are laid out already and may be ordered differently in every head:
    f32 ``out`` [B H n T E] and ``lse`` [B H n T]. ``table`` as in `attend`. A rule that asks for
    kernels is served by `kernels.lists` if it can."""
    B, H, n, _ = queries.pos.shape
    table = jnp.asarray(table, jnp.int32)
    form = kernels.choose_lists(rule, queries, blocks, table.shape[-1])
    report_use("blocksparse", str(form))
    table = jnp.broadcast_to(table, (B, H, n, table.shape[-1]))
    # Once each, in order, the empty entries behind.
    table = jnp.sort(jnp.where(table < 0, NONE, table), -1)
    again = jnp.pad(table[..., 1:] == table[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    table = jnp.sort(jnp.where(again, NONE, table), -1)
    if form.module:
        from attnlab.engines.kernels import lists  # Pallas, which most runs never load

        return lists.visit(form, queries, blocks, rule, table)
    q, pos, seg, table = (jnp.moveaxis(z, 2, 0) for z in (*queries, table))
    out, lse = _visit(rule, q, blocks.k, blocks.v, (pos, seg, table), blocks[2:])
    return jnp.moveaxis(out, 0, 2), jnp.moveaxis(lse, 0, 2)


def _cut(z: Array, size: int, axis: int) -> Array:
    """``axis`` [... N ...] as [... N/size size ...], filled up with 0."""
    widths = [(0, 0)] * z.ndim
    widths[axis] = (0, -z.shape[axis] % size)
    return jnp.pad(z, widths).reshape(*z.shape[:axis], -1, size, *z.shape[axis + 1 :])


def _emptied(seg: Array, length: int) -> Array:
    """Segments [... n T] of ``length`` slots, with what fills up the last tile marked empty."""
    slot = jnp.arange(seg.shape[-2] * seg.shape[-1]).reshape(seg.shape[-2:])
    return jnp.where(slot < length, seg, -1)


def _listed(index: Array, blocks: tuple[Array, ...], tokens: tuple[Array, ...]):
    """For every head the block it lists: [B H] of [B G m C D] -> [B H C D], with its positions and
    segments [B H C]; segments are −1 where the entry is `NONE`."""
    B, H = index.shape
    G, m = blocks[0].shape[1:3]
    row, group = jnp.arange(B)[:, None], jnp.arange(H) // (H // G)
    at = jnp.minimum(index, m - 1)
    k, v = (z[row, group, at] for z in blocks)
    pos, seg = (z[row, at] for z in tokens)
    return (row, group, at), k, v, pos, jnp.where((index == NONE)[..., None], -1, seg)


def seen_by_head(rule: Rule, q_pos: Array, q_seg: Array, k_pos: Array, k_seg: Array) -> Array:
    """`Rule.visible` with tokens [B H T], [B H C] that differ between heads: [B H T C]."""
    B, H = q_pos.shape[:2]
    flat = (z.reshape(B * H, -1) for z in (q_pos, q_seg, k_pos, k_seg))
    seen = rule.visible(*flat)
    return seen.reshape(B, H, *seen.shape[1:])


def biased_by_head(rule: Rule, q: Array, k: Array, q_pos: Array, k_pos: Array) -> Array:
    """`Rule.biased` with positions that differ between heads: [B H T D], [B H C D] -> [B H T C].

    A position module is asked once per head for that head alone; what it computes for the others
    is never used, and the compiler leaves it out.
    """
    z = rule.product(q, k)
    if not rule.position.biased:
        return z
    bias = []
    for h in range(z.shape[1]):
        one = rule.bias(q, q_pos[:, h], k_pos[:, h])
        assert one is not None
        bias.append(jnp.broadcast_to(one, z.shape)[:, h])
    return z + jnp.stack(bias, 1)


@jax.custom_vjp
def _visit(rule: Rule, q: Array, k: Array, v: Array, asking, answering):
    """Tiles first: q [n B H T D], ``asking`` = pos, seg [n B H T] and lists [n B H L]."""

    def query_tile(_, xs):
        q, pos, seg, table = xs

        def step(t, carry):
            top, total, out = carry
            _, k_t, v_t, k_pos, k_seg = _listed(table[..., t], (k, v), answering)
            seen = seen_by_head(rule, pos, seg, k_pos, k_seg)
            z = jnp.where(seen, biased_by_head(rule, q, k_t, pos, k_pos), MASK)
            new_top = jnp.maximum(top, jnp.max(z, -1))
            shrink = jnp.exp(top - new_top)
            weight = jnp.where(seen, jnp.exp(z - new_top[..., None]), 0.0)
            out = out * shrink[..., None] + mixed(weight.astype(v.dtype), v_t)
            return new_top, total * shrink + jnp.sum(weight, -1), out

        start = (jnp.full(pos.shape, MASK), jnp.zeros(pos.shape), jnp.zeros((*pos.shape, E)))
        top, total, out = lax.fori_loop(0, _longest(table), step, start)
        safe = jnp.where(total > 0, total, 1.0)
        return None, (out / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), MASK))

    E = v.shape[-1]
    return lax.scan(query_tile, None, (q, *asking))[1]


def _longest(table: Array) -> Array:
    """Entries of the longest list of [B H L]."""
    return jnp.max(jnp.sum(table != NONE, -1), initial=0)


def _forward(rule, q, k, v, asking, answering):
    out, lse = _visit(rule, q, k, v, asking, answering)
    return (out, lse), (rule, q, k, v, asking, answering, out, lse)


def _backward(residuals, cotangents):
    rule, q, k, v, asking, answering, out, lse = residuals
    d_out, d_lse = cotangents
    delta = jnp.einsum("...e,...e->...", d_out, out) - d_lse
    d_out = d_out.astype(v.dtype)

    def query_tile(carry, xs):
        q, pos, seg, table, lse, delta, d_out = xs

        def step(t, carry):
            d_rule, dk, dv, dq = carry
            at, k_t, v_t, k_pos, k_seg = _listed(table[..., t], (k, v), answering)
            z, pull = jax.vjp(
                lambda rule, q, k: biased_by_head(rule, q, k, pos, k_pos), rule, q, k_t
            )
            seen = seen_by_head(rule, pos, seg, k_pos, k_seg)
            p = jnp.where(seen, jnp.exp(z - lse[..., None]), 0.0)
            dp = scores(d_out, v_t)
            add_rule, add_q, add_k = pull(p * (dp - delta[..., None]))
            dv = dv.at[at].add(collected(p.astype(v.dtype), d_out))
            dk = dk.at[at].add(add_k.astype(jnp.float32))
            return jax.tree.map(jnp.add, d_rule, add_rule), dk, dv, dq + add_q

        *carry, dq = lax.fori_loop(0, _longest(table), step, (*carry, jnp.zeros(q.shape)))
        return tuple(carry), dq.astype(q.dtype)

    start = (jax.tree.map(jnp.zeros_like, rule), jnp.zeros(k.shape), jnp.zeros(v.shape))
    (d_rule, dk, dv), dq = lax.scan(query_tile, start, (q, *asking, lse, delta, d_out))
    return d_rule, dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_visit.defvjp(_forward, _backward)
