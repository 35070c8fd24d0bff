"""Plans of the bucketed engine from buckets and time: who stands where, and who meets whom."""

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Queries
from attnlab.engines.meetings import Plan, Reach


def plan_runs(
    buckets: Array, count: int, length: int, queries: Queries, causal: bool
) -> tuple[Plan, Reach]:
    """Each token meets the ``length`` tokens of its bucket and document nearest to it in time, on
    either side (causal rules hide one).

    ``buckets`` [R B H N] in 0 .. ``count`` − 1. Every bucket begins a new tile, so that the place
    of a token in its tile depends on the tokens before it alone, and so do all its roundings.
    """
    N = queries.pos.shape[1]
    length = min(length, N)
    chunk = tile_of(length, N)
    buckets = jnp.where(queries.seg[:, None] >= 0, buckets, count)
    bucket, order, rank = sort_tokens(queries, buckets, count=count + 1)
    first = search(bucket, jnp.arange(count + 1))
    size = jnp.diff(first)
    tiles = -(-size // chunk)
    end = jnp.cumsum(tiles, -1)
    start = end - tiles
    T = max(1, min(N, (N + count * (chunk - 1)) // chunk))
    owner = jnp.minimum(search(end, jnp.arange(T), "right"), count - 1)

    def of_owner(z: Array) -> Array:
        return jnp.take_along_axis(z, owner, -1)[..., None]

    steps = jnp.arange(chunk)
    offset = (jnp.arange(T) - jnp.take_along_axis(start, owner, -1))[..., None] * chunk + steps
    taken = jnp.minimum(of_owner(first) + offset, N - 1)
    token = jnp.take_along_axis(order, taken.reshape(*taken.shape[:-2], -1), -1)
    token = jnp.where(offset < of_owner(size), token.reshape(taken.shape), -1)
    inside = jnp.minimum(buckets, count - 1)
    begin = jnp.take_along_axis(start * chunk - first[..., :-1], inside, -1)
    slot = jnp.clip(begin + rank, 0, T * chunk - 1)
    tiles_back = -(-length // chunk)
    reach = Reach(length, tiles_back, 0 if causal else tiles_back)
    return Plan(token, slot, rank + (length + 1) * buckets), reach


def tile_of(run: int, length: int) -> int:
    """Tokens per tile for runs of so many: half of one, which wastes little and is not too small
    for the products."""
    return min(length, max(8, -(-run // 2)))


def count_pairs(length: int, count: int, run: int, causal: bool) -> int:
    """Slots that meet in one round of `plan_runs`: tiles are computed whole, and each of ``count``
    buckets may leave one unfilled."""
    run = min(run, length)
    chunk = tile_of(run, length)
    tiles_back = -(-run // chunk)
    slots = min(length * chunk, length + count * (chunk - 1))
    return slots * chunk * (tiles_back + 1 + (0 if causal else tiles_back))


def sort_tokens(queries: Queries, *labels: Array, count: int = 2**31) -> tuple[Array, ...]:
    """Tokens by ``labels`` [R B H N] in 0 .. ``count`` − 1, then document, then position: the
    labels in that order, the token at each rank, and the rank of each token."""
    index = lax.broadcasted_iota(jnp.int32, queries.pos.shape, 1)
    empty_last = jnp.where(queries.seg >= 0, queries.seg, jnp.iinfo(jnp.int32).max)
    *_, by_time = lax.sort((empty_last, queries.pos, index), num_keys=2)
    order = jnp.broadcast_to(by_time[:, None], labels[0].shape)
    for label in reversed(labels):
        turn = stable_order(jnp.take_along_axis(label, order, -1), count)
        order = jnp.take_along_axis(order, turn, -1)
    found = (jnp.take_along_axis(label, order, -1) for label in labels)
    return (*found, order, inverse(order))


def search(rows: Array, values: Array, side: str = "left") -> Array:
    """`searchsorted` of ``values`` [K] in every sorted row of ``rows`` [... n]: [... K] int32."""
    flat = rows.reshape(-1, rows.shape[-1])
    found = jax.vmap(lambda row: jnp.searchsorted(row, values, side=side))(flat)
    return found.astype(jnp.int32).reshape(*rows.shape[:-1], -1)


def stable_order(labels: Array, count: int) -> Array:
    """`argsort` of the last axis of ``labels`` in 0 .. ``count`` − 1, equal ones in their order:
    int32. Label and index are sorted as one number where they fit into 31 bits, which takes a CPU a
    fifth of the time of sorting two."""
    n = labels.shape[-1]
    if count * n >= 2**31:
        return jnp.argsort(labels, -1, stable=True).astype(jnp.int32)
    return jnp.sort(labels.astype(jnp.int32) * n + jnp.arange(n), -1) % n


def inverse(order: Array) -> Array:
    """The place of each item in ``order`` [... n], a permutation: int32. On a CPU a scatter takes a
    hundredth of the time of another sort."""
    at = jnp.arange(order.shape[-1], dtype=jnp.int32)
    place = jnp.vectorize(lambda one: jnp.zeros_like(at).at[one].set(at), signature="(n)->(n)")
    return place(order)
