"""Locality-sensitive hashing: attention among tokens that point in similar directions."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Mechanism, Result
from attnlab.engines import bucketed, rings, sorting, union
from attnlab.errors import UserError
from attnlab.refusals import refuse_normaliser, refuse_taps
from attnlab.registry import register

FACTORISED = 64
"""From so many buckets on, two hashes of about the square root of the number make up one."""


def check_sizes(name: str, **sizes: int) -> None:
    """Raises `UserError` for a size below 1, or ``buckets`` that no hash makes."""
    buckets = sizes["buckets"]
    odd = buckets > 1 and buckets % (2 if buckets < FACTORISED else 4)
    if odd or min(sizes.values()) < 1:
        given = ", ".join(f"{field}={size}" for field, size in sizes.items())
        raise UserError(
            f"{name}: {given}; use at least 1 of each, and buckets=1, an even number, or from "
            f"{FACTORISED} on a multiple of 4"
        )


def factors(buckets: int) -> tuple[int, ...]:
    """Even sizes of the hashes whose product is ``buckets``; () for a single bucket."""
    if buckets < FACTORISED:
        return () if buckets == 1 else (buckets,)
    half = buckets // 2
    low = max(n for n in range(2, math.isqrt(buckets) + 1, 2) if half % n == 0)
    return (low, buckets // low)


def hash_directions(u: Array, rounds: int, buckets: int, key: Array) -> Array:
    """argmax([u R; −u R]) for random R: a cap of the sphere for every token, in every round.

    ``u`` [B N H D], every head with its own R -> int32 [rounds B H N] in 0 .. ``buckets`` − 1.
    P[h(x) = h(y)] falls with the angle, from 1 at 0° to 0 at 180°. Computed in f32.
    """
    u = jax.lax.stop_gradient(u.astype(jnp.float32))
    H, D = u.shape[2:]
    found = jnp.zeros((rounds, u.shape[0], H, u.shape[1]), jnp.int32)
    for i, size in enumerate(factors(buckets)):
        planes = jax.random.normal(jax.random.fold_in(key, i), (rounds, H, D, size // 2))
        # Tokens last: XLA on CPU looks for a maximum along the last axis one number at a time.
        y = jnp.einsum("bnhd,rhdp->rbhpn", u, planes)
        near = jnp.argmax(jnp.abs(y), -2).astype(jnp.int32)
        behind = jnp.take_along_axis(y, near[..., None, :], -2)[..., 0, :] < 0
        found = found * size + near + jnp.where(behind, size // 2, 0)
    return found


def shared_pair(queries, keys):
    """Query and key from one vector u: q = u and k = u / rms(u), so that q·k / √D = u·u' / |u'|:
    the temperature is the length of the query. Also u [B N H D], f32."""
    u = bucketed.tie(queries, keys)
    k = u * jax.lax.rsqrt(jnp.mean(u * u, -1, keepdims=True) + 1e-6)
    dtype = queries.q.dtype
    return queries._replace(q=u.astype(dtype)), keys._replace(k=k.astype(dtype)), u


@register
@dataclass(frozen=True)
class Lsh(Mechanism):
    """Attention among tokens that hash alike: softmax over ∪_r {j : h_r(j) = h_r(i), near in time}.

    Query and key are one vector u = (q + k) / √2, a single projection of x: logits u_i·u_j / |u_j|,
    buckets h_r(i) = argmax([u_i R_r; −u_i R_r]) in ``rounds`` rounds of ``buckets`` each (even; 1
    for no hash; from 64 on a product of two). In each round a token sees the ``length`` newest
    earlier tokens of its bucket and document (bidirectional: on either side), which later tokens
    cannot change, and itself only where it sees nothing else. A key met in several rounds counts
    once. R is drawn anew from ``key`` in training and from ``seed`` otherwise.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(R N (log N + length (D + E))) time, O(N) memory beside the N R codes; decoding keeps
    rounds · buckets rings of ``length`` tokens per head. Worth it from N > 4 rounds · length on,
    with buckets ≈ 2 N / length. Raises `UserError` for sizes below 1 or odd buckets, `ValueError`
    for keys that are not the queries' tokens.
    Source: Kitaev et al., arXiv 2001.04451, with a visible set that does not depend on later
    tokens (theirs: `reformer`).
    """

    rounds: int = 4
    buckets: int = 32
    length: int = 64
    seed: int = 0

    cost = Cost(time=1, memory=1, state=0)

    def __post_init__(self):
        check_sizes("lsh", rounds=self.rounds, buckets=self.buckets, length=self.length)

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        return rings.empty(dims, batch, self.rounds, self.buckets, self.length, dtype)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("lsh", rule)
        if rule.observed and not state:
            return self.reference(params, queries, keys, rule, key=key)
        queries, keys, buckets = self._hashed(queries, keys, key)
        if state:
            refuse_taps("lsh with a state", rule)
            out, state = rings.attend(state, queries, keys, rule, buckets)
            return Result(out, state)
        plan, reach = sorting.plan_runs(buckets, self.buckets, self.length, queries, rule.causal)
        out, lse = bucketed.attend(queries, keys, rule, plan, reach)
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("lsh", rule)
        queries, keys, buckets = self._hashed(queries, keys, key)
        if state:
            refuse_taps("lsh with a state", rule)
            out, state = rings.attend(state, queries, keys, rule, buckets)
            return Result(out, state)
        met = jnp.stack([union.meet(z, self.length, queries) for z in buckets]).any(0)
        out, lse, probs = union.attend(queries, keys, rule, met)
        return Result(out, state, {"lse": lse, "probs": probs})

    def _hashed(self, queries, keys, key):
        queries, keys, u = shared_pair(queries, keys)
        key = jax.random.key(self.seed) if key is None else key
        return queries, keys, hash_directions(u, self.rounds, self.buckets, key)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = self.rounds * sorting.count_pairs(length, self.buckets, self.length, causal)
        hashing = sum(factors(self.buckets)) // 2 * self.rounds * length * dims.key_dim
        return 2.0 * dims.heads * ((dims.key_dim + dims.value_dim) * pairs + hashing)

    @classmethod
    def examples(cls):
        return (cls(rounds=3, buckets=4, length=5), cls(rounds=1, buckets=64, length=3))
