"""Halves of a sequence, of which each query meets a part: keys sorted by a code, in blocks, and a
sample of them.

Tokens are counted from the start of their document. In the halving of step n the two halves of
every 2n tokens ask each other, with an order of time the second the first: each is a rectangle of n
keys, fewer at the end of a document. The steps n = S, 2S, 4S, ... and leaves of S tokens, inside
which all meet, together show every token once.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core import Array, Keys, Queries
from attnlab.engines import matching
from attnlab.engines.gathered import Plan, group
from attnlab.engines.sorting import inverse, stable_order


class Places(NamedTuple):
    """Tokens in the order of documents and time, int32: ``order`` [B M], the key at each place;
    ``start``, ``size`` [B M], where the document of a place begins, and its keys (0: empty slot).
    Of the queries [B N]: ``first`` and ``length``, the same of their document, and ``own``, their
    number in it (that of the newest key that is not later), −1 where there is none."""

    order: Array
    start: Array
    size: Array
    first: Array
    length: Array
    own: Array


class Rectangles(NamedTuple):
    """What queries ask, int32 [B N]: ``count`` keys (0: nothing) from place ``first`` on, those of
    rectangle ``index`` of the row, whose blocks are numbered from ``base`` on; ``offset`` is their
    own place in time in their half of ``step`` tokens, ``number`` that of the half they ask in its
    document. ``member`` [B M]: the rectangle of each place; ``most`` bounds them, and is none."""

    first: Array
    count: Array
    index: Array
    base: Array
    offset: Array
    number: Array
    member: Array
    step: Array | int
    most: int


class Codes(NamedTuple):
    """Of queries [B H N], and of keys at their places [B G M]: int32 in 0 .. ``values`` − 1; and
    the places in the ``order`` of codes [B G M]."""

    asking: Array
    answering: Array
    values: int
    order: Array


class Sizes(NamedTuple):
    """Keys of a ``block``, the most ``blocks`` of a row, ``samples`` of a rectangle, and queries of
    a ``tile``."""

    block: int
    blocks: int
    samples: int
    tile: int


def take(z: Array, at: Array) -> Array:
    """``z`` [B M] at the places ``at`` [B N]."""
    return jnp.take_along_axis(z, at, 1)


def search(rows: Array, values: Array, side: str) -> Array:
    """`searchsorted` of ``values`` [... K] in sorted ``rows`` [... n], int32."""
    find = jnp.vectorize(
        lambda row, value: jnp.searchsorted(row, value, side=side), signature="(n),(k)->(k)"
    )
    return find(rows, values).astype(jnp.int32)


def place(queries: Queries, keys: Keys) -> Places:
    """The `Places` of all tokens. Cost: sorts of N + M integers."""
    order = jnp.lexsort((keys.pos, keys.seg)).astype(jnp.int32)
    pos, seg = take(keys.pos, order), take(keys.seg, order)
    start, first = search(seg, seg, "left"), search(seg, queries.seg, "left")
    length = jnp.where(queries.seg >= 0, search(seg, queries.seg, "right") - first, 0)
    latest = matching.latest(queries.pos, queries.seg, pos, seg)
    own = jnp.where(latest >= 0, latest - first, -1)
    size = jnp.where(seg >= 0, search(seg, seg, "right") - start, 0)
    return Places(order, start, size, first, length, own)


def leaves(places: Places, leaf: int) -> tuple[Array, Array]:
    """Numbers >= 0 of the leaves of queries [B N] and keys [B M], −1 for those in none."""
    at = jnp.arange(places.order.shape[1])
    own = jnp.where(places.own >= 0, places.first + places.own // leaf * leaf, -1)
    theirs = places.start + (at - places.start) // leaf * leaf
    theirs = jnp.where(places.size > 0, theirs, -1)
    return own, take(theirs, inverse(places.order))


def halves(places: Places, step: Array | int, least: int, block: int, causal: bool) -> Rectangles:
    """The rectangles of one step, ``least`` or more. Blocks of a row: at most `most_blocks`."""
    length = places.order.shape[1]
    bound, most = -(-length // step), -(-length // least)
    half = places.own // step
    number = half ^ 1
    count = jnp.clip(places.length - number * step, 0, step)
    asks = (places.own >= 0) & ((half % 2 == 1) | (not causal))
    count = jnp.where(asks, count, 0)

    def index(first: Array, count: Array) -> Array:
        """Of the multiples of the step a whole half covers exactly one, which numbers it; one that
        is not whole has the number of the half before it, further on."""
        whole = count == step
        return -(-(first - jnp.where(whole, 0, step)) // step) + jnp.where(whole, 0, bound)

    first = places.first + number * step
    mine = jnp.where(count > 0, index(first, count), 0)
    other = (jnp.arange(length) - places.start) // step
    start = places.start + other * step
    size = jnp.clip(places.size - other * step, 0, step)
    asked = (size == step) | ((size > 0) & (other % 2 == 1) & (not causal))
    most = most if causal else 2 * most
    member = jnp.where(asked, index(start, size), most)
    base, first = mine * -(-step // block), jnp.where(count > 0, first, 0)
    offset = places.own - half * step
    number = jnp.where(count > 0, number, 0)
    return Rectangles(first, count, mine, base, offset, number, member, step, most)


def most_blocks(length: int, step: int, block: int, causal: bool) -> int:
    """Blocks of all halves of one step in a row of ``length`` keys."""
    return -(-length // step) * -(-step // block) * (1 if causal else 2)


def stretches(count: Array, samples: int) -> tuple[Array, Array]:
    """``count`` [...] cut into as many even stretches as there are ``samples``: where each begins,
    and its size, which may be 0: int32 [... samples]."""
    i, count = jnp.arange(samples + 1), count[..., None]
    begin = i * (count // samples) + i * (count % samples) // samples
    return begin[..., :-1], jnp.diff(begin, axis=-1)


def drawn(u: Array, size: Array) -> Array:
    """One of ``size`` numbers from 0 on, for each ``u`` uniform in [0, 1)."""
    return jnp.minimum((u * size).astype(jnp.int32), size - 1)


def proportional(offset: Array, step: Array | int, among: Array) -> Array:
    """The place among ``among`` keys that lies where ``offset`` lies among ``step``."""
    return (offset / jnp.asarray(step, jnp.float32) * among).astype(jnp.int32)


def rank_among_keys(rect: Rectangles, wanted: Array, keyed: Array, values: int) -> Array:
    """The rank of each query among the keys of its rectangle, [B H N]: in the run of keys of its
    own code, where it lies itself in time. Depends on nothing but the query and the keys.

    ``wanted`` [B H N] and ``keyed`` [B H M], sorted: index of the rectangle · ``values`` + code."""
    begin = search(keyed, (rect.index * values)[:, None], "left")
    low, high = (search(keyed, wanted, side) for side in ("left", "right"))
    return low - begin + proportional(rect.offset[:, None], rect.step, high - low)


def rank_among_queries(rect: Rectangles, wanted: Array, keyed: Array, values: int) -> Array:
    """The published rule: the rank of a query among the queries of its rectangle, sorted by code.

    With a causal rule it LEAKS: later queries of the rectangle move earlier ones to other blocks.
    No configuration reaches this form; it is here to be measured.
    """
    last = jnp.iinfo(jnp.int32).max
    wanted = jnp.where(rect.count[:, None] > 0, wanted, last)
    order = jnp.argsort(wanted, -1, stable=True)
    wanted = jnp.take_along_axis(wanted, order, -1)
    return inverse(order) - search(wanted, (rect.index * values)[:, None], "left")


def take_heads(z: Array, at: Array) -> Array:
    """``z`` [B M] at the places ``at`` [B G M]."""
    return jnp.take_along_axis(z[:, None], at, -1)


def plan(
    places: Places, rect: Rectangles, codes: Codes, u: Array, sizes: Sizes, rank: Callable
) -> Plan:
    """One round (without the axis of rounds): a query meets the block of its rectangle in which
    ``rank`` puts it, with weight 1, and of the others one key of each stretch, with the weight of
    the stretch. ``u`` [numbers H samples] uniform in [0, 1)."""
    B, H, _ = codes.asking.shape
    G, M = codes.answering.shape[1:]
    by_code = jnp.take_along_axis(
        codes.order, stable_order(take_heads(rect.member, codes.order), rect.most + 1), -1
    )
    keyed = rect.member[:, None] * codes.values + codes.answering
    keyed = jnp.repeat(jnp.take_along_axis(keyed, by_code, -1), H // G, 1)
    wanted = rect.index[:, None] * codes.values + codes.asking
    count = rect.count[:, None]
    at = jnp.clip(rank(rect, wanted, keyed, codes.values), 0, jnp.maximum(count, 1) - 1)
    block = jnp.where(count > 0, rect.base[:, None] + at // sizes.block, -1)
    tiles = jax.vmap(jax.vmap(lambda z: group(z, sizes.blocks, sizes.tile)))(block)
    token = tiles.pair.reshape(B, H, -1, sizes.tile)
    slot = jnp.where(block >= 0, tiles.slot, -1)

    some = jnp.maximum(token[..., 0], 0).reshape(B, -1)  # a query that stands for its tile
    first, count, index, base, number = (
        take(z, some).reshape(B, H, -1, 1)
        for z in (rect.first, rect.count, rect.index, rect.base, rect.number)
    )
    asks = token[..., :1] >= 0
    begin = search(keyed, index[..., 0] * codes.values, "left")[..., None]
    mine = tiles.table[..., None] - base  # the block, counted in its rectangle
    row, head = jnp.arange(B)[:, None, None, None], jnp.arange(H)[:, None, None]
    kv_head = head // (H // G)

    ranks = mine * sizes.block + jnp.arange(min(sizes.block, M))
    near = by_code[row, kv_head, jnp.clip(begin + ranks, 0, M - 1)]
    near = jnp.where(asks & (ranks < count), near, -1)

    low, size = stretches(count[..., 0], min(sizes.samples, M))
    far = jnp.clip(first + low + drawn(u[number[..., 0], head[..., 0]], size), 0, M - 1)
    theirs = (inverse(by_code)[row, kv_head, far] - begin) // sizes.block
    far = jnp.where(asks & (size > 0) & (theirs != mine), far, -1)
    listed = jnp.concatenate([near, far], -1)
    listed = jnp.where(listed >= 0, places.order[row, jnp.maximum(listed, 0)], -1)
    weight = jnp.log(jnp.maximum(size, 1).astype(jnp.float32))
    weight = jnp.concatenate([jnp.zeros(near.shape), weight], -1)
    return Plan(token, slot, listed, weight)
