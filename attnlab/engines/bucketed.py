"""Attention inside buckets: gather tokens bucket by bucket, attend locally, gather them back.

A `Plan` gives every token a slot. Slots stand in tiles of C; a tile of queries meets the tiles of
keys around its own, so that the work is one batch of small matrix products. Tokens move by gathers
only, in both directions and in both passes: a permutation's inverse is a permutation.

Several rounds r of plans are united: with N_ij the number of rounds in which i and j meet,
    out_i = Σ_r Σ_j e^(z_ij − ln N_ij − lse_i) v_j
is exactly the softmax over the union of what the rounds show. Rounds run one after the other, and
the backward pass recomputes their logits: dz = p ∘ (do vᵀ − rowsum(do ∘ o) + dlse).

A token meets itself only where it meets nothing else: with one vector for query and key its own
logit is always the largest. Source: Kitaev et al., arXiv 2001.04451.
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import report_use
from attnlab.products import collected, mixed, scores


class Plan(NamedTuple):
    """Who meets whom in R rounds.

    ``token`` [R B H T C]: the token in each slot, −1 in an empty one; ``slot`` [R B H N]: the slot
    of each token; ``code`` [R B H N]: two tokens of a document meet iff their codes differ by at
    most ``Reach.codes``. int32 all.
    """

    token: Array
    slot: Array
    code: Array


class Reach(NamedTuple):
    """How far a token sees: difference of codes, tiles of keys before and after its own tile, and
    whether a pair that meets in several rounds counts once (``united``) or as often."""

    codes: int
    before: int
    after: int
    united: bool = True


def tie(queries: Queries, keys: Keys) -> Array:
    """One vector per token and head, (q + k) / √2 in f32 [B N H D]: as q and k are projections of
    the same x, this is a single projection, (W_q + W_k) / √2. A kv head serves its query heads.

    Raises `ValueError` unless queries and keys are the same tokens.
    """
    q, k = queries.cleared().q, keys.cleared().k
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries and {k.shape[1]} keys are not the same tokens")
    k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
    return (q.astype(jnp.float32) + k.astype(jnp.float32)) * 2**-0.5


def attend(
    queries: Queries, keys: Keys, rule: Rule, plan: Plan, reach: Reach
) -> tuple[Array, Array]:
    """Softmax over the keys that each query meets in any round of ``plan``, and may see by the
    rule; a token that meets no other yields its own value.

    Queries [B N H D], keys [B N G D], values [B N G E] of the same tokens -> ``out`` [B N H E] in
    the dtype of the queries and ``lse`` [B H N] f32, over others (`MASK` where there are none).
    Cost: O(R N w (D + E)) time with w the slots in reach, O(N w) memory: one round at a time. A
    positional bias is computed for all heads at the places of each.
    """
    report_use("bucketed", "XLA")
    queries, keys = queries.cleared(), keys.cleared()
    H, G = queries.q.shape[2], keys.v.shape[2]
    v = jnp.repeat(keys.v, H // G, 2).swapaxes(1, 2)
    out, lse = _attend(
        reach,
        rule,
        rule.rotate(queries.q, queries.pos, "query").swapaxes(1, 2),
        jnp.repeat(rule.rotate(keys.k, keys.pos, "key"), H // keys.k.shape[2], 2).swapaxes(1, 2),
        v,
        (queries.pos, queries.seg),
        plan,
    )
    alone = (lse <= MASK) & (queries.seg >= 0)[:, None]
    out = jnp.where(alone[..., None], v, out)
    return rule.tap("heads", out.swapaxes(1, 2).astype(queries.q.dtype)), lse


def local_logits(rule: Rule, q: Array, k: Array, q_pos: Array, k_pos: Array) -> Array:
    """`Rule.biased` where every head has tokens of its own: [H B N D], [H B M D], positions
    [H B N], [H B M] -> f32 [H B N M]."""
    H = q.shape[0]
    if not rule.position.biased:
        return jax.vmap(rule.product)(q[:, :, None], k[:, :, None])[:, :, 0]

    def one(xs):
        head, q, k, q_pos, k_pos = xs
        z = rule.product(q[:, None], k[:, None])[:, 0]
        alike = jnp.broadcast_to(q[:, None], (q.shape[0], H, *q.shape[1:]))
        bias = jnp.asarray(rule.bias(alike, q_pos, k_pos))
        return z + jnp.broadcast_to(bias, (z.shape[0], H, *z.shape[1:]))[:, head]

    return lax.map(one, (jnp.arange(H), q, k, q_pos, k_pos))


def _placed(z: Array, token: Array) -> Array:
    """Tokens [B H N X] into their slots: [B H T C X]; an empty slot holds what does not matter."""
    at = jnp.maximum(token, 0).reshape(*token.shape[:2], -1, 1)
    return jnp.take_along_axis(z, at, 2).reshape(*token.shape, z.shape[-1])


def _returned(z: Array, slot: Array) -> Array:
    """What is in the slots [B H T C X], back to their tokens: [B H N X]."""
    flat = z.reshape(*z.shape[:2], -1, z.shape[-1])
    return jnp.take_along_axis(flat, slot[..., None], 2)


def _around(z: Array, reach: Reach, fill: int = 0) -> Array:
    """Tiles [B H T C ...] with their neighbours: [B H T w ...]."""
    T, many = z.shape[2], reach.before + 1 + reach.after
    pad = [(0, 0), (0, 0), (reach.before, reach.after)] + [(0, 0)] * (z.ndim - 3)
    padded = jnp.pad(z, pad, constant_values=fill)
    return jnp.concatenate([padded[:, :, i : i + T] for i in range(many)], 3)


def _folded(z: Array, reach: Reach) -> Array:
    """The transpose of `_around`: [B H T w X] -> [B H T C X], sums over the copies."""
    T, many = z.shape[2], reach.before + 1 + reach.after
    spread = [(0, 0), (0, 0)]
    parts = (
        jnp.pad(part, [*spread, (i, many - 1 - i), (0, 0), (0, 0)])
        for i, part in enumerate(jnp.split(z, many, 3))
    )
    return reduce(jnp.add, parts)[:, :, reach.before : reach.before + T]


def _heads_first(z: Array) -> Array:
    """[B H T n ...] -> [H (B T) n ...]."""
    z = z.swapaxes(0, 1)
    return z.reshape(z.shape[0], -1, *z.shape[3:])


class _Tiles(NamedTuple):
    """One round in tiles, [H (B T) C or w ...]: features, positions, who is seen [H (B T) C w]
    and ln N_ij."""

    q: Array
    k: Array
    v: Array
    q_pos: Array
    k_pos: Array
    seen: Array
    often: Array | float


def _tiles(reach: Reach, rule: Rule, q, k, v, tokens, codes: Array, plan: Plan) -> _Tiles:
    """``plan`` of one round, ``codes`` [R B H N] of all."""
    token = plan.token
    shape = plan.slot.shape
    pos, seg = (jnp.broadcast_to(z[:, None], shape)[..., None] for z in tokens)
    pos = _placed(pos, token)[..., 0]
    seg = jnp.where(token >= 0, _placed(seg, token)[..., 0], -1)

    def pair(z: Array, fill: int = 0) -> tuple[Array, Array]:
        return _heads_first(z), _heads_first(_around(z, reach, fill))

    (q_pos, k_pos), (q_seg, k_seg), (mine, theirs) = pair(pos), pair(seg, -1), pair(token, -1)

    def meets(code: Array) -> Array:
        asks, answers = pair(_placed(code[..., None], token)[..., 0])
        return jnp.abs(asks[..., :, None] - answers[..., None, :]) <= reach.codes

    seen = jax.vmap(rule.visible)(q_pos, q_seg, k_pos, k_seg) & meets(plan.code)
    seen &= mine[..., :, None] != theirs[..., None, :]
    often = 0.0
    if reach.united and codes.shape[0] > 1:
        often = jnp.log(jnp.maximum(jnp.sum(jax.vmap(meets)(codes), 0), 1).astype(jnp.float32))
    q, k, v = (_placed(z, token) for z in (q, k, v))
    k, v = _around(k, reach), _around(v, reach)
    return _Tiles(*map(_heads_first, (q, k, v)), q_pos, k_pos, seen, often)


def _unite(
    reach: Reach, rule: Rule, q, k, v, tokens: tuple[Array, Array], plan: Plan
) -> tuple[Array, Array]:
    """Heads first [B H N X] in and out, ``out`` f32; see `attend`."""

    def add_round(carry, plan_r):
        top, total, out = carry
        t = _tiles(reach, rule, q, k, v, tokens, plan.code, plan_r)
        z = jnp.where(t.seen, local_logits(rule, t.q, t.k, t.q_pos, t.k_pos) - t.often, MASK)
        peak = jnp.max(z, -1, keepdims=True)
        weight = jnp.where(t.seen, jnp.exp(z - peak), 0.0)
        part = mixed(weight.astype(v.dtype), t.v)
        sums = jnp.concatenate([peak, jnp.sum(weight, -1, keepdims=True), part], -1)
        B, H, T, C = plan_r.token.shape
        sums = sums.reshape(H, B, T, C, -1).swapaxes(0, 1)
        peak, more, part = jnp.split(_returned(sums, plan_r.slot), [1, 2], -1)
        peak, more = peak[..., 0], more[..., 0]
        new_top = jnp.maximum(top, peak)
        old, new = jnp.exp(top - new_top), jnp.exp(peak - new_top)
        out = out * old[..., None] + part * new[..., None]
        return (new_top, total * old + more * new, out), None

    rows = q.shape[:3]
    start = (jnp.full(rows, MASK), jnp.zeros(rows), jnp.zeros((*rows, v.shape[-1])))
    (top, total, out), _ = lax.scan(add_round, start, plan)
    real = (total > 0) & (tokens[1] >= 0)[:, None]
    safe = jnp.where(real, total, 1.0)
    out = jnp.where(real[..., None], out / safe[..., None], 0.0)
    return out, jnp.where(real, top + jnp.log(safe), MASK)


def _forward(reach, rule, q, k, v, tokens, plan):
    out, lse = _unite(reach, rule, q, k, v, tokens, plan)
    return (out, lse), (rule, q, k, v, tokens, plan, out, lse)


def _backward(reach, residuals, cotangents):
    rule, q, k, v, tokens, plan, out, lse = residuals
    d_out, d_lse = cotangents
    real = (lse > MASK)[..., None]
    d_out = jnp.where(real, d_out, 0.0)
    delta = jnp.where(real[..., 0], jnp.sum(d_out * out, -1) - d_lse, 0.0)
    of_rows = jnp.stack([lse, delta], -1)

    def add_round(carry, plan_r):
        B, H, T, _ = plan_r.token.shape
        t = _tiles(reach, rule, q, k, v, tokens, plan.code, plan_r)
        z, pull = jax.vjp(
            lambda rule, q, k: local_logits(rule, q, k, t.q_pos, t.k_pos), rule, t.q, t.k
        )
        rows = _heads_first(_placed(of_rows, plan_r.token))
        do = _heads_first(_placed(d_out.astype(v.dtype), plan_r.token))
        p = jnp.where(t.seen, jnp.exp(z - t.often - rows[..., :1]), 0.0)
        dv = collected(p.astype(v.dtype), do)
        dz = p * (scores(do, t.v) - rows[..., 1:])
        d_rule, dq, dk = pull(dz)

        def back(z: Array, fold: bool) -> Array:
            z = z.reshape(H, B, T, -1, z.shape[-1]).swapaxes(0, 1).astype(jnp.float32)
            return _returned(_folded(z, reach) if fold else z, plan_r.slot)

        added = d_rule, back(dq, False), back(dk, True), back(dv, True)
        return jax.tree.map(jnp.add, carry, added), None

    start = jax.tree.map(jnp.zeros_like, rule), *(jnp.zeros(z.shape) for z in (q, k, v))
    (d_rule, *grads), _ = lax.scan(add_round, start, plan)
    full = (tokens[1] >= 0)[:, None, :, None]
    dq, dk, dv = (jnp.where(full, g, 0.0).astype(z.dtype) for g, z in zip(grads, (q, k, v)))
    return d_rule, dq, dk, dv, None, None


_attend = jax.custom_vjp(_unite, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
