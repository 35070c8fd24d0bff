"""A mask that values make: every query keeps the keys that say they matter most."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import dense, report_use
from attnlab.engines.undecayed import latest_document, pad
from attnlab.errors import UserError
from attnlab.refusals import key_of, refuse_bidirectional, refuse_taps
from attnlab.registry import register


class Kept(NamedTuple):
    """Slots of keys, of each kv head its own: ``k`` [B G W D] as the rule has rotated them, ``v``
    [B G W E], ``weight`` [B G W] f32 what is added to their logits, ``pos``, ``seg`` [B G W]
    (``seg`` < 0: empty)."""

    k: Array
    v: Array
    weight: Array
    pos: Array
    seg: Array


@register
@dataclass(frozen=True)
class DynamicMask(Mechanism):
    """Softmax over the w keys whose values say that they matter most, their say added to the logit.

        δ_j = a softplus(1/G Σ_g v_jg·Δ_g),   out_i = Σ_(j in T_i) softmax(q_i·k_j / √D + δ_j) v_j

    with T_i the w = ``kept`` keys of the largest δ, for each kv head, among those that query i may
    see, the later of equal ones first. A key that is dropped never returns, so decoding keeps w
    keys. No gradient passes the choice. a is 0 at the start, where T is a window; Δ [G E G]. To
    choose once among all tokens of a sequence lets later ones displace earlier ones, and is not
    offered. Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N (w + C) (D + E)) time in chunks of C = ``chunk`` queries, which choose among the w
    keys kept before them and their own; O(N) memory; the decoding state holds w keys for each kv
    head. Raises `UserError` for kept or chunk < 1 and, when called, without an order of time, for
    positions that look at whole rows, and for taps on logits while decoding.
    Source: Shi et al., arXiv 2508.02124.
    """

    kept: int = 256
    chunk: int = 128

    cost = Cost(time=1, memory=1, state=0)

    def __post_init__(self):
        if self.kept < 1 or self.chunk < 1:
            raise UserError(
                f"dynamic_mask: kept={self.kept}, chunk={self.chunk}; use kept, chunk >= 1"
            )

    def init(self, key: Array, dims: Dims):
        G, E = dims.kv_heads, dims.value_dim
        return {
            "gate": (G / E) ** 0.5 * jax.random.normal(key, (G, E, G)),
            "coefficient": jnp.zeros(G),
        }

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> Kept:
        pos = jnp.zeros((batch, dims.kv_heads, self.kept), jnp.int32)
        k = jnp.zeros((*pos.shape, dims.key_dim), dtype)
        v = jnp.zeros((*pos.shape, dims.value_dim), dtype)
        return Kept(k, v, jnp.zeros(pos.shape), pos, pos - 1)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        if rule.observed and not state:
            return self.reference(params, queries, keys, rule)
        _refuse(rule)
        refuse_taps("dynamic_mask", rule)
        report_use("dynamic_mask", "XLA")
        queries, keys = queries.cleared(), keys.cleared()
        (B, N, H, D), (G, E) = queries.q.shape, keys.v.shape[2:]
        size = min(self.chunk, N)

        def tiles(z: Array, fill: int = 0) -> Array:
            """[B N ...] -> [chunks B C ...]."""
            z = pad(z, size, fill)
            return jnp.moveaxis(z.reshape(B, -1, size, *z.shape[2:]), 1, 0)

        q, k = rule.rotate(queries.q, queries.pos, "query"), rule.rotate(keys.k, keys.pos, "key")
        tokens = tuple(map(tiles, (q, k, keys.v, _importance(params, keys), keys.pos)))
        dims = Dims(0, H, G, D, E)
        start = state or self.initial_state(dims, B, k.dtype)

        @jax.checkpoint
        def step(rule: Rule, kept: Kept, tokens: tuple) -> tuple[Kept, Array]:
            return _chunk(rule, kept, *tokens)

        after, out = lax.scan(
            lambda kept, tokens: step(rule, kept, tokens), start, (*tokens, tiles(keys.seg, -1))
        )
        out = jnp.moveaxis(out, (0, 3), (1, 2)).reshape(B, -1, H, E)[:, :N]
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, after if state else state, {})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        keys = keys.cleared()
        weight = jnp.moveaxis(_importance(params, keys), -1, 1)  # [B G M]
        larger = weight[..., :, None] > weight[..., None, :]
        later = (keys.pos[:, :, None] > keys.pos[:, None])[:, None]
        ahead = larger | ((weight[..., :, None] == weight[..., None, :]) & later)
        seen = rule.allowed(queries, keys)[:, None]
        count = jnp.einsum("bnm,bgmj->bgnj", seen[:, 0] * 1.0, ahead * 1.0)
        heads = queries.q.shape[2] // keys.k.shape[2]
        seen &= jnp.repeat(count < self.kept, heads, 1)
        weight = jnp.repeat(weight, heads, 1)[:, :, None]
        out, lse, probs = dense.attend(queries, keys, rule, seen, weight)
        return Result(out, state, {"lse": lse, "probs": probs})

    def limit(self, length: int):
        return dataclasses.replace(self, kept=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        size = min(self.chunk, length)
        meet = self.kept + size
        pairs = -(-length // size) * size * meet
        gates = length * dims.kv_heads**2 * dims.value_dim
        return 2.0 * (dims.heads * (dims.key_dim + dims.value_dim) * pairs + gates)

    @classmethod
    def examples(cls):
        return (cls(kept=4, chunk=5),)


def _refuse(rule: Rule) -> None:
    refuse_bidirectional("dynamic_mask", rule, "its choice is among what came before")
    if rule.position.whole:
        raise UserError(
            "attention dynamic_mask meets the keys it keeps in no order, so position "
            f"{key_of(rule.position)} has no row to look at; use rope, alibi or none"
        )


def _importance(params, keys: Keys) -> Array:
    """δ, f32 [B M G]."""
    v, G = keys.v.astype(jnp.float32), keys.v.shape[2]
    gate = jnp.einsum("bmfe,feg->bmg", v, params["gate"]) / G
    return params["coefficient"] * jax.nn.softplus(gate)


def _chunk(rule: Rule, kept: Kept, q, k, v, weight, pos, seg) -> tuple[Kept, Array]:
    """Tokens q [B C H D], k [B C G D], v [B C G E], weight [B C G], pos, seg [B C] after the slots
    ``kept``: the slots after them, and ``out`` [B H C E] f32."""
    B, C, H, _ = q.shape
    G, W = kept.pos.shape[1:]

    def heads(z: Array) -> Array:
        return jnp.broadcast_to(z[:, None], (B, G, C))

    new = Kept(k.swapaxes(1, 2), v.swapaxes(1, 2), weight.swapaxes(1, 2), heads(pos), heads(seg))
    pool = Kept(*(jnp.concatenate([a, b.astype(a.dtype)], 2) for a, b in zip(kept, new)))
    order = jnp.lexsort((pool.pos, lax.stop_gradient(pool.weight)))[..., ::-1]
    seen = rule.sees(pos[:, None, :, None], seg[:, None, :, None], *_rows(pool.pos, pool.seg))
    # Counted in the order of weights and put back: what is summed keeps its place, so that the
    # weight of a later token does not round an earlier output anew.
    count = jnp.cumsum(jnp.take_along_axis(seen, order[:, :, None], -1), -1)
    seen &= jnp.take_along_axis(count, jnp.argsort(order, -1)[:, :, None], -1) <= W
    seen = jnp.repeat(seen, H // G, 1)
    queries = Queries(q.swapaxes(1, 2), pos, seg)
    z = _logits(rule, queries, pool) + jnp.repeat(pool.weight, H // G, 1)[:, :, None]
    probs = rule.weights(jnp.where(seen, z, MASK), seen)
    probs = probs.reshape(B, G, H // G * C, -1).astype(pool.v.dtype)
    out = jnp.einsum("bgnp,bgpe->bgne", probs, pool.v, preferred_element_type=jnp.float32)
    return _best(pool, order, seg, jnp.max(kept.seg, (1, 2)), W), out.reshape(B, H, C, -1)


def _best(pool: Kept, order: Array, seg: Array, before: Array, length: int) -> Kept:
    """The first ``length`` slots, in ``order``, of the document that the tokens ``seg`` [B C] end
    in, which were preceded by the document ``before`` [B]."""
    latest, _ = latest_document(seg, before)
    alive = (pool.seg == latest[:, None, None]) & (pool.seg >= 0)
    first = jnp.argsort(~jnp.take_along_axis(alive, order, -1), -1, stable=True)[..., :length]
    slots = jnp.take_along_axis(order, first, -1)
    best = _taken(pool, slots)
    return best._replace(seg=jnp.where(jnp.take_along_axis(alive, slots, -1), best.seg, -1))


def _rows(*arrays: Array) -> tuple[Array, ...]:
    return tuple(z[:, :, None] for z in arrays)


def _taken(slots: Kept, order: Array) -> Kept:
    """The slots at ``order`` [B G W]."""

    def one(z: Array) -> Array:
        return jnp.take_along_axis(z, order.reshape(order.shape + (1,) * (z.ndim - 3)), 2)

    return Kept(*map(one, slots))


def _logits(rule: Rule, queries: Queries, pool: Kept) -> Array:
    """`Rule.biased` of queries [B H C D] where every kv head has keys of its own: [B H C P]."""
    z = rule.product(queries.q, pool.k)
    if not rule.position.biased:
        return z
    H, G, biases = z.shape[1], pool.pos.shape[1], []
    for g in range(G):
        bias = jnp.asarray(rule.bias(queries.q, queries.pos, pool.pos[:, g]))
        biases.append(jnp.broadcast_to(bias, z.shape)[:, g * H // G : (g + 1) * H // G])
    return z + jnp.concatenate(biases, 1)
