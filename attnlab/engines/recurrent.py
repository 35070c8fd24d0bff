"""Sums over the past in chunks: a matrix that decays and is added to, read at every token.

    S_t = exp(a_t) ∘ S_(t-1) ∘ exp(b_t)ᵀ + k_t v_tᵀ,    out_t = S_tᵀ q_t

with log decays a_t <= 0 over the key axis and b_t <= 0 over the value axis. S starts at 0 in every
document; documents follow each other in time order, with empty slots anywhere.

A chunk reads the state before it and its own earlier tokens, weighed by exp(sum of the decays in
between). Where decays are one number a head, those sums fill one [C C] table. Where they differ
along an axis, a chunk is halved again and again: at each halving the later half reads the earlier
one, and both decay towards the point between them. Sums are never subtracted and exponents never
positive, so no decay is too strong. No number of a later token is part of an earlier sum.

Only the state at chunk boundaries is kept for the backward pass; the rest is computed again.
Source: Katharopoulos et al., arXiv 2006.16236; chunks: Hua et al., 2202.10447; decays along an
axis: Yang et al., 2312.06635.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Dims
from attnlab.engines import passing, report_use, sharded, undecayed
from attnlab.engines.kernels import choose_chunks
from attnlab.engines.undecayed import State, by_rows, initial_state, latest_document, pad
from attnlab.products import collected, mixed, scores


def attend(
    q: Array,
    k: Array,
    v: Array,
    seg: Array,
    state: State | tuple[()] = (),
    *,
    key_decay: Array | None = None,
    value_decay: Array | None = None,
    chunk: int = 64,
    mean: bool = False,
    kernels: str = "xla",
) -> tuple[Array, State]:
    """Every token reads all tokens of its document so far, itself included.

    ``q`` [B N H D], ``k`` [B N G D], ``v`` [B N G E], ``seg`` [B N]; ``key_decay`` [B N G D or 1]
    and ``value_decay`` [B N G E or 1] are log decays <= 0, or None for no decay; ``chunk`` tokens
    at a time, rounded up to a power of two. Returns ``out`` [B N H E] f32, 0 in empty slots, and
    the `State` after the last token. With ``mean`` the result is divided by the sum of the weights
    Σ q·k, 0 where that is not positive; the memory then has E + 1 columns, the last of them for
    that sum. ``kernels`` is the `Rule.kernels` of the call; `kernels.recurrence` serves what decays
    where it can, in chunks of its own. Cost: O(N (C (D + E) + D E)) time, O(N + N D E / C) memory.
    """
    if key_decay is None and value_decay is None:
        return undecayed.attend(q, k, v, seg, state, chunk=chunk, mean=mean)
    B, N, H, D = q.shape
    G, E = v.shape[2:]
    if not state and sharded.count(N) > 1:

        def engine(tokens, seg, state):
            (q, k, v, a, b), state = tokens, State(*state)
            fading = {"key_decay": a, "value_decay": b}
            options = {"chunk": chunk, "mean": mean, "kernels": kernels}
            return attend(q, k, v, seg, state, **fading, **options)

        def summarise(tokens, seg):
            return _summary(mean, seg, *tokens[1:])

        tokens = q, k, v, key_decay, value_decay
        out, after = passing.attend(engine, summarise, _moved, tokens, seg, (H, G))
        return out, State(*after)
    form = choose_chunks(kernels, mean, q, k, v, key_decay, value_decay)
    report_use("recurrent", str(form))
    if not state:
        state = initial_state(B, G, D, E + mean)
    if form.module:
        from attnlab.engines.kernels import recurrence  # Pallas, which most runs never load

        v = with_one(v) if mean else v
        out, state = recurrence.attend(form, q, k, v, key_decay, value_decay, seg, state)
        return quotient(out) if mean else out, state
    size = 1 << (min(chunk, N) - 1).bit_length()

    def tiles(z: Array, fill: int = 0) -> Array:
        """[B N ...] -> [chunks B C ...]."""
        return jnp.moveaxis(pad(z, size, fill).reshape(B, -1, size, *z.shape[2:]), 1, 0)

    tokens = (q.reshape(B, N, G, H // G, D), k, v, key_decay, value_decay)
    tokens = (tiles(seg, -1), *jax.tree.map(tiles, tokens))
    step = jax.checkpoint(partial(_chunk, mean), prevent_cse=False)
    state, out = lax.scan(step, state, tokens)
    return jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, -1, H, E)[:, :N], state


def attend_both_ways(q: Array, k: Array, v: Array, seg: Array, chunk: int = 64) -> Array:
    """Every token reads all tokens of its document, before and after it; arguments as in `attend`,
    nothing decays. Costs twice as much."""

    def flip(z: Array) -> Array:
        return jnp.flip(z, 1)

    before, _ = attend(q, k, v, seg, chunk=chunk)
    after, _ = attend(flip(q), flip(k), flip(v), flip(seg), chunk=chunk)
    B, N, H, D = q.shape
    q = q.astype(jnp.float32).reshape(B, N, -1, H // k.shape[2], D)
    own = jnp.einsum("bngrd,bngd,bnge->bngre", q, k, v).reshape(before.shape)
    return before + flip(after) - jnp.where((seg >= 0)[..., None, None], own, 0)


def with_one(v: Array) -> Array:
    """[v, 1] in f32: the sum of weights is summed along with the values."""
    v = v.astype(jnp.float32)
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def quotient(sums: Array) -> Array:
    """Sums of weighted [v, 1] to weighted means: [... E + 1] -> [... E], 0 without any weight."""
    total = sums[..., -1:]
    return jnp.where(total > 0, sums[..., :-1], 0) / jnp.where(total > 0, total, 1.0)


def count_flops(
    dims: Dims, length: int, chunk: int, causal: bool = True, along_axis: bool = False
) -> float:
    """Operations of `attend` (or `attend_both_ways`) over one sequence: the table of a chunk is
    computed whole, its halves (decays ``along_axis``) without the pairs that are masked; every head
    reads the state, every kv head is written to."""
    size = 1 << (min(chunk, length) - 1).bit_length()
    pairs = length * ((size - 1) / 2 if along_axis else size)
    sums = (dims.heads + dims.kv_heads) * length * dims.key_dim * dims.value_dim
    once = dims.heads * pairs * (dims.key_dim + dims.value_dim) + sums
    return 2.0 * once * (1 if causal else 2)


def sums_since(decay: Array) -> Array:
    """Sums from the start of the chunk up to and including each token: [... C X]."""
    return jnp.cumsum(decay, -2)


def sums_until(decay: Array) -> Array:
    """Sums over the tokens after each one, to the end of the chunk: [... C X]."""
    later = jnp.concatenate([decay[..., 1:, :], jnp.zeros_like(decay[..., :1, :])], -2)
    return lax.cumsum(later, later.ndim - 2, reverse=True)


def sums_between(decay: Array) -> Array:
    """[... C 1] -> [... C C]: at (t, s) the sum over s+1..t, and 0 where s >= t."""
    later = jnp.tri(decay.shape[-2], k=-1, dtype=decay.dtype)
    return jnp.cumsum(decay * later, -2)


def _summary(mean: bool, seg: Array, k: Array, v: Array, a: Array | None, b: Array | None):
    """The state that tokens [B N G ...] leave by themselves, and what they leave of the one before
    them: factors [B G D or 1 1] and [B G 1 E or 1]."""
    latest, _ = latest_document(seg, jnp.full(seg.shape[0], -1, jnp.int32))
    k, v, a, b = jax.tree.map(lambda z: _heads_first(z, seg >= 0), (k, v, a, b))
    kept = ((seg == latest[:, None]) & (seg >= 0))[:, None, :, None]
    k = jnp.where(kept, _faded(k, a, sums_until), 0)
    memory = collected(k, _faded(with_one(v) if mean else v, b, sums_until))
    none = jnp.zeros((*k.shape[:2], 1, 1))
    a, b = (none if z is None else jnp.sum(z, 2, keepdims=True) for z in (a, b))
    return (memory, latest), (jnp.exp(a).swapaxes(-1, -2), jnp.exp(b))


def _moved(factors: tuple[Array, Array], memory: Array) -> Array:
    over_keys, over_values = factors
    return over_keys * memory * over_values


def _heads_first(z: Array, full: Array) -> Array:
    """[B C ... X] -> f32 [B ... C X], 0 in empty slots."""
    full = full.reshape(*full.shape, *[1] * (z.ndim - 2))
    return jnp.moveaxis(jnp.where(full, z.astype(jnp.float32), 0), 1, -2)


def _chunk(mean: bool, state: State, tokens: tuple) -> tuple[State, Array]:
    """One step of the scan: ``seg`` [B C], ``q`` [B C G R D], ``k`` [B C G D], ..."""
    seg, *arrays = tokens

    q, k, v, a, b = jax.tree.map(lambda z: _heads_first(z, seg >= 0), arrays)
    v = with_one(v) if mean else v
    along_axis = any(z is not None and z.shape[-1] > 1 for z in (a, b))
    within = _within_by_halves if along_axis else _within_by_table
    out = within(q, k, v, seg, a, b)

    old = (seg == state.seg[:, None]) & (seg >= 0)
    asking = jnp.where(old[:, None, None, :, None], _faded(q, a, sums_since, 1), 0)
    out += _faded(by_rows(mixed, asking, state.memory), b, sums_since, 1)

    latest, _ = latest_document(seg, state.seg)
    kept = ((seg == latest[:, None]) & (seg >= 0))[:, None, :, None]
    k = jnp.where(kept, _faded(k, a, sums_until), 0)
    new = jnp.einsum("bgjd,bgje->bgde", k, _faded(v, b, sums_until))
    memory = state.memory
    memory = memory if a is None else jnp.exp(jnp.sum(a, 2))[..., :, None] * memory
    memory = memory if b is None else memory * jnp.exp(jnp.sum(b, 2))[..., None, :]
    same = (latest == state.seg)[:, None, None, None]
    out = quotient(out) if mean else out
    return State(jnp.where(same, memory, 0) + new, latest), out


def _faded(z: Array, decay: Array | None, sums: Callable, heads: int = 0) -> Array:
    """``z`` [B G ... C X] times e^sums(decay), with ``heads`` axes between G and C."""
    if decay is None:
        return z
    axes = tuple(range(2, 2 + heads))
    return z * jnp.expand_dims(jnp.exp(sums(decay)), axes)


def _within_by_table(
    q: Array, k: Array, v: Array, seg: Array, a: Array | None, b: Array | None
) -> Array:
    """What the tokens of a chunk read from each other, for one decay a head."""
    C = seg.shape[1]
    seen = (seg[:, :, None] == seg[:, None, :]) & jnp.tri(C, dtype=bool)
    pairs = jnp.where(seen[:, None, None], by_rows(scores, q, k), 0)
    decay = sum(z for z in (a, b) if z is not None)
    pairs *= jnp.exp(sums_between(jnp.asarray(decay)))[:, :, None]
    return by_rows(mixed, pairs, v)


def _within_by_halves(
    q: Array, k: Array, v: Array, seg: Array, a: Array | None, b: Array | None
) -> Array:
    """The same for decays along an axis: blocks of h tokens meet in pairs, h = 1, 2, 4, ..."""
    none = jnp.zeros((*k.shape[:3], 1))
    a, b = (none if z is None else z for z in (a, b))

    def halves(z: Array, axis: int = -2) -> tuple[Array, Array]:
        """The earlier and the later block of each pair, of the axis [C] or [blocks h]."""
        axis %= z.ndim
        z = z.reshape(*z.shape[:axis], -1, 2, h, *z.shape[axis + 1 :])
        earlier, later = jnp.moveaxis(z, axis + 1, 0)
        return earlier, later

    def joined(earlier: Array, later: Array) -> Array:
        z = jnp.stack([earlier, later], -3)
        return z.reshape(*z.shape[:-4], -1, z.shape[-1])

    def doubled(since: Array, until: Array) -> tuple[Array, Array]:
        (s0, s1), (u0, u1) = halves(since), halves(until)
        s0_all, s1_all = s0[..., -1:, :], s1[..., -1:, :]
        return joined(s0, s0_all + s1), joined(u0 + s1_all, u1)

    out = jnp.sum(q * k[:, :, None], -1, keepdims=True) * v[:, :, None]
    (a_since, a_until), (b_since, b_until) = (a, a * 0), (b, b * 0)
    h = 1
    while h < seg.shape[1]:
        seg_0, seg_1 = halves(seg, 1)
        seen = (seg_1[..., :, None] == seg_0[..., None, :])[:, None, None]
        asking = halves(q)[1] * jnp.exp(halves(a_since)[1])[:, :, None]
        answering = halves(k)[0] * jnp.exp(halves(a_until)[0])
        values = halves(v)[0] * jnp.exp(halves(b_until)[0])
        pairs = jnp.einsum("bgrnid,bgnjd->bgrnij", asking, answering)
        read = jnp.einsum("bgrnij,bgnje->bgrnie", jnp.where(seen, pairs, 0), values)
        earlier, later = halves(out)
        out = joined(earlier, later + read * jnp.exp(halves(b_since)[1])[:, :, None])
        a_since, a_until = doubled(a_since, a_until)
        b_since, b_until = doubled(b_since, b_until)
        h *= 2
    return out
