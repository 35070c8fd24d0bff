"""Local attention with an exact nearest-neighbour search in a store of what came before."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import blockwise, dense, segments
from attnlab.engines.ranks import kth_largest, reach
from attnlab.engines.segments import Span
from attnlab.errors import UserError
from attnlab.refusals import refuse_bidirectional
from attnlab.registry import register

CHUNK = 64
"""Queries that search together: [B H CHUNK memory] logits are alive at once."""


@register
@dataclass(frozen=True)
class KnnMemory(Mechanism):
    """Local attention inside segments, gated with the nearest keys of a store of earlier segments.

    The store of a query holds the ``memory`` tokens before its segment, each with the unit length
    key k̂ = k / |k| and its value, through neither of which a gradient flows:
        out = g softmax over top-K of {τ q̂ · k̂_j} v_j + (1 − g) softmax(local),
    with K = ``neighbours`` (and whatever ties with the last of them), τ and g = sigmoid(b) one a
    head; g is 0 while the store is empty. The search is exact, within the row and the document.
    Keys in the store carry no position; the local part takes rotations and biases. Meant for one
    layer of several. Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N (segment + memory) (D + E)) time, O(N) memory: queries that search together meet all
    that any of them may see. The state holds the newest memory + segment − 1 tokens. Raises
    `UserError` for sizes < 1 or a bidirectional rule.
    Source: Wu et al., arXiv 2203.08913.
    """

    segment: int = 256
    memory: int = 4096
    neighbours: int = 32
    gate: float = 0.0  # b at the start

    cost = Cost(time=1, memory=1, state=0)
    carries = True

    def __post_init__(self):
        if min(self.segment, self.memory, self.neighbours) < 1:
            raise UserError(
                f"knn_memory: segment={self.segment}, memory={self.memory}, "
                f"neighbours={self.neighbours}; use at least 1 of each"
            )

    @property
    def relative(self) -> bool:
        return False

    def init(self, key: Array, dims: Dims):
        heads = (dims.heads,)
        return {"gate": jnp.full(heads, self.gate), "scale": jnp.full(heads, 20.0)}

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> Keys:
        return Keys.empty(dims, batch, self.memory + self.segment - 1, dtype)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        keys, state = segments.remember(keys, state)
        inner = segments.part_of(rule).restrict(segments.own(self.segment))
        out, _ = blockwise.attend(queries, keys, inner, segments.tile_of(self.segment))
        found, some = self._search(params, queries, keys)
        return _gated(params, found, some, out, rule, state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        keys, state = segments.remember(keys, state)
        inner = segments.part_of(rule).restrict(segments.own(self.segment))
        out, _, _ = dense.attend(queries, keys, inner)
        q, store = _unit(queries.cleared().q), segments.stopped(keys.cleared())
        H, M = q.shape[2], store.pos.shape[1]
        k, v = (jnp.repeat(z.astype(jnp.float32), H // z.shape[2], 2) for z in store[:2])
        z = jnp.einsum("bnhd,bmhd->bhnm", q, _unit(k))
        seen = self._store().allowed(queries, store)[:, None]
        score = lax.stop_gradient(jnp.where(seen, z, MASK))
        kept = seen & reach(score, lax.top_k(score, min(self.neighbours, M))[0][..., -1:])
        z = jnp.where(kept, z * params["scale"][:, None, None], MASK)
        probs = jnp.where(kept, jax.nn.softmax(z, -1), 0)
        found = jnp.einsum("bhnm,bmhe->bnhe", probs, v)
        return _gated(params, found, jnp.any(seen, -1), out, rule, state)

    def limit(self, length: int):
        return dataclasses.replace(self, segment=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        window = self.memory + self.segment - 1 + min(CHUNK, length)
        pairs = segments.count_pairs(length, self.segment, 0) + length * min(length, window)
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(segment=5, memory=9, neighbours=3), cls(segment=4, memory=40, neighbours=2))

    def _store(self) -> Rule:
        return Rule().restrict(Span(self.segment, -self.memory, 0))

    def _search(self, params, queries: Queries, keys: Keys) -> tuple[Array, Array]:
        """What the nearest keys hold, f32 [B N H E], and whether there are any, [B 1 N]."""
        B, N, H, _ = queries.q.shape
        M, reach = keys.pos.shape[1], self.memory + self.segment - 1
        order = jnp.argsort(keys.seg >= 0, axis=1, stable=True)  # empty slots first
        place = jnp.argsort(order, axis=1)[:, M - N :]
        store = segments.take(segments.stopped(keys.cleared()), order)
        store = store._replace(k=_unit(store.k), v=store.v.astype(jnp.float32))
        size = min(CHUNK, N)
        window = min(M, reach + size)

        @jax.checkpoint
        def chunk(_, part):
            asking, place = part
            first = jnp.min(jnp.where(asking.seg >= 0, place, M), 1)
            start = jnp.clip(first - reach, 0, M - window)

            def near(z: Array) -> Array:
                return jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, window))(z, start)

            return None, self._nearest(params, asking, jax.tree.map(near, store))

        def tiled(z: Array, fill: int) -> Array:
            pad = [(0, 0), (0, -N % size)] + [(0, 0)] * (z.ndim - 2)
            z = jnp.pad(z, pad, constant_values=fill)
            return jnp.moveaxis(z.reshape(B, -1, size, *z.shape[2:]), 1, 0)

        queries = queries.cleared()
        asking = Queries(tiled(_unit(queries.q), 0), tiled(queries.pos, 0), tiled(queries.seg, -1))
        _, (found, some) = lax.scan(chunk, None, (asking, tiled(place, 0)))
        found = jnp.moveaxis(found, 0, 1).reshape(B, -1, H, found.shape[-1])[:, :N]
        return found, jnp.moveaxis(some, 0, 1).reshape(B, 1, -1)[..., :N]

    def _nearest(self, params, asking: Queries, store: Keys) -> tuple[Array, Array]:
        B, C, H, D = asking.q.shape
        G = store.k.shape[2]
        z = jnp.einsum("bcgrd,bmgd->bgrcm", asking.q.reshape(B, C, G, H // G, D), store.k)
        seen = self._store().allowed(asking, store)[:, None, None]
        score = lax.stop_gradient(jnp.where(seen, z, MASK))
        kept = seen & reach(score, kth_largest(score, min(self.neighbours, score.shape[-1])))
        z = jnp.where(kept, z * params["scale"].reshape(G, -1, 1, 1), MASK)
        top = lax.stop_gradient(jnp.max(z, -1, keepdims=True))
        weight = jnp.where(kept, jnp.exp(z - top), 0)
        total = jnp.sum(weight, -1, keepdims=True)
        probs = weight / jnp.where(total > 0, total, 1)
        found = jnp.einsum("bgrcm,bmge->bcgre", probs, store.v)
        return found.reshape(B, C, H, -1), jnp.any(seen, (1, 2, 4))


def _unit(z: Array) -> Array:
    """z / |z| in f32."""
    z = z.astype(jnp.float32)
    return z * lax.rsqrt(jnp.sum(jnp.square(z), -1, keepdims=True) + 1e-6)


def _gated(params, found: Array, some: Array, out: Array, rule: Rule, state) -> Result:
    """``some`` [B 1 N] says which queries have a store at all."""
    gate = jnp.where(some[:, 0, :, None, None], jax.nn.sigmoid(params["gate"])[:, None], 0)
    mixed = gate * found + (1 - gate) * out.astype(jnp.float32)
    return Result(rule.tap("heads", mixed.astype(out.dtype)), state, {})


def _refuse(rule: Rule) -> None:
    refuse_bidirectional("knn_memory", rule, "its store is what came before a segment")
