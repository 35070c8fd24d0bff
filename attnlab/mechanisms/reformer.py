"""The published LSH attention, chunked by rank in the sorted sequence: it leaks, see `Reformer`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Mechanism, Queries, Result
from attnlab.engines import bucketed, sorting, union
from attnlab.mechanisms.lsh import check_sizes, factors, hash_directions, shared_pair
from attnlab.refusals import refuse_causal, refuse_normaliser
from attnlab.registry import register


def plan_chunks(
    buckets: Array, chunk: int, queries: Queries, causal: bool
) -> tuple[bucketed.Plan, bucketed.Reach]:
    """The published rule: sort a document by (bucket, position), cut it into chunks, and meet those
    of one's bucket in one's own chunk and the next ones on either side; pairs met in several rounds
    count as often. ``buckets`` [R B H N].

    With a causal rule it LEAKS: the chunk of an early token is its rank among all tokens, later
    ones included. No configuration reaches that form; it is here to be measured.
    """
    N = queries.pos.shape[1]
    chunk = min(chunk, N)
    last = jnp.where(queries.seg >= 0, queries.seg, jnp.iinfo(jnp.int32).max)
    document = jnp.broadcast_to(last[:, None], buckets.shape)
    *_, order, rank = sorting.sort_tokens(queries, document, buckets)
    start = jax.vmap(lambda seg: jnp.searchsorted(jnp.sort(seg), seg))(last).astype(jnp.int32)
    code = (rank - start[:, None]) // chunk + 2 * buckets
    token = jnp.pad(order, [(0, 0)] * 3 + [(0, -N % chunk)], constant_values=-1)
    token = token.reshape(*token.shape[:-1], -1, chunk)
    reach = bucketed.Reach(codes=1, before=2, after=0 if causal else 2, united=False)
    return bucketed.Plan(token, rank, code), reach


@register
@dataclass(frozen=True)
class Reformer(Mechanism):
    """LSH attention as published, for encoders: softmax over one's bucket in three sorted chunks.

    As `lsh`, but a document is sorted by (bucket, position) and cut into chunks of ``chunk``; in
    each of ``rounds`` a token sees its bucket in its own chunk and the two beside it, and a key met
    in several rounds counts as often.
    This rule LEAKS where time has an order: chunk boundaries move when later tokens change, and
    with them what earlier tokens see, although every gradient to the future is 0. A causal rule is
    therefore refused; `lsh` has the same cost and does not leak.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(R N (log N + chunk (D + E))) time, for five chunks, as documents begin anywhere in one;
    O(N) memory; an encoder has nothing to continue, so its state is empty. Raises `UserError` for a
    causal rule, sizes below 1 or odd buckets, `ValueError` for keys that are not the queries'
    tokens. Source: Kitaev et al., arXiv 2001.04451.
    """

    rounds: int = 4
    buckets: int = 32
    chunk: int = 64
    seed: int = 0

    cost = Cost(time=1, memory=1, state=0)

    def __post_init__(self):
        check_sizes("reformer", rounds=self.rounds, buckets=self.buckets, chunk=self.chunk)

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        return {}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        self._refuse(rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state, key=key)
        queries, keys, buckets = self._hashed(queries, keys, key)
        plan, reach = plan_chunks(buckets, self.chunk, queries, rule.causal)
        out, lse = bucketed.attend(queries, keys, rule, plan, reach)
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        self._refuse(rule)
        queries, keys, buckets = self._hashed(queries, keys, key)
        times = jnp.stack([self._meet(z, queries) for z in buckets]).sum(0)
        out, lse, probs = union.attend(queries, keys, rule, times)
        return Result(out, state, {"lse": lse, "probs": probs})

    def _refuse(self, rule) -> None:
        refuse_normaliser("reformer", rule)
        refuse_causal("reformer", rule, "its chunks move when later tokens change", ["lsh"])

    def _hashed(self, queries, keys, key):
        queries, keys, u = shared_pair(queries, keys)
        key = jax.random.key(self.seed) if key is None else key
        return queries, keys, hash_directions(u, self.rounds, self.buckets, key)

    def _meet(self, bucket: Array, queries: Queries) -> Array:
        """One round, literally: [B H N] -> bool [B H N N]."""
        pos, seg = queries.pos[:, None], queries.seg[:, None]
        mine, other = bucket[..., :, None], bucket[..., None, :]
        here = (seg[..., :, None] == seg[..., None, :]) & (seg >= 0)[..., None, :]
        earlier = (other == mine) & (pos[..., None, :] < pos[..., :, None])
        chunk = jnp.sum(here & ((other < mine) | earlier), -1) // self.chunk
        near = jnp.abs(chunk[..., :, None] - chunk[..., None, :]) <= 1
        return here & (mine == other) & near

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = self.rounds * length * 5 * min(self.chunk, length)
        hashing = sum(factors(self.buckets)) // 2 * self.rounds * length * dims.key_dim
        return 2.0 * dims.heads * ((dims.key_dim + dims.value_dim) * pairs + hashing)

    @classmethod
    def examples(cls):
        return (cls(rounds=2, buckets=4, chunk=4),)
