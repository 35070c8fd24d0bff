"""Memories that learn as they read: gradient descent with momentum and decay, in chunks.

    e_t = v_t − M_(t-1)ᵀ k_t,   S_t = η_t S_(t-1) + θ_t k_t e_tᵀ,   M_t = a_t M_(t-1) + S_t,
    out_t = M_tᵀ q_t

with k and q of length 1: a step of size θ down the gradient of |v − Mᵀ k|² / 2, which carries on
what it did before. M and S start at 0 in every document; documents follow each other in time
order, with empty slots anywhere. With E_ts = η_(s+1) ... η_t and A_ts = a_(s+1) ... a_t, what token
s wrote is found at t with the weight G = A E, a product of two triangles, and the errors U = θ e of
a chunk after the state (M, S) solve one triangular system, in which a token sees G⁻, the row of the
token before it (α and f are what M and S weigh, α_t = A_t0 and f = A E_·0):
    (I + θ (k kᵀ ∘ G⁻)) U = θ (v − α⁻ k M − f⁻ k S),   out = (q kᵀ ∘ G) U + α q M + f q S
    M' = α_C M + f_C S + (G_C k)ᵀ U,   S' = E_C0 S + (E_C k)ᵀ U
No exponent is ever positive. Every gradient is taken at the memory just before its token, so the
result depends on no chunk; Behrouz et al., arXiv 2501.00663, from whom the rule is, take those of a
chunk at its start, which a memory that is not linear needs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Dims
from attnlab.engines import report_use, triangular
from attnlab.engines.delta import unit
from attnlab.engines.undecayed import by_rows, latest_document, pad
from attnlab.products import collected, mixed, scores


class State(NamedTuple):
    """What the past left: ``memory`` M and ``momentum`` S [B G D E] f32, and ``seg`` [B], the
    document they are of."""

    memory: Array
    momentum: Array
    seg: Array


class Gates(NamedTuple):
    """[B N G] each: ``step`` θ, ``carry`` log η <= 0, ``decay`` log a <= 0."""

    step: Array
    carry: Array
    decay: Array


def initial_state(batch: int, heads: int, key_dim: int, value_dim: int) -> State:
    """No past: a document that no token belongs to."""
    nothing = jnp.zeros((batch, heads, key_dim, value_dim))
    return State(nothing, nothing, jnp.full(batch, -1, jnp.int32))


def attend(
    q: Array,
    k: Array,
    v: Array,
    gates: Gates,
    seg: Array,
    state: State | tuple[()] = (),
    *,
    chunk: int = 32,
) -> tuple[Array, State]:
    """Every token teaches the memory of its document and reads it.

    ``q`` [B N H D] and ``k`` [B N G D] of any length, ``v`` [B N G E], ``seg`` [B N]; ``chunk``
    tokens at a time, rounded up to a power of two. Returns ``out`` [B N H E] f32, 0 in empty slots,
    and the `State` after the last token. Cost: O(N (C² + C (D + E) + D E)) time, O(N + N D E / C)
    memory.
    """
    report_use("momentum", "XLA")
    B, N, H, D = q.shape
    G, E = v.shape[2:]
    state = state or initial_state(B, G, D, E)
    size = 1 << (min(chunk, N) - 1).bit_length()

    def tiles(z: Array, fill: int = 0) -> Array:
        """[B N ...] -> [chunks B C ...]."""
        return jnp.moveaxis(pad(z, size, fill).reshape(B, -1, size, *z.shape[2:]), 1, 0)

    tokens = q.reshape(B, N, G, H // G, D), k, v, *(z[..., None] for z in gates)
    step = jax.checkpoint(_chunk, prevent_cse=False)
    state, out = lax.scan(step, state, (tiles(seg, -1), *map(tiles, tokens)))
    return jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, -1, H, E)[:, :N], state


def attend_by_token(
    q: Array, k: Array, v: Array, gates: Gates, seg: Array, state: State | tuple[()] = ()
) -> tuple[Array, State]:
    """`attend` literally, one token after the other."""
    B, _, H, D = q.shape
    G, E = v.shape[2:]

    def step(state: State, token: tuple) -> tuple[State, Array]:
        seg, *arrays = token
        full = seg >= 0
        q, k, v, *gates = (jnp.where(full[:, None, None], z, 0) for z in arrays)
        rate, carry, decay = (z[..., None] for z in gates)
        q, k = (unit(z.astype(jnp.float32)) for z in (q, k))
        past = ((seg == state.seg) | ~full)[:, None, None, None]
        memory, momentum = (jnp.where(past, z, 0) for z in state[:2])
        error = v - jnp.einsum("bgde,bgd->bge", memory, k)
        wanted = jnp.exp(carry) * momentum + rate * k[..., None] * error[:, :, None]
        after = jnp.exp(decay) * memory + wanted
        there = full[:, None, None, None]
        memory, momentum = jnp.where(there, after, memory), jnp.where(there, wanted, momentum)
        out = jnp.einsum("bgde,bgrd->bgre", memory, q.reshape(B, G, -1, D))
        return State(memory, momentum, jnp.where(full, seg, state.seg)), out.reshape(B, H, E)

    tokens = seg, q, k, v, *(z[..., None] for z in gates)
    by_time = tuple(jnp.moveaxis(z, 1, 0) for z in tokens)
    state, out = lax.scan(step, state or initial_state(B, G, D, E), by_time)
    return jnp.moveaxis(out, 0, 1), state


def count_flops(dims: Dims, length: int, chunk: int) -> float:
    """Operations of `attend` over one sequence; the triangular system counts half of its square,
    and the sums of logs are products too."""
    H, G, D, E = dims.heads, dims.kv_heads, dims.key_dim, dims.value_dim
    size = 1 << (min(chunk, length) - 1).bit_length()
    tables = H * (D + E) + G * (4 * size + 2 + D + E / 2)
    return 2.0 * length * (size * tables + 2 * (H + 2 * G) * D * E)


class _Weights(NamedTuple):
    """What is left at token t of a chunk: ``between`` of token s in the memory that t reads, and
    ``before`` in the one that it corrects [B G C C]; ``since``, ``since_before`` of the memory and
    the momentum before the chunk, in the same two [B G C 2]; and after the chunk, in memory and
    momentum, of token s ``until`` [2 B G C 1], of memory and momentum ``whole`` [B G 2 2]."""

    between: Array
    before: Array
    since: Array
    since_before: Array
    until: Array
    whole: Array


def _weights(seg: Array, document: Array, carry: Array, decay: Array) -> _Weights:
    """Of tokens ``seg`` [B C] after a state of the ``document`` [B]; log gates [B G C 1]."""
    C, full = seg.shape[1], seg >= 0
    _, last = latest_document(seg, document)
    alike = ((seg[:, :, None] == seg[:, None]) & full[:, None] & full[:, :, None])[:, None]
    old = ((seg == document[:, None]) & full)[:, None, :, None]
    upto, below = jnp.tri(C, dtype=bool), jnp.tri(C, k=-1, dtype=bool)

    def sums(log: Array) -> tuple[Array, Array]:
        """Over s+1..t, and from the start, each by itself: differences of large sums would round
        small ones."""
        table = jnp.matmul(jnp.tri(C), log * jnp.tri(C, k=-1), precision="highest")
        return table, table[..., :1] + log[..., :1, :]

    def later(z: Array) -> Array:
        """The row of the slot before, 0 at the first."""
        return jnp.pad(z[..., :-1, :], [(0, 0)] * (z.ndim - 2) + [(1, 0), (0, 0)])

    (carried, carried_all), (decayed, decayed_all) = sums(carry), sums(decay)
    written = jnp.where(alike & upto, jnp.exp(carried), 0)  # E, 0 at empty slots
    written_all = jnp.where(old, jnp.exp(carried_all), 0)
    both = jnp.concatenate([written, written_all], -1)
    kept = jnp.where(alike & upto, jnp.exp(decayed), 0)
    kept_before = jnp.where(alike & below, jnp.exp(later(decayed)), 0)
    found, found_before = (jnp.matmul(z, both, precision="highest") for z in (kept, kept_before))
    since = jnp.where(old, jnp.exp(decayed_all), 0)
    since_before = jnp.where(old, jnp.exp(later(decayed_all)), 0)
    end = jnp.maximum(last, 0)[:, None, None, None]

    def at_end(z: Array) -> Array:
        """The row of the last full slot [B G 1 X], 0 where there is none."""
        row = jnp.take_along_axis(z, jnp.broadcast_to(end, (*z.shape[:2], 1, z.shape[3])), 2)
        return jnp.where((last >= 0)[:, None, None, None], row, 0)

    untouched = (last < 0)[:, None, None, None] * 1.0
    memory, momentum = at_end(since) + untouched, at_end(written_all) + untouched
    of_memory = jnp.concatenate([memory, at_end(found[..., C:])], -1)
    of_momentum = jnp.concatenate([jnp.zeros_like(memory), momentum], -1)
    until = (at_end(found[..., :C]), at_end(written))
    return _Weights(
        between=found[..., :C],
        before=found_before[..., :C],
        since=jnp.concatenate([since, found[..., C:]], -1),
        since_before=jnp.concatenate([since_before, found_before[..., C:]], -1),
        until=jnp.stack([z.swapaxes(-1, -2) for z in until]),
        whole=jnp.concatenate([of_memory, of_momentum], -2),
    )


def _chunk(state: State, tokens: tuple) -> tuple[State, Array]:
    """One step of the scan over [B C ...] tokens; ``out`` [B G R C E]."""
    seg, *arrays = tokens
    full = seg >= 0

    def heads_first(z: Array) -> Array:
        there = full.reshape(*full.shape, *[1] * (z.ndim - 2))
        return jnp.moveaxis(jnp.where(there, z, 0).astype(jnp.float32), 1, -2)

    q, k, v, rate, carry, decay = map(heads_first, arrays)
    q, k = unit(q), unit(k)
    w = _weights(seg, state.seg, carry, decay)
    past = jnp.concatenate(state[:2], -2)  # M over S [B G 2D E]

    def asking(z: Array, since: Array) -> Array:
        return jnp.concatenate([since[..., :1] * z, since[..., 1:] * z], -1)

    wanted = v - mixed(asking(k, w.since_before), past)
    system = rate * scores(k, k) * w.before
    U = triangular.solve(system, rate * wanted)
    out = by_rows(mixed, by_rows(scores, q, k) * w.between[:, :, None], U)
    out += by_rows(mixed, asking(q, w.since[:, :, None]), past)
    old = jnp.stack(state[:2], 2)
    memory, momentum = (
        jnp.sum(w.whole[:, :, i, :, None, None] * old, 2) + collected(w.until[i] * k, U)
        for i in range(2)
    )
    latest, _ = latest_document(seg, state.seg)
    return State(memory, momentum, latest), out
