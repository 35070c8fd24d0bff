"""Attention to the cells beside one's own, level by level, of tokens that stand in the slots of
their positions: what `blockwise.attend_sets` does after it has searched for what is in reach.

At level l each key stands for 2^l tokens, and ``block`` keys are a cell. The queries of the tokens
of a cell see it and those beside it at level 0, at all others only those beside it: one batch of
small products, one a cell. A tile of queries that lies in a single cell of several levels sees
theirs in one product. All levels together are one softmax; the backward pass recomputes it.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Keys, Pattern, Queries, Rule
from attnlab.engines import report_use
from attnlab.engines.tiling import Tokens, cut
from attnlab.products import collected, mixed, scores

LOGITS_IN_FLIGHT = 2**18
"""Most logits alive at once."""


class Level(NamedTuple):
    """Keys in cells, with an empty cell at either end: ``k`` (rotated) [B G cells block D], ``v``
    [B G cells block E], and their positions, segments and ``log_count`` [B cells block]."""

    k: Array
    v: Array
    pos: Array
    seg: Array
    log_count: Array


class Part(NamedTuple):
    """The keys of a level in the cell that lies ``offset`` cells after that of the query."""

    level: int
    offset: int
    pattern: Pattern


Group = tuple[Part, ...]
"""Parts of which a tile of queries sees equally many cells."""


class Seen(NamedTuple):
    """What a tile of queries in C cells sees of a group: the first cell of each part; its keys and
    values [B G C n D], [B G C n E] and their positions [B C n]; and what is added to logits, f32
    [B 1 C T/C n], `MASK` where a key is not seen."""

    starts: list[Array]
    k: Array
    v: Array
    pos: Array
    added: Array


def straight(tokens: Queries | Keys) -> Array:
    """Whether every token stands in the slot of its position, and each row is one document."""
    full = tokens.seg >= 0
    one = tokens.seg == jnp.max(tokens.seg, 1, keepdims=True)
    return jnp.all(~full | (one & (tokens.pos == jnp.arange(tokens.pos.shape[1]))))


def attend(
    queries: Queries, rule: Rule, block: int, *seen: tuple[Keys, Pattern]
) -> tuple[Array, Array]:
    """`blockwise.attend_sets` where all tokens are `straight`: slot i of level l, the l-th set, is
    for the positions from 2^l i on, and its pattern shows no cells but those named above.

    Cost: O(N block levels (D + E)) time, O(N) memory.
    """
    report_use("pyramid", "XLA")
    queries = queries.cleared()
    B, N, H, _ = queries.q.shape
    beside = (-1,) if rule.causal else (-1, 1)
    parts = [Part(0, 0, seen[0][1])]
    parts += [Part(n, z, pattern) for n, (_, pattern) in enumerate(seen) for z in beside]
    cells = min(LOGITS_IN_FLIGHT // (B * H * len(parts) * block**2), -(-N // block))
    tile = block << max(0, cells.bit_length() - 1)
    length = -(-N // tile) * tile
    levels = tuple(
        _in_cells(keys, rule, block, -(-length // (block << n))) for n, (keys, _) in enumerate(seen)
    )
    asking = Tokens(cut(queries.pos, tile, 0), cut(queries.seg, tile, -1))
    q = cut(rule.rotate(queries.q, queries.pos, "query"), tile, 0).swapaxes(2, 3)
    out, lse = _attend(_groups(parts, tile // block), rule, q, levels, asking)
    out = jnp.moveaxis(out, (0, 3), (1, 2)).reshape(B, -1, H, out.shape[-1])[:, :N]
    lse = jnp.moveaxis(lse, 0, 2).reshape(B, H, -1)[..., :N]
    return rule.tap("heads", out.astype(queries.q.dtype)), lse


def _groups(parts: list[Part], blocks: int) -> tuple[Group, ...]:
    """Those of one cell for a tile of as many ``blocks`` together, as large products are faster;
    each of the others by itself, as it saves a copy of the keys."""
    single = tuple(part for part in parts if blocks >> part.level <= 1)
    others = tuple((part,) for part in parts if blocks >> part.level > 1)
    return (*others, single) if single else others


def _in_cells(keys: Keys, rule: Rule, block: int, cells: int) -> Level:
    """The keys of a level in as many ``cells`` and the two empty ones."""
    keys = keys.cleared()

    def cut(z: Array, fill: int) -> Array:
        ends = (block, (cells + 1) * block - z.shape[1])
        z = jnp.pad(z, [(0, 0), ends] + [(0, 0)] * (z.ndim - 2), constant_values=fill)
        return z.reshape(z.shape[0], cells + 2, block, *z.shape[2:])

    log_count = keys.log_count
    log_count = jnp.zeros(keys.pos.shape) if log_count is None else log_count
    k = rule.rotate(keys.k, keys.pos, "key")
    k, v = (jnp.moveaxis(cut(z, 0), 3, 1) for z in (k, keys.v))
    return Level(k, v, cut(keys.pos, 0), cut(keys.seg, -1), cut(log_count, 0))


def _see(rule: Rule, group: Group, levels: tuple[Level, ...], i: Array, asking: Tokens) -> Seen:
    """What the tile ``i`` of queries sees, of which ``asking`` are the tokens [B T]."""
    (B, T), block = asking.pos.shape, levels[0].k.shape[3]
    many = max(1, T // (block << group[0].level))
    q_pos, q_seg = (z.reshape(B, many, -1, 1) for z in asking[:2])
    starts = [i * T // (block << part.level) + 1 + part.offset for part in group]
    found = []
    for part, start in zip(group, starts):
        level = levels[part.level]
        k, v = (lax.dynamic_slice_in_dim(z, start, many, 2) for z in level[:2])
        tokens = (lax.dynamic_slice_in_dim(z, start, many, 1) for z in level[2:])
        pos, seg, log_count = (z[:, :, None] for z in tokens)
        shown = rule.restrict(part.pattern).sees(q_pos, q_seg, pos, seg)
        found.append((k, v, pos[:, :, 0], jnp.where(shown, log_count, MASK)[:, None]))
    axes = (3, 3, 2, 4)
    return Seen(starts, *(jnp.concatenate(z, axis) for z, axis in zip(zip(*found), axes)))


def _logits(rule: Rule, q: Array, k: Array, q_pos: Array, k_pos: Array) -> Array:
    """`Rule.biased` in each of C cells: [B H T D], [B G C n D], [B T], [B C n] -> f32
    [B H C T/C n]."""
    (B, H, T, D), C = q.shape, k.shape[2]
    q = q.reshape(B, H, C, T // C, D)
    k = _for_heads(k, H).reshape(B * H * C, 1, -1, D)
    z = rule.product(q.reshape(B * H * C, 1, -1, D), k).reshape(*q.shape[:-1], -1)
    if not rule.position.biased:
        return z
    bias = jax.vmap(rule.bias, (2, 1, 1), 2)(q, q_pos.reshape(B, C, -1), k_pos)
    return z + jnp.asarray(bias)


def _for_heads(z: Array, heads: int) -> Array:
    return jnp.repeat(z, heads // z.shape[1], 1)


def _unite(
    groups: tuple[Group, ...], rule: Rule, q: Array, levels: tuple[Level, ...], asking: Tokens
) -> tuple[Array, Array]:
    """Tiles [tiles B H T D] in, ``out`` (f32) and ``lse`` in tiles out."""
    tiles, B, H, T, _ = q.shape

    def query_tile(_, xs):
        i, q, asking = xs
        seen = [_see(rule, group, levels, i, asking) for group in groups]
        logits = [_logits(rule, q, z.k, asking.pos, z.pos) + z.added for z in seen]
        # Above what is masked, so that rows which see nothing weigh it with exp(-large) = 0.
        tops = (jnp.max(z, -1).reshape(B, H, T) for z in logits)
        top = reduce(jnp.maximum, tops, jnp.full((B, H, T), MASK / 2))
        weights = [jnp.exp(z - top.reshape(*z.shape[:-1], 1)) for z in logits]
        total = sum(jnp.sum(w, -1).reshape(B, H, T) for w in weights)
        mixtures = (mixed(w.astype(z.v.dtype), _for_heads(z.v, H)) for w, z in zip(weights, seen))
        out = sum(z.reshape(B, H, T, -1) for z in mixtures)
        safe = jnp.where(total > 0, total, 1.0)
        return None, (out / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), MASK))

    return lax.scan(query_tile, None, (jnp.arange(tiles), q, asking))[1]


def _forward(groups, rule, q, levels, asking):
    out, lse = _attend(groups, rule, q, levels, asking)
    return (out, lse), (rule, q, levels, asking, out, lse)


def _backward(groups, residuals, cotangents):
    rule, q, levels, asking, out, lse = residuals
    d_out, d_lse = cotangents
    delta = jnp.einsum("...e,...e->...", d_out, out) - d_lse
    lse = jnp.where(lse > MASK, lse, 0.0)  # of rows that see nothing: what is masked stays at 0
    tiles, _, H, _, _ = q.shape
    dtype = levels[0].v.dtype

    def query_tile(carry, xs):
        i, q, asking, d_out, of_rows = xs
        d_rule, d_levels = carry
        dq = jnp.zeros(q.shape)
        for group in groups:
            seen = _see(rule, group, levels, i, asking)
            logits = partial(_logits, q_pos=asking.pos, k_pos=seen.pos)
            z, pull = jax.vjp(logits, rule, q, seen.k)
            lse, delta = (row.reshape(*z.shape[:-1], 1) for row in of_rows)
            do = d_out.reshape(*z.shape[:-1], -1)
            p = jnp.exp(z + seen.added - lse)
            dv = collected(p.astype(dtype), do)
            dv = jnp.sum(dv.reshape(*seen.v.shape[:2], -1, *seen.v.shape[2:]), 2)
            add_rule, add_q, dk = pull(p * (scores(do, _for_heads(seen.v, H)) - delta))
            d_rule, dq = jax.tree.map(jnp.add, d_rule, add_rule), dq + add_q
            d_levels = _added(d_levels, group, seen.starts, (dk, dv))
        return (d_rule, d_levels), dq

    start = (
        jax.tree.map(jnp.zeros_like, rule),
        [tuple(jnp.zeros(z.shape) for z in level[:2]) for level in levels],
    )
    xs = jnp.arange(tiles), q, asking, d_out.astype(dtype), (lse, delta)
    (d_rule, d_levels), dq = lax.scan(query_tile, start, xs)
    nothing = dict.fromkeys(("pos", "seg", "log_count"))
    d_levels = (
        level._replace(k=dk.astype(level.k.dtype), v=dv.astype(dtype), **nothing)
        for (dk, dv), level in zip(d_levels, levels)
    )
    return d_rule, dq.astype(q.dtype), tuple(d_levels), None


def _added(totals: list, group: Group, starts: list[Array], grads: tuple[Array, Array]) -> list:
    """The gradients of keys and values, with those of a group [B G C n D], [B G C n E]."""
    totals, parts = list(totals), zip(*(jnp.split(z, len(group), 3) for z in grads))
    for part, start, own in zip(group, starts, parts):
        so_far = totals[part.level]
        cut = (lax.dynamic_slice_in_dim(z, start, own[0].shape[2], 2) for z in so_far)
        totals[part.level] = tuple(
            lax.dynamic_update_slice_in_dim(z, old + new, start, 2)
            for z, old, new in zip(so_far, cut, own)
        )
    return totals


_attend = jax.custom_vjp(_unite, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
