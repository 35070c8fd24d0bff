"""Exact attention for any Rule in O(N + M) memory: online softmax over tiles, own backward pass.

For every tile of queries only the tiles of keys that the rule can reach are visited, whatever
order the tokens are in: reach is computed from the positions and segments that the tokens carry.
A causal mask halves the work, a window makes it linear, and packed documents skip each other.

Forward, for the visited key tiles t of one query tile:
    m' = max(m, max z_t),  l' = l e^(m-m') + Σ e^(z_t-m'),  o' = o e^(m-m') + e^(z_t-m') v_t
and out = o / l, lse = m + ln l. Backward recomputes p = e^(z-lse) tile by tile:
    dv = pᵀ do,  dz = p ∘ (do vᵀ − rowsum(do ∘ o) + dlse),  (dq, dk, dparams) = the rule's own VJP.
Source: Milakov & Gimelshein, arXiv 1805.02867; Rabe & Staats, 2112.05682; Dao et al., 2205.14135.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.core import MASK, Array, Keys, Pattern, Queries, Rule
from attnlab.engines import dense, kernels, parts, report_use, rowwise
from attnlab.engines.tiling import Spans, Tokens, cut, reach, spans
from attnlab.products import collected, mixed, scores

BEFORE = np.int32(-1)
"""The tile before the first."""

LARGEST = 512
"""Most tokens of a tile."""

LOGITS_IN_FLIGHT = 2**20
"""Most logits alive at once (B H tile² f32: 4 MiB), about what the cache of a CPU core holds."""


def attend(
    queries: Queries, keys: Keys, rule: Rule, tile: int | None = None
) -> tuple[Array, Array]:
    """softmax(logits) v for any lengths N, M and any `Rule`; a row with no visible key gives 0.

    ``tile`` bounds the tokens per tile, which is chosen by shape. Returns ``out`` [B N H E] in
    the dtype of the queries and ``lse`` [B H N] f32 (`MASK` for an empty row), so that parts over
    different keys can be merged. Cost: O(visited pairs) time, O(N + M) memory. A rule whose taps
    want whole logits or probabilities is served by `dense`, one in which a query must meet all its
    keys at once by `rowwise`, and one that asks for kernels by `kernels.attention` if it can.
    """
    if rule.observed:
        out, lse, _ = dense.attend(queries, keys, rule)
        return out, lse
    if rule.whole:
        return rowwise.attend(queries, keys, rule)
    form = kernels.choose(rule, queries, keys, tile)
    report_use("blockwise", str(form))
    if not form.module:
        return _attend_sets(queries, rule, tile, (keys, rule, tile))
    from attnlab.engines.kernels import attention  # Pallas, which most runs never load

    queries, keys = queries.cleared(), keys.cleared()
    q = rule.rotate(queries.q, queries.pos, "query")
    k = rule.rotate(keys.k, keys.pos, "key")
    out, lse = attention.attend(form, queries._replace(q=q), keys._replace(k=k), rule)
    return rule.tap("heads", _shared(rule, out, lse).astype(queries.q.dtype)), lse


def attend_sets(
    queries: Queries,
    rule: Rule,
    tile: int,
    *seen: tuple[Keys, Pattern],
    key_tiles: tuple[int, ...] = (),
) -> tuple[Array, Array]:
    """One softmax over several sets of keys, each behind a pattern of its own, which together show
    a query no token twice.

    ``tile`` bounds the tokens per tile; with ``key_tiles``, one for each set, only of queries.
    Returns ``out`` and ``lse`` as `attend` does, and serves what it serves by itself: no taps on
    logits or probabilities, no rule in which a query must meet all its keys at once. The cost is
    the sum over the sets.
    """
    if rule.kernels != "xla":  # which serve a set at a time
        part = dataclasses.replace(rule, taps=())
        attended = (attend(queries, keys, part.restrict(p), tile) for keys, p in seen)
        outs, lses = zip(*((out.swapaxes(1, 2), lse) for out, lse in attended))
        out, lse = parts.merge(outs, lses)
        return rule.tap("heads", out.swapaxes(1, 2).astype(queries.q.dtype)), lse
    report_use("blockwise", "XLA")
    limits = key_tiles or (tile,) * len(seen)
    sets = ((k, rule.restrict(pattern), limit) for (k, pattern), limit in zip(seen, limits))
    return _attend_sets(queries, rule, tile, *sets)


def _attend_sets(
    queries: Queries, rule: Rule, limit: int | None, *seen: tuple[Keys, Rule, int | None]
) -> tuple[Array, Array]:
    """Some rows of the batch after the others: few rows leave room for large tiles."""
    B, N, H, _ = queries.q.shape
    rows = rows_at_once(B, H, min(N, limit or N))
    all_keys, rules, limits = zip(*seen)

    def some(part: tuple[Queries, tuple[Keys, ...]]) -> tuple[Array, Array]:
        queries, keys = part
        return _attend_rows(queries, rule, limit, *zip(keys, rules, limits))

    def cut_batch(z: Array) -> Array:
        return z.reshape(-1, rows, *z.shape[1:])

    if rows == B:
        out, lse = some((queries, all_keys))
    else:
        found = lax.map(some, jax.tree.map(cut_batch, (queries, all_keys)))
        out, lse = (z.reshape(B, *z.shape[2:]) for z in found)
    return rule.tap("heads", out), lse


def _attend_rows(
    queries: Queries, rule: Rule, limit: int | None, *seen: tuple[Keys, Rule, int | None]
) -> tuple[Array, Array]:
    queries = queries.cleared()
    B, N, H, _ = queries.q.shape
    q_tile = tile_size(N, B * H, limit)
    asking = Tokens(cut(queries.pos, q_tile, 0), cut(queries.seg, q_tile, -1))
    sets = (_tiled(keys, shown, B * H, k_limit) for keys, shown, k_limit in seen)
    q = _head_tiles(rule.rotate(queries.q, queries.pos, "query"), q_tile)
    out, lse = _attend(rule, q, tuple(sets), asking)
    out = jnp.moveaxis(out, (0, 3), (1, 2)).reshape(B, -1, H, out.shape[-1])[:, :N]
    lse = jnp.moveaxis(lse, 0, 2).reshape(B, H, -1)[..., :N]
    return _shared(rule, out, lse).astype(queries.q.dtype), lse


def _shared(rule: Rule, out: Array, lse: Array) -> Array:
    """``out`` [B N H E] f32, by the share that the normaliser leaves each row."""
    share = rule.normaliser.share(lse)
    return out if share is None else out * share.swapaxes(1, 2)[..., None]


def _tiled(keys: Keys, rule: Rule, rows: int, limit: int | None) -> Tiled:
    keys = keys.cleared()
    tile = tile_size(keys.k.shape[1], rows, limit)
    log_count = keys.log_count
    log_count = None if log_count is None else cut(log_count, tile, 0)
    tokens = Tokens(cut(keys.pos, tile, 0), cut(keys.seg, tile, -1), log_count)
    k = _head_tiles(rule.rotate(keys.k, keys.pos, "key"), tile)
    return Tiled(k, _head_tiles(keys.v, tile), tokens, rule.patterns)


def tile_size(length: int, rows: int, limit: int | None = None) -> int:
    """Tokens per tile for ``rows`` = B H simultaneous heads: large enough to keep the cores busy,
    small enough to stay in cache, and never more than ``limit``."""
    fitting = max(64, min(LARGEST, 1 << (int((LOGITS_IN_FLIGHT / rows) ** 0.5).bit_length() - 1)))
    return even_tile(length, min(limit or fitting, fitting))


def rows_at_once(batch: int, heads: int, length: int) -> int:
    """Rows of a batch to attend for at a time, which divide it: as many as leave room for tiles of
    ``length``, or the largest. All of them where several devices share the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return batch
    most = max(1, LOGITS_IN_FLIGHT // (heads * min(length, LARGEST) ** 2))
    return max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)


def even_tile(length: int, limit: int) -> int:
    """Tokens per tile, at most ``limit``, that divide ``length`` with little padding."""
    tile = -(-length // -(-length // limit))
    return tile if tile <= 8 or tile == length else min(limit, -(-tile // 8) * 8)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiled:
    """A set of keys in tiles: ``k`` (rotated) [tiles B G tile D], ``v`` [tiles B G tile E], and the
    ``patterns`` that show them."""

    k: Array
    v: Array
    tokens: Tokens
    patterns: tuple[Pattern, ...] = dataclasses.field(metadata={"static": True})


def _head_tiles(z: Array, tile: int) -> Array:
    """[B N heads D] -> [tiles B heads tile D]."""
    return jnp.swapaxes(cut(z, tile, 0), 2, 3)


def _next(near: Array, i: Array) -> Array:
    """The first tile to visit after tile ``i``, from one row of `reach`; a row at a time, because a
    table of all pairs of tiles is quadratic in the length."""
    return jnp.argmax(near & (jnp.arange(near.shape[0]) > i))


def _one(span: Spans) -> Spans:
    return Spans(*(z[None] for z in span))


def _grouped(z: Array, groups: int) -> Array:
    """[B H t X] -> [B G (H/G t) X]: the heads that share a kv head become rows of one matmul."""
    B, _, _, X = z.shape
    return z.reshape(B, groups, -1, X)


def _at(i: Array, *arrays: Array) -> tuple[Array, ...]:
    return tuple(lax.dynamic_index_in_dim(z, i, 0, keepdims=False) for z in arrays)


@jax.custom_vjp
def _attend(rule: Rule, q: Array, sets: tuple[Tiled, ...], asking: Tokens):
    """Tiles of heads in, tiles of ``out`` (f32) and ``lse`` out; see `attend`."""
    E = sets[0].v.shape[-1]

    def query_tile(_, xs):
        q, q_pos, q_seg, span = xs

        def visit(keys: Tiled, key_spans: Spans, carry):
            seeing = _seeing(rule, keys)
            near = reach(seeing, _one(span), key_spans)[0]
            G, dtype = keys.v.shape[2], keys.v.dtype

            def step(_, carry):
                i, top, total, out = carry
                i = _next(near, i)
                k_t, v_t = _at(i, keys.k, keys.v)
                tokens = keys.tokens.at(i)
                z = rule.biased(q, k_t, q_pos, tokens.pos) + tokens.added(seeing, q_pos, q_seg)
                new_top = jnp.maximum(top, jnp.max(z, -1))
                shrink = jnp.exp(top - new_top)
                weight = jnp.exp(z - new_top[..., None])
                part = mixed(_grouped(weight, G).astype(dtype), v_t)
                out = out * shrink[..., None] + part.reshape(out.shape)
                return i, new_top, total * shrink + jnp.sum(weight, -1), out

            return lax.fori_loop(0, jnp.sum(near), step, (BEFORE, *carry))[1:]

        # Above what is masked, so that rows which see nothing yet weigh it with exp(-large) = 0.
        rows = q.shape[:3]
        carry = jnp.full(rows, MASK / 2), jnp.zeros(rows), jnp.zeros((*rows, E))
        for keys, key_spans in zip(sets, all_spans):
            carry = visit(keys, key_spans, carry)
        top, total, out = carry
        safe = jnp.where(total > 0, total, 1.0)
        return None, (out / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), MASK))

    all_spans = [spans(keys.tokens) for keys in sets]
    return lax.scan(query_tile, None, (q, asking.pos, asking.seg, spans(asking)))[1]


def _seeing(rule: Rule, keys: Tiled) -> Rule:
    return dataclasses.replace(rule, patterns=keys.patterns)


def _forward(rule, q, sets, asking):
    out, lse = _attend(rule, q, sets, asking)
    return (out, lse), (rule, q, sets, asking, out, lse)


def _backward(residuals, cotangents):
    rule, q, sets, asking, out, lse = residuals
    d_out, d_lse = cotangents
    delta = jnp.einsum("...e,...e->...", d_out, out) - d_lse
    lse = jnp.where(lse > MASK, lse, 0.0)  # of rows that see nothing: what is masked stays at 0
    query_spans = spans(asking)

    def visit(keys: Tiled, carry):
        seeing, G, dtype = _seeing(rule, keys), keys.v.shape[2], keys.v.dtype
        d_outs = d_out.astype(dtype)

        def key_tile(carry, xs):
            k, v, tokens, span = xs
            near = reach(seeing, query_spans, _one(span))[:, 0]

            def step(_, carry):
                i, dq, d_rule, dk, dv = carry
                i = _next(near, i)
                q_i, lse_i, delta_i, do_i = _at(i, q, lse, delta, d_outs)
                q_pos, q_seg, _ = asking.at(i)
                z, pull = jax.vjp(
                    lambda rule, q, k: rule.biased(q, k, q_pos, tokens.pos), rule, q_i, k
                )
                p = jnp.exp(z + tokens.added(seeing, q_pos, q_seg) - lse_i[..., None])
                do_g = _grouped(do_i, G)
                dv += collected(_grouped(p, G).astype(dtype), do_g)
                dp = scores(do_g, v).reshape(p.shape)
                add_rule, add_q, add_k = pull(p * (dp - delta_i[..., None]))
                dq_i = lax.dynamic_index_in_dim(dq, i, 0, keepdims=False) + add_q
                dq = lax.dynamic_update_index_in_dim(dq, dq_i, i, 0)
                return i, dq, jax.tree.map(jnp.add, d_rule, add_rule), dk + add_k, dv

            start = (BEFORE, *carry, jnp.zeros(k.shape), jnp.zeros(v.shape))
            _, dq, d_rule, dk, dv = lax.fori_loop(0, jnp.sum(near), step, start)
            return (dq, d_rule), (dk.astype(k.dtype), dv.astype(dtype))

        return lax.scan(key_tile, carry, (keys.k, keys.v, keys.tokens, spans(keys.tokens)))

    carry, d_sets = (jnp.zeros(q.shape), jax.tree.map(jnp.zeros_like, rule)), []
    for keys in sets:
        carry, (dk, dv) = visit(keys, carry)
        d_sets.append(dataclasses.replace(keys, k=dk, v=dv, tokens=None))
    dq, d_rule = carry
    return d_rule, dq.astype(q.dtype), tuple(d_sets), None


_attend.defvjp(_forward, _backward)
