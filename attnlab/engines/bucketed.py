"""Attention inside buckets: gather tokens bucket by bucket, attend locally, gather them back.

A `Plan` gives every token a slot. Slots stand in tiles of C; a tile of queries meets the tiles of
keys around its own, so that the work is one batch of small matrix products. Tokens move by gathers
only, in both directions and in both passes: a permutation's inverse is a permutation.

Several rounds r of plans are united: with N_ij the number of rounds in which i and j meet,
    out_i = Σ_r Σ_j e^(z_ij − ln N_ij − lse_i) v_j
is exactly the softmax over the union of what the rounds show. Rounds run one after the other, each
some tiles at a time, so that neither their logits nor their copies of keys leave the cache; the
backward pass recomputes them: dz = p ∘ (do vᵀ − rowsum(do ∘ o) + dlse).

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

LOGITS_IN_FLIGHT = 2**18
"""Most logits alive at once."""


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
    Cost: O(R N w (D + E)) time with w the slots in reach, O(R N) memory for the plan and O(N) for
    the rest. A positional bias is computed for all heads at the places of each.
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
    """Tokens [B H N X] into slots [B H T C] of their heads: [H (B T) C X]; an empty slot holds what
    does not matter."""
    B, H, T, _ = token.shape
    row, head = jnp.arange(B * T)[:, None] // T, jnp.arange(H)[:, None, None]
    at = (row, head, _heads_first(jnp.maximum(token, 0)))
    # Without the barrier XLA would gather anew for each pair of tokens.
    return lax.optimization_barrier(z.at[at].get(mode="promise_in_bounds"))


def _returned(z: Array, slot: Array) -> Array:
    """What is in the slots [B H T C X], back to their tokens: [B H N X]."""
    flat = z.reshape(*z.shape[:2], -1, z.shape[-1])
    return jnp.take_along_axis(flat, slot[..., None], 2)


def _own(z: Array, reach: Reach) -> Array:
    """The tiles of queries among tiles [B H b + T + a C ...]: [B H T C ...]."""
    return z[:, :, reach.before : z.shape[2] - reach.after]


def _around(z: Array, reach: Reach) -> Array:
    """Each tile of queries with its neighbours: [B H b + T + a C ...] -> [B H T w ...]."""
    T, many = z.shape[2] - reach.before - reach.after, reach.before + 1 + reach.after
    return jnp.concatenate([z[:, :, i : i + T] for i in range(many)], 3)


def _folded(z: Array, reach: Reach) -> Array:
    """The transpose of `_around`: [B H T w X] -> [B H b + T + a C X], sums over the copies."""
    many = reach.before + 1 + reach.after
    beside = [(0, 0), (0, 0)]
    parts = (
        jnp.pad(part, [*beside, (i, many - 1 - i), (0, 0), (0, 0)])
        for i, part in enumerate(jnp.split(z, many, 3))
    )
    return reduce(jnp.add, parts)


def _heads_first(z: Array) -> Array:
    """[B H T n ...] -> [H (B T) n ...]."""
    z = z.swapaxes(0, 1)
    return z.reshape(z.shape[0], -1, *z.shape[3:])


def _heads_second(z: Array, batch: int) -> Array:
    """The inverse of `_heads_first`."""
    return z.reshape(z.shape[0], batch, -1, *z.shape[2:]).swapaxes(0, 1)


def _groups(reach: Reach, token: Array) -> tuple[Array, int]:
    """The tokens [B H T C] of one round with empty tiles around, [B H T' C], and how many tiles of
    queries to work on at a time: T' − before − after is a multiple of it."""
    B, H, T, C = token.shape
    most = LOGITS_IN_FLIGHT // (B * H * C * C * (reach.before + 1 + reach.after))
    size = -(-T // -(-T // max(1, most)))
    ends = (reach.before, reach.after + -T % size)
    return jnp.pad(token, [(0, 0), (0, 0), ends, (0, 0)], constant_values=-1), size


class _Tiles(NamedTuple):
    """Some tiles of a round, [H (B T) C or w ...]: features, positions, who is seen [H (B T) C w]
    and ln N_ij."""

    q: Array
    k: Array
    v: Array
    q_pos: Array
    k_pos: Array
    seen: Array
    often: Array | float


def _labels(tokens: tuple[Array, Array], plan: Plan) -> Array:
    """Position, segment and codes of every token, int32 [B H N 2 + R]."""
    pos, seg = (jnp.broadcast_to(z[:, None], plan.slot.shape[1:]) for z in tokens)
    return jnp.stack([pos, seg, *plan.code], -1)


def _tiles(reach: Reach, rule: Rule, q, k, v, labels: Array, r: Array, token: Array) -> _Tiles:
    """``token`` of the tiles of round ``r`` and of their neighbours [B H b + T + a C]."""
    own, around = _own(token, reach), _around(token, reach)
    asks, answers = (
        lax.optimization_barrier(jnp.moveaxis(_placed(labels, z), -1, 0)) for z in (own, around)
    )
    mine, theirs = _heads_first(own), _heads_first(around)
    q_seg, k_seg = (jnp.where(z >= 0, y[1], -1) for z, y in ((mine, asks), (theirs, answers)))

    def meets(i: Array | int) -> Array:
        ask, answer = asks[2:][i], answers[2:][i]
        return jnp.abs(ask[..., :, None] - answer[..., None, :]) <= reach.codes

    seen = jax.vmap(rule.visible)(asks[0], q_seg, answers[0], k_seg) & meets(r)
    seen &= mine[..., :, None] != theirs[..., None, :]
    often, rounds = 0.0, labels.shape[-1] - 2
    if reach.united and rounds > 1:
        times = sum(meets(i).astype(jnp.float32) for i in range(rounds))
        often = jnp.log(jnp.maximum(times, 1.0))
    q, k, v = _placed(q, own), *(_placed(z, around) for z in (k, v))
    return _Tiles(q, k, v, asks[0], answers[0], seen, often)


def _unite(
    reach: Reach, rule: Rule, q, k, v, tokens: tuple[Array, Array], plan: Plan
) -> tuple[Array, Array]:
    """Heads first [B H N X] in and out, ``out`` f32; see `attend`."""
    labels = _labels(tokens, plan)

    def add_round(carry, xs):
        (top, total, out), (r, plan_r) = carry, xs
        token, size = _groups(reach, plan_r.token)
        around = size + reach.before + reach.after

        def group(_, i):
            near = lax.dynamic_slice_in_dim(token, i * size, around, 2)
            t = _tiles(reach, rule, q, k, v, labels, r, near)
            z = jnp.where(t.seen, local_logits(rule, t.q, t.k, t.q_pos, t.k_pos) - t.often, MASK)
            peak = jnp.max(z, -1, keepdims=True)
            weight = jnp.where(t.seen, jnp.exp(z - peak), 0.0)
            part = mixed(weight.astype(v.dtype), t.v)
            sums = jnp.concatenate([peak, jnp.sum(weight, -1, keepdims=True), part], -1)
            return None, _heads_second(sums, q.shape[0])

        _, sums = lax.scan(group, None, jnp.arange((token.shape[2] - around) // size + 1))
        sums = _returned(_joined(sums), plan_r.slot)
        peak, more, part = jnp.split(sums, [1, 2], -1)
        peak, more = peak[..., 0], more[..., 0]
        new_top = jnp.maximum(top, peak)
        old, new = jnp.exp(top - new_top), jnp.exp(peak - new_top)
        out = out * old[..., None] + part * new[..., None]
        return (new_top, total * old + more * new, out), None

    rows = q.shape[:3]
    start = (jnp.full(rows, MASK), jnp.zeros(rows), jnp.zeros((*rows, v.shape[-1])))
    (top, total, out), _ = lax.scan(add_round, start, (jnp.arange(plan.slot.shape[0]), plan))
    real = (total > 0) & (tokens[1] >= 0)[:, None]
    safe = jnp.where(real, total, 1.0)
    out = jnp.where(real[..., None], out / safe[..., None], 0.0)
    return out, jnp.where(real, top + jnp.log(safe), MASK)


def _joined(z: Array) -> Array:
    """Groups of tiles [groups B H T C X] side by side: [B H (groups T) C X]."""
    z = jnp.moveaxis(z, 0, 2)
    return z.reshape(*z.shape[:2], -1, *z.shape[4:])


def _forward(reach, rule, q, k, v, tokens, plan):
    out, lse = _unite(reach, rule, q, k, v, tokens, plan)
    return (out, lse), (rule, q, k, v, tokens, plan, out, lse)


def _backward(reach, residuals, cotangents):
    rule, q, k, v, tokens, plan, out, lse = residuals
    d_out, d_lse = cotangents
    real = (lse > MASK)[..., None]
    d_out = jnp.where(real, d_out, 0.0)
    delta = jnp.where(real[..., 0], jnp.einsum("...e,...e->...", d_out, out) - d_lse, 0.0)
    of_rows = jnp.stack([lse, delta], -1)

    labels = _labels(tokens, plan)

    def add_round(carry, xs):
        r, plan_r = xs
        token, size = _groups(reach, plan_r.token)
        around = size + reach.before + reach.after

        def group(carry, i):
            d_rule, dk, dv = carry
            near = lax.dynamic_slice_in_dim(token, i * size, around, 2)
            t = _tiles(reach, rule, q, k, v, labels, r, near)
            z, pull = jax.vjp(
                lambda rule, q, k: local_logits(rule, q, k, t.q_pos, t.k_pos), rule, t.q, t.k
            )
            own = _own(near, reach)
            rows, do = _placed(of_rows, own), _placed(d_out.astype(v.dtype), own)
            p = jnp.where(t.seen, jnp.exp(z - t.often - rows[..., :1]), 0.0)
            dz = p * (scores(do, t.v) - rows[..., 1:])
            add_rule, dq, add_k = pull(dz)
            add_v = collected(p.astype(v.dtype), do)

            def added(total: Array, more: Array) -> Array:
                more = _folded(_heads_second(more.astype(jnp.float32), q.shape[0]), reach)
                more += lax.dynamic_slice_in_dim(total, i * size, around, 2)
                return lax.dynamic_update_slice_in_dim(total, more, i * size, 2)

            d_rule = jax.tree.map(jnp.add, d_rule, add_rule)
            dq = _heads_second(dq.astype(jnp.float32), q.shape[0])
            return (d_rule, added(dk, add_k), added(dv, add_v)), dq

        d_rule, *totals = carry
        start = (d_rule, *(jnp.zeros((*token.shape, z.shape[-1])) for z in (k, v)))
        groups = jnp.arange((token.shape[2] - around) // size + 1)
        (d_rule, dk, dv), dq = lax.scan(group, start, groups)
        dk, dv = (_own(z, reach) for z in (dk, dv))
        added = (_returned(z, plan_r.slot) for z in (_joined(dq), dk, dv))
        return (d_rule, *map(jnp.add, totals, added)), None

    start = jax.tree.map(jnp.zeros_like, rule), *(jnp.zeros(z.shape) for z in (q, k, v))
    (d_rule, *grads), _ = lax.scan(add_round, start, (jnp.arange(plan.slot.shape[0]), plan))
    full = (tokens[1] >= 0)[:, None, :, None]
    dq, dk, dv = (jnp.where(full, g, 0.0).astype(z.dtype) for g, z in zip(grads, (q, k, v)))
    return d_rule, dq, dk, dv, None, None


_attend = jax.custom_vjp(_unite, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
