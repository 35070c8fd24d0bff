"""Attention inside buckets: gather tokens bucket by bucket, attend locally, gather them back.

A `Plan` gives every token a slot. Slots stand in tiles of C; a tile of queries meets the tiles of
keys around its own, so that the work is one batch of small matrix products. Tokens move by gathers
only, in both directions and in both passes: a permutation's inverse is a permutation.

Several rounds r of plans are united: with M_ir the keys that i meets in round r for the first time,
    out_i = Σ_r Σ_{j ∈ M_ir} e^(z_ij − lse_i) v_j
is exactly the softmax over the union of what the rounds show. Heads run one after the other, in
them the rounds, and in these some tiles at a time, so that neither logits nor the keys of a head
leave the cache; the backward pass recomputes the logits: dz = p ∘ (do vᵀ − rowsum(do ∘ o) + dlse).

A token meets itself only where it meets nothing else: with one vector for query and key its own
logit is always the largest. Source: Kitaev et al., arXiv 2001.04451.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import report_use
from attnlab.engines.meetings import Plan, Reach, label, visible
from attnlab.products import collected, mixed, scores

LOGITS_IN_FLIGHT = 2**16
"""Most logits alive at once."""


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

    def repeated(z: Array) -> Array:
        return jnp.repeat(z, queries.q.shape[2] // z.shape[2], 2)

    v = repeated(keys.v)
    out, lse = _attend(
        reach,
        rule,
        rule.rotate(queries.q, queries.pos, "query"),
        repeated(rule.rotate(keys.k, keys.pos, "key")),
        v,
        (queries.pos, queries.seg),
        plan,
    )
    alone = ((lse <= MASK) & (queries.seg >= 0)[:, None]).swapaxes(1, 2)
    out = jnp.where(alone[..., None], v, out)
    return rule.tap("heads", out.astype(queries.q.dtype)), lse


def local_logits(rule: Rule, q: Array, k: Array, q_pos: Array, k_pos: Array) -> Array:
    """`Rule.biased` where every head has tokens of its own: [H B N D], [H B M D], positions
    [H B N], [H B M] -> f32 [H B N M]."""
    if not rule.position.biased:
        return rule.product(q, k)

    def one(xs):
        head, *rest = xs
        return _logits(rule, *rest, head=head, heads=q.shape[0])

    return lax.map(one, (jnp.arange(q.shape[0]), q, k, q_pos, k_pos))


def _logits(rule: Rule, q: Array, k: Array, q_pos: Array, k_pos: Array, *, head: Array, heads: int):
    """`local_logits` of one head: [B N D], [B M D], [B N], [B M] -> f32 [B N M]."""
    z = rule.product(q[:, None], k[:, None])[:, 0]
    if not rule.position.biased:
        return z
    alike = jnp.broadcast_to(q[:, None], (q.shape[0], heads, *q.shape[1:]))
    bias = jnp.asarray(rule.bias(alike, q_pos, k_pos))
    return z + jnp.broadcast_to(bias, (z.shape[0], heads, *z.shape[1:]))[:, head]


def _of_head(z: Array, head: Array) -> Array:
    """[B N H X] -> [B N X], contiguous: to gather rows that lie apart takes four times as long."""
    return lax.optimization_barrier(lax.dynamic_index_in_dim(z, head, 2, keepdims=False))


def _rows(z: Array, row: Array) -> Array:
    """``row`` [n C] of the features [B N X] of all tokens: [n C X]."""
    found = z.reshape(-1, z.shape[-1]).at[row].get(mode="promise_in_bounds")
    # Without the barrier XLA would gather anew for each pair of tokens.
    return lax.optimization_barrier(found)


def _returned(z: Array, slot: Array) -> Array:
    """What is in the slots [B T C X], back to their tokens [B N X]."""
    return jnp.take_along_axis(z.reshape(z.shape[0], -1, z.shape[-1]), slot[..., None], 1)


def _joined(z: Array) -> Array:
    """Groups of tiles [groups B T C X] side by side: [B (groups T) C X]."""
    z = jnp.moveaxis(z, 0, 1)
    return z.reshape(z.shape[0], -1, *z.shape[3:])


def _folded(z: Array, batch: int, reach: Reach) -> Array:
    """Tiles with their neighbours [(B T) w X] -> tiles [B b + T + a C X], sums over the copies."""
    z = z.reshape(batch, -1, *z.shape[1:])
    parts = (
        jnp.pad(part, [(0, 0), (i, reach.tiles - 1 - i), (0, 0), (0, 0)])
        for i, part in enumerate(jnp.split(z, reach.tiles, 2))
    )
    return reduce(jnp.add, parts)


def _group_size(reach: Reach, plan: Plan) -> int:
    """How many tiles of queries to work on at a time."""
    B, T, C = plan.token.shape[1:]
    most = LOGITS_IN_FLIGHT // (B * C * C * reach.tiles)
    return -(-T // -(-T // max(1, most)))


def _unite(
    reach: Reach, rule: Rule, q, k, v, tokens: tuple[Array, Array], plan: Plan
) -> tuple[Array, Array]:
    """[B N H X] in, ``out`` f32 [B N H E] and ``lse`` [B H N] out; see `attend`."""
    (B, N, H, _), E = q.shape, v.shape[-1]

    def add_head(outs, xs):
        head, plan = xs
        logits = partial(_logits, head=head, heads=H)
        out, lse = _unite_head(
            reach, rule, logits, tokens, plan, *(_of_head(z, head) for z in (q, k, v))
        )
        return lax.dynamic_update_index_in_dim(outs, out, head, 2), lse

    xs = jnp.arange(H), plan.by_head()
    out, lse = lax.scan(add_head, jnp.zeros((B, N, H, E)), xs)
    return out, lse.swapaxes(0, 1)


def _unite_head(reach: Reach, rule: Rule, logits, tokens, plan: Plan, q, k, v):
    """`_unite` of one head: [B N X], ``lse`` [B N]."""
    B, N, _ = q.shape
    size = _group_size(reach, plan)

    def add_round(carry, r):
        top, total, out = carry
        met = label(reach, tokens, plan, r, size)

        def group(_, i):
            asks, answers = near = met.group(i, size)
            seen = visible(reach, rule, near, r)
            z = logits(rule, _rows(q, asks.row), _rows(k, answers.row), asks.pos, answers.pos)
            z = jnp.where(seen, z, MASK)
            peak = jnp.max(z, -1, keepdims=True)
            weight = jnp.where(seen, jnp.exp(z - peak), 0.0)
            part = mixed(weight.astype(v.dtype), _rows(v, answers.row))
            sums = jnp.concatenate([peak, jnp.sum(weight, -1, keepdims=True), part], -1)
            return None, sums.reshape(B, size, *sums.shape[1:])

        _, sums = lax.scan(group, None, jnp.arange(met.asks.row.shape[1] // size))
        peak, more, part = jnp.split(_returned(_joined(sums), plan.slot[r]), [1, 2], -1)
        peak, more = peak[..., 0], more[..., 0]
        new_top = jnp.maximum(top, peak)
        old, new = jnp.exp(top - new_top), jnp.exp(peak - new_top)
        out = out * old[..., None] + part * new[..., None]
        return (new_top, total * old + more * new, out), None

    start = (jnp.full((B, N), MASK), jnp.zeros((B, N)), jnp.zeros((B, N, v.shape[-1])))
    (top, total, out), _ = lax.scan(add_round, start, jnp.arange(len(plan.slot)))
    real = (total > 0) & (tokens[1] >= 0)
    safe = jnp.where(real, total, 1.0)
    out = jnp.where(real[..., None], out / safe[..., None], 0.0)
    return out, jnp.where(real, top + jnp.log(safe), MASK)


def _forward(reach, rule, q, k, v, tokens, plan):
    out, lse = _unite(reach, rule, q, k, v, tokens, plan)
    return (out, lse), (rule, q, k, v, tokens, plan, out, lse)


def _backward(reach, residuals, cotangents):
    rule, q, k, v, tokens, plan, out, lse = residuals
    d_out, d_lse = cotangents
    H = q.shape[2]

    def add_head(carry, xs):
        d_rule, *grads = carry
        head, plan, lse, d_lse = xs
        mine, theirs, values, o, do = (_of_head(z, head) for z in (q, k, v, out, d_out))
        real = lse > MASK
        do = jnp.where(real[..., None], do, 0.0)
        delta = jnp.where(real, jnp.einsum("bne,bne->bn", do, o) - d_lse, 0.0)
        of_rows = do.astype(v.dtype), jnp.stack([lse, delta], -1)
        logits = partial(_logits, head=head, heads=H)
        add_rule, *more = _head_backward(
            reach, rule, logits, tokens, plan, (mine, theirs, values), of_rows
        )
        grads = (
            lax.dynamic_update_index_in_dim(total, new.astype(total.dtype), head, 2)
            for total, new in zip(grads, more)
        )
        return (jax.tree.map(jnp.add, d_rule, add_rule), *grads), None

    start = jax.tree.map(jnp.zeros_like, (rule, q, k, v))
    xs = jnp.arange(H), plan.by_head(), lse.swapaxes(0, 1), d_lse.swapaxes(0, 1)
    grads, _ = lax.scan(add_head, start, xs)
    return *grads, None, None


def _head_backward(reach: Reach, rule: Rule, logits, tokens, plan: Plan, features, of_rows):
    """Gradients in the rule and in the ``features`` q, k, v of one head [B N X], the latter f32;
    ``of_rows`` are d_out [B N E] and (lse, delta) [B N 2]."""
    q, k, v = features
    B = len(q)
    size = _group_size(reach, plan)

    def add_round(carry, r):
        d_rule, *totals = carry
        met = label(reach, tokens, plan, r, size)
        T, C = met.asks.row.shape[1:]

        def group(carry, i):
            d_rule, dk, dv = carry
            asks, answers = near = met.group(i, size)
            z, pull = jax.vjp(
                lambda rule, q, k: logits(rule, q, k, asks.pos, answers.pos),
                rule,
                _rows(q, asks.row),
                _rows(k, answers.row),
            )
            do, rows = (_rows(z, asks.row) for z in of_rows)
            p = jnp.where(visible(reach, rule, near, r), jnp.exp(z - rows[..., :1]), 0.0)
            dz = p * (scores(do, _rows(v, answers.row)) - rows[..., 1:])
            add_rule, dq, add_k = pull(dz)
            add_v = collected(p.astype(v.dtype), do)

            def added(total: Array, more: Array) -> Array:
                more = _folded(more.astype(jnp.float32), B, reach)
                more += lax.dynamic_slice_in_dim(total, i * size, more.shape[1], 1)
                return lax.dynamic_update_slice_in_dim(total, more, i * size, 1)

            d_rule = jax.tree.map(jnp.add, d_rule, add_rule)
            dq = dq.astype(jnp.float32).reshape(B, size, *dq.shape[1:])
            return (d_rule, added(dk, add_k), added(dv, add_v)), dq

        slots = B, T + reach.tiles - 1, C
        start = (d_rule, *(jnp.zeros((*slots, z.shape[-1])) for z in (k, v)))
        (d_rule, dk, dv), dq = lax.scan(group, start, jnp.arange(T // size))
        dk, dv = (z[:, reach.before : reach.before + T] for z in (dk, dv))
        added = (_returned(z, plan.slot[r]) for z in (_joined(dq), dk, dv))
        return (d_rule, *map(jnp.add, totals, added)), None

    start = jax.tree.map(jnp.zeros_like, rule), *(jnp.zeros(z.shape) for z in features)
    (d_rule, *grads), _ = lax.scan(add_round, start, jnp.arange(len(plan.slot)))
    full = (tokens[1] >= 0)[..., None]
    return d_rule, *(jnp.where(full, g, 0.0) for g in grads)


_attend = jax.custom_vjp(_unite, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
