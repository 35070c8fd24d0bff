"""HyperAttention: exact near by; of each earlier half what hashes alike, and a sample."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule, count_pairs
from attnlab.engines import blockwise, dense, gathered, halving, parts, sorting
from attnlab.errors import UserError
from attnlab.refusals import refuse_normaliser
from attnlab.registry import register

MOST_PLANES = 12


@register
@dataclass(frozen=True)
class Hyper(Mechanism):
    """HyperAttention: exact in leaves; from each earlier half, a sorted block and a sample.

    By halving: tokens are counted from the start of their document and cut into leaves of S =
    ``leaf``, exact inside. For n = S, 2S, 4S, ... a query in the second half of 2n tokens meets the
    n keys of the first: those of its block, and one of every stretch of c keys for the others,
        row_i = Σ_(j in block(i)) e^(z_ij) + Σ_(j in J, not in block(i)) c e^(z_ij)
    the leaf and all halves in one softmax. Bidirectional, the first half meets the second as well.
    (Published, that form has one rectangle of all tokens, O(N), and nothing exact near by.)
    Block: the n keys sorted by h, b = ``block`` at a time; h(u) is the number, in the Gray code, of
    the signs of ``planes`` projections of u as the position module turns it, so that neighbours
    differ by one sign. A query takes the block in which the keys of its own h lie, at its own place
    in time among them. To sort queries among queries, as published, lets later ones move earlier
    ones to other blocks: `halving.rank_among_queries`.
    Sample: one key of each of m = ``samples`` even stretches of time, for each head and half, so
    that the mean of e^lse is the true row sum. (The paper's second step, which samples values by
    their norm, is not in its code either.) Planes and samples are drawn from ``key`` in training
    and from ``seed`` otherwise.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N (S + (b + m) log(N / S)) (D + E)) time, O(N) memory and O(N log(N / S)) for places;
    decoding keeps all keys and values, and sorts them at every call. It is softmax where N <= S,
    b >= N or m >= N. Raises `UserError` for sizes below 1, more than 12 planes, and more halves and
    codes than 31 bits can tell apart.
    Source: Han et al., arXiv 2310.05869.
    """

    leaf: int = 256
    block: int = 64
    samples: int = 64
    planes: int = 7
    seed: int = 0

    cost = Cost(time=1, memory=1, state=1)
    isotropic = False  # planes have directions of their own

    def __post_init__(self):
        least = min(self.leaf, self.block, self.samples, self.planes)
        if least < 1 or self.planes > MOST_PLANES:
            raise UserError(
                f"hyper: leaf={self.leaf}, block={self.block}, samples={self.samples}, "
                f"planes={self.planes}; use at least 1 of each, and planes <= {MOST_PLANES}"
            )

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        if rule.observed:
            return self.reference(params, queries, keys, rule, state, key=key)
        self._refuse(rule, keys)
        plain = dataclasses.replace(rule, taps=())
        places = halving.place(queries, keys)
        own, theirs = halving.leaves(places, self.leaf)
        near = queries._replace(seg=own), keys._replace(seg=theirs)
        out, lse = blockwise.attend(*near, plain, min(512, max(64, self.leaf)))
        if keys.pos.shape[1] > self.leaf:
            plan = self._plan(places, queries, keys, plain, key)
            far = gathered.attend(queries, keys, plain, plan)
            out, lse = parts.merge([out.swapaxes(1, 2), far[0]], [lse, far[1]])
            out = out.swapaxes(1, 2).astype(queries.q.dtype)
        return Result(rule.tap("heads", out), state, {"lse": lse})

    def _refuse(self, rule: Rule, keys: Keys) -> None:
        refuse_normaliser("hyper", rule)
        length = keys.pos.shape[1]
        halves = 2 * -(-length // self.leaf) + 1
        if halves << self.planes >= 2**31:
            raise UserError(
                f"hyper: planes={self.planes} with {length} keys in leaves of {self.leaf}; "
                f"use planes <= {((2**31 - 1) // halves).bit_length() - 1}"
            )

    def _plan(self, places, queries: Queries, keys: Keys, rule: Rule, key) -> gathered.Plan:
        asking, answering = self._hash(queries, keys, rule, key)
        answering = jnp.take_along_axis(answering, places.order[:, None], -1)
        order = sorting.stable_order(answering, 2**self.planes)
        codes = halving.Codes(asking, answering, 2**self.planes, order)
        N, M, b = asking.shape[2], answering.shape[2], self.block
        steps = self.steps(M)
        blocks = max(halving.most_blocks(M, n, b, rule.causal) for n in steps)
        sizes = halving.Sizes(b, blocks, self.samples, min(N, self._tile))

        def one(level: Array) -> gathered.Plan:
            rect = halving.halves(places, self.leaf << level, self.leaf, b, rule.causal)
            u = self._draw(key, level, asking.shape[1], M)
            return halving.plan(places, rect, codes, u, sizes, self._rank)

        return lax.map(one, jnp.arange(len(steps)))

    _rank = staticmethod(halving.rank_among_keys)

    @property
    def _tile(self) -> int:
        """Queries of one block in a tile."""
        return min(128, max(8, self.block // 2))

    def steps(self, length: int) -> list[int]:
        """The keys of a half of so many tokens, from the smallest on."""
        leaves = -(-length // self.leaf)
        return [self.leaf << level for level in range((leaves - 1).bit_length())]

    def _hash(self, queries: Queries, keys: Keys, rule: Rule, key) -> tuple[Array, Array]:
        """The codes of queries [B H N] and keys [B G M], in f32 whatever the inputs."""
        key = jax.random.fold_in(jax.random.key(self.seed) if key is None else key, 0)
        q, k = lax.stop_gradient((queries.cleared().q, keys.cleared().k))
        q = rule.rotate(q.astype(jnp.float32), queries.pos, "query")
        k = rule.rotate(k.astype(jnp.float32), keys.pos, "key")
        planes = jax.random.normal(key, (q.shape[-1], self.planes))
        return gray_codes(q, planes), gray_codes(k, planes)

    def _draw(self, key, level: Array | int, heads: int, length: int) -> Array:
        """Uniform in [0, 1), for each half of a level: [halves H samples]."""
        key = jax.random.key(self.seed) if key is None else key
        key = jax.random.fold_in(jax.random.fold_in(key, 1), level)
        shape = heads, min(self.samples, length)
        halves = jnp.arange(-(-length // self.leaf))
        each = jax.vmap(jax.random.fold_in, (None, 0))(key, halves)
        return jax.vmap(lambda key: jax.random.uniform(key, shape))(each)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        self._refuse(rule, keys)
        M = keys.pos.shape[1]
        full = (keys.seg >= 0)[:, None]
        mine = (queries.seg[..., None] == keys.seg[:, None]) & full  # [B N M], of one document
        theirs = (keys.seg[..., None] == keys.seg[:, None]) & full
        i = jnp.sum(mine & (keys.pos[:, None] <= queries.pos[..., None]), -1) - 1
        j = jnp.sum(theirs & (keys.pos[:, None] < keys.pos[..., None]), -1)
        seen = mine & ((i // self.leaf)[..., None] == (j // self.leaf)[:, None])
        seen, weight = seen[:, None], jnp.zeros(())
        asking, answering = self._hash(queries, keys, rule, key)
        answering = jnp.repeat(answering, asking.shape[1] // answering.shape[1], 1)
        for level, n in enumerate(self.steps(M)):
            half, other = i // n, j // n
            inside = mine & ((half ^ 1)[..., None] == other[:, None])
            if rule.causal:
                inside &= (half % 2 == 1)[..., None]
            among = theirs & (other[..., None] == other[:, None])
            u = jnp.moveaxis(self._draw(key, level, asking.shape[1], M)[other], 2, 1)
            met = (inside, among), (i % n, j % n, n), (asking, answering), u
            block, factor = self._met(*met)
            seen = seen | block | (factor > 0)
            weight = weight + jnp.log(jnp.maximum(factor, 1.0))
        out, lse, probs = dense.attend(queries, keys, rule, seen, weight)
        return Result(out, state, {"lse": lse, "probs": probs})

    def _met(self, pairs, at, codes, u) -> tuple[Array, Array]:
        """What each query meets of the half it asks, literally: the keys of its block, and the
        factor of those drawn besides [B H N M].

        ``pairs``: which keys a query asks [B N M], which keys are of one half [B M M]; ``at``: the
        place in time of queries and keys in their half, and its tokens; ``u`` [B H M samples] what
        is drawn in the half of a key."""
        (asking, answering), (inside, among) = codes, (z[:, None] for z in pairs)
        i, j, n = at[0][:, None], at[1][:, None], at[2]
        before = answering[..., None, :] < answering[..., :, None]
        same = answering[..., None, :] == answering[..., :, None]
        before |= same & (j[..., None, :] < j[..., :, None])
        rank = jnp.sum(among & before, -1)
        low = jnp.sum(inside & (answering[..., None, :] < asking[..., None]), -1)
        run = jnp.sum(inside & (answering[..., None, :] == asking[..., None]), -1)
        last = jnp.maximum(jnp.sum(inside, -1), 1) - 1
        own = jnp.minimum(low + halving.proportional(i, n, run), last)
        alike = (own // self.block)[..., None] == (rank // self.block)[..., None, :]
        begin, size = halving.stretches(jnp.sum(among, -1), u.shape[-1])
        hit = (begin + halving.drawn(u, size) == j[..., None]) & (size > 0)
        factor = jnp.sum(hit * size, -1)[:, :, None]
        return inside & alike, jnp.where(inside & ~alike, factor, 0).astype(jnp.float32)

    def limit(self, length: int):
        return dataclasses.replace(self, leaf=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        whole, rest = divmod(length, self.leaf)
        pairs = whole * count_pairs(self.leaf, None, causal) + count_pairs(rest, None, causal)
        unfilled, slots = (min(length, self._tile) - 1) / 2, 0.0
        for n in self.steps(length):
            both, rest = divmod(length, 2 * n)
            rest = max(0, rest - n)  # of a second half that is not whole
            asking = [(n, n)] * both + [(rest, n)]  # queries, and the keys they ask
            asking += [] if causal else [(n, n)] * both + [(n, rest)]
            slots += sum(q + min(q, -(-k // self.block)) * unfilled for q, k in asking if k)
        pairs += slots * (min(self.block, length) + min(self.samples, length))
        hashing = (dims.heads + dims.kv_heads) * length * dims.key_dim * self.planes
        hashing *= length > self.leaf
        return 2.0 * (dims.heads * (dims.key_dim + dims.value_dim) * pairs + hashing)

    @classmethod
    def examples(cls):
        return (cls(leaf=4, block=3, samples=2, planes=3), cls(leaf=3, block=2, samples=5))


def gray_codes(u: Array, planes: Array) -> Array:
    """The signs of u·w for each column w of ``planes`` [D r], read as a number in the Gray code:
    [B N H D] -> int32 [B H N] in 0 .. 2^r − 1; codes that follow each other differ by one sign."""
    signs = jnp.einsum("bnhd,dr->bhnr", u, planes) > 0
    number = jnp.zeros(signs.shape[:-1], jnp.int32)
    bit = jnp.zeros(signs.shape[:-1], bool)
    for r in range(planes.shape[1]):
        bit ^= signs[..., r]
        number = 2 * number + bit
    return number
