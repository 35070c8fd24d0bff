"""Sums over the past that nothing fades, in chunks, with a backward pass of their own.

    S_t = S_(t-1) + φ(k_t) v_tᵀ,   z_t = z_(t-1) + φ(k_t)
    out_t = S_tᵀ φ(q_t),   or divided by its weight z_t·φ(q_t)

S starts at 0 in every document; documents follow each other in time order, with empty slots
anywhere. A chunk of C tokens reads the state before it and its own earlier tokens:
    P = φ(q) φ(k)ᵀ where seen,   out = P v + φ(q) S
and backward, from the last chunk to the first, with G the gradient of S after the chunk:
    dP = do vᵀ where seen,   dφ(q) = dP φ(k) + do Sᵀ,   dφ(k) = dPᵀ φ(q) + v Gᵀ,
    dv = Pᵀ do + φ(k) G,   dS = G + φ(q)ᵀ do
The states at chunk boundaries are kept for it, and the weights; P is computed again.
Source: Katharopoulos et al., arXiv 2006.16236; chunks: Hua et al., 2202.10447.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array
from attnlab.engines import passing, report_use, sharded
from attnlab.products import collected, mixed, scores


class State(NamedTuple):
    """What the past left: ``memory`` [B G D E] f32, and ``seg`` [B], the document it is of."""

    memory: Array
    seg: Array


def initial_state(batch: int, heads: int, key_dim: int, value_dim: int) -> State:
    """No past: a document that no token belongs to."""
    return State(jnp.zeros((batch, heads, key_dim, value_dim)), jnp.full(batch, -1, jnp.int32))


def identity(z: Array) -> Array:
    return z


def attend(
    q: Array,
    k: Array,
    v: Array,
    seg: Array,
    state: State | tuple[()] = (),
    *,
    chunk: int = 64,
    mean: bool = False,
    features: Callable[[Array], Array] = identity,
) -> tuple[Array, State]:
    """Every token reads all tokens of its document so far, itself included.

    ``q`` [B N H D], ``k`` [B N G D], ``v`` [B N G E], ``seg`` [B N]; ``features`` maps the last
    axis of queries and keys, to the same size or another; ``chunk`` tokens at a time, rounded up to
    a power of two. Returns ``out`` [B N H E] f32, 0 in empty slots, and the `State` after the last
    token. With ``mean`` the result is divided by the sum of the weights, 0 where that is not
    positive; the memory then has E + 1 columns, the last of them z. Cost:
    O(N (C (D + E) + D E)) time, O(N + N D E / C) memory.
    """
    B, N, H, _ = q.shape
    G, E = v.shape[2:]
    if not state and sharded.count(N) > 1:

        def engine(tokens, seg, state):
            q, k, v = tokens
            options = {"chunk": chunk, "mean": mean, "features": features}
            return attend(q, k, v, seg, State(*state), **options)

        def summarise(tokens, seg):
            return _left(tokens[1], tokens[2], seg, mean, features), ()

        out, after = passing.attend(engine, summarise, _kept, (q, k, v), seg, (H, G))
        return out, State(*after)
    report_use("undecayed", "XLA")
    if not state:
        D = jax.eval_shape(features, k).shape[-1]
        state = initial_state(B, G, D, E + mean)
    size = 1 << (min(chunk, N) - 1).bit_length()

    def tiles(z: Array, fill: int = 0) -> Array:
        """[B N ...] -> [chunks B C ...]."""
        return jnp.moveaxis(pad(z, size, fill).reshape(B, -1, size, *z.shape[2:]), 1, 0)

    tokens = tuple(tiles(z) for z in (q.reshape(B, N, G, H // G, -1), k, v))
    out, after = _attend((mean, features), *tokens, tiles(seg, -1), state)
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, H, E)[:, :N], after


def _left(k: Array, v: Array, seg: Array, mean: bool, features: Callable) -> tuple[Array, Array]:
    """The state that tokens [B N ...] leave by themselves."""
    latest, _ = latest_document(seg, jnp.full(seg.shape[0], -1, jnp.int32))
    kept = ((seg == latest[:, None]) & (seg >= 0))[:, None, :, None]
    k, v = _mapped(features, _heads_first(k), kept), jnp.where(kept, _heads_first(v), 0.0)
    if mean:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    return collected(k, v), latest


def _kept(factor: tuple[()], memory: Array) -> Array:
    """A memory that nothing fades."""
    return memory


def pad(z: Array, size: int, fill: int) -> Array:
    """``z`` [B N ...] made a multiple of ``size`` long."""
    widths = [(0, 0), (0, -z.shape[1] % size)] + [(0, 0)] * (z.ndim - 2)
    return jnp.pad(z, widths, constant_values=fill)


def latest_document(seg: Array, before: Array) -> tuple[Array, Array]:
    """The document of the last full slot of ``seg`` [B C], or ``before`` [B] where there is none,
    and the index of that slot, -1 for none: [B] each."""
    last = jnp.max(jnp.where(seg >= 0, jnp.arange(seg.shape[1]), -1), 1)
    own = jnp.take_along_axis(seg, jnp.maximum(last, 0)[:, None], 1)[:, 0]
    return jnp.where(last >= 0, own, before), last


class _Masks(NamedTuple):
    """Who is there [B 1 C 1], sees whom [B 1 1 C C], sees the state before the chunk and is part of
    the state after it [B 1 C 1], and whether what was before is too [B 1 1 1]; the document ``seg``
    [B] of the state after it."""

    full: Array
    seen: Array
    old: Array
    kept: Array
    same: Array
    seg: Array


def _masks(seg: Array, before: Array) -> _Masks:
    """Of a chunk [B C] after a state of the document ``before`` [B]."""
    C, full = seg.shape[1], seg >= 0
    latest, _ = latest_document(seg, before)

    def rows(z: Array) -> Array:
        return z[:, None, :, None]

    return _Masks(
        full=rows(full),
        seen=((seg[:, :, None] == seg[:, None]) & jnp.tri(C, dtype=bool))[:, None, None],
        old=rows((seg == before[:, None]) & full),
        kept=rows((seg == latest[:, None]) & full),
        same=(latest == before)[:, None, None, None],
        seg=latest,
    )


def _heads_first(z: Array) -> Array:
    """[B C heads ... X] -> f32 [B heads ... C X]."""
    return jnp.moveaxis(z.astype(jnp.float32), 1, -2)


def _mapped(features: Callable, z: Array, full: Array) -> Array:
    """φ of tokens that are there, 0 for the others; ``full`` [B 1 C 1]."""
    full = full.reshape(full.shape[0], *[1] * (z.ndim - 3), *full.shape[2:])
    return jnp.where(full, features(jnp.where(full, z, 0.0)), 0.0)


def by_rows(product: Callable, q: Array, other: Array) -> Array:
    """A product of [B G R C X] with [B G Y Z]: the R heads of a kv head become rows of one."""
    B, G, R, C, X = q.shape
    return product(q.reshape(B, G, R * C, X), other).reshape(B, G, R, C, -1)


def _gathered(a: Array, b: Array) -> Array:
    """Σ over heads and tokens of [B G R C X] and [B G R C Y]: [B G X Y]."""
    B, G, R, C, _ = a.shape
    return collected(a.reshape(B, G, R * C, -1), b.reshape(B, G, R * C, -1))


def _split(memory: Array, mean: bool) -> tuple[Array, Array]:
    """S and z, of width 0 without ``mean``."""
    E = memory.shape[-1] - mean
    return memory[..., :E], memory[..., E:]


def _joined(S: Array, z: Array) -> Array:
    return jnp.concatenate([S, z], -1)


def _visit(static: tuple[bool, Callable], q, k, v, seg, state: State) -> tuple[Array, State]:
    """Chunks in, ``out`` [chunks B C G R E] and the state after them out."""
    return _forward(static, q, k, v, seg, state)[0]


def _forward(static, q, k, v, seg, state):
    mean, features = static

    def chunk(carry, xs):
        (S, z, before), (seg, *arrays) = carry, xs
        m = _masks(seg, before)
        q, k, v = map(_heads_first, arrays)
        q, k = _mapped(features, q, m.full), _mapped(features, k, m.full)
        v = jnp.where(m.full, v, 0.0)
        pairs = jnp.where(m.seen, by_rows(scores, q, k), 0.0)
        asking = jnp.where(m.old[:, :, None], q, 0.0)
        out = by_rows(mixed, pairs, v) + by_rows(mixed, asking, S)
        telling = jnp.where(m.kept, k, 0.0)
        weight, after_z = jnp.ones(()), z
        if mean:
            total = jnp.sum(pairs, -1, keepdims=True) + by_rows(mixed, asking, z)
            weight = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
            after_z = jnp.where(m.same, z, 0.0) + jnp.sum(telling, -2)[..., None]
        out = jnp.moveaxis(out * weight, -2, 1)
        after_S = jnp.where(m.same, S, 0.0) + collected(telling, v)
        return (after_S, after_z, m.seg), (out, weight, carry)

    start = *_split(state.memory, mean), state.seg
    (S, z, last), (out, weight, states) = lax.scan(chunk, start, (seg, q, k, v))
    return (out, State(_joined(S, z), last)), (q, k, v, seg, states, out, weight)


def _backward(static, kept, cotangents):
    mean, features = static
    q, k, v, seg, states, out, weight = kept
    d_out, d_state = cotangents

    def chunk(carry, xs):
        (dS, dz), (seg, arrays, (S, z, before), out, weight, d_out) = carry, xs
        m = _masks(seg, before)
        (q, pull_q), (k, pull_k) = (
            jax.vjp(lambda z: _mapped(features, z, m.full), _heads_first(z)) for z in arrays[:2]
        )
        v = jnp.where(m.full, _heads_first(arrays[2]), 0.0)
        pairs = jnp.where(m.seen, by_rows(scores, q, k), 0.0)
        d_sums = _heads_first(d_out) * weight
        d_pairs = by_rows(scores, d_sums, v)
        d_asking = by_rows(scores, d_sums, S)
        d_telling = scores(v, dS)
        asking = jnp.where(m.old[:, :, None], q, 0.0)
        telling = jnp.where(m.kept, k, 0.0)
        before_S = jnp.where(m.same, dS, 0.0) + _gathered(asking, d_sums)
        before_z = dz
        if mean:
            d_total = -jnp.einsum("...e,...e->...", d_sums, _heads_first(out))[..., None]
            d_pairs += d_total
            d_asking += d_total * z.swapaxes(-1, -2)[:, :, None]
            d_telling += dz.swapaxes(-1, -2)
            before_z = jnp.where(m.same, dz, 0.0) + _gathered(asking, d_total)
        d_pairs = jnp.where(m.seen, d_pairs, 0.0)
        dq = by_rows(mixed, d_pairs, k) + jnp.where(m.old[:, :, None], d_asking, 0.0)
        dk = _gathered(d_pairs, q) + jnp.where(m.kept, d_telling, 0.0)
        dv = _gathered(pairs, d_sums) + mixed(telling, dS)
        grads = *pull_q(dq), *pull_k(dk), jnp.where(m.full, dv, 0.0)
        turned = (
            jnp.moveaxis(g, -2, 1).astype(z.dtype) for g, z in zip(grads, arrays, strict=True)
        )
        return (before_S, before_z), tuple(turned)

    xs = (seg, (q, k, v), states, out, weight, d_out)
    start = _split(d_state.memory, mean)
    (dS, dz), (dq, dk, dv) = lax.scan(chunk, start, xs, reverse=True)
    return dq, dk, dv, None, d_state._replace(memory=_joined(dS, dz))


_attend = jax.custom_vjp(_visit, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
