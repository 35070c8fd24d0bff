"""Memories that correct themselves: what a key recalls is replaced by its new value, in chunks.

    u_t = β_t (v_t − a_t S_(t-1)ᵀ k_t),   S_t = a_t S_(t-1) + k_t u_tᵀ,   out_t = S_tᵀ q_t

with k and q of length 1, which is S_t = a_t (I − β_t k_t k_tᵀ) S_(t-1) + β_t k_t v_tᵀ. S starts at
0 in every document; documents follow each other in time order, with empty slots anywhere. With
Γ_ts = a_(s+1) ... a_t the corrections U of a chunk of C tokens after the state S solve one
triangular system,
    (I + A) U = β (v − γ k S),   A = β (k kᵀ ∘ Γ) below the diagonal,   γ_t = a_1 ... a_t
    P = q kᵀ ∘ Γ where seen,   out = P U + γ q S,   S' = γ_C S + (Γ_C k)ᵀ U
and backward, from the last chunk to the first, with G the gradient of S':
    dU = Pᵀ do + Γ_C k Gᵀ,   (I + A)ᵀ dR = dU,   dP = do Uᵀ,   dA = −dR Uᵀ,   dv = β dR,
    dS = γ_C G + (γ q)ᵀ do − (γ k)ᵀ dv
The states at chunk boundaries are kept for it, U and v − γ k S. No exponent is ever positive.
Source: Yang et al., arXiv 2406.06484 and, with decay, 2412.06464.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Dims
from attnlab.engines import passing, report_use, sharded, triangular
from attnlab.engines.undecayed import State, by_rows, initial_state, latest_document, pad
from attnlab.products import collected, mixed, scores


def attend(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    decay: Array,
    seg: Array,
    state: State | tuple[()] = (),
    *,
    chunk: int = 64,
) -> tuple[Array, State]:
    """Every token corrects the memory of its document and reads it.

    ``q`` [B N H D] and ``k`` [B N G D] of any length, ``v`` [B N G E]; ``beta`` [B N G], the share
    of the error that is corrected; ``decay`` [B N G], log a <= 0; ``seg`` [B N]; ``chunk`` tokens
    at a time, rounded up to a power of two. Returns ``out`` [B N H E] f32, 0 in empty slots, and
    the `State` after the last token. Cost: O(N (C (D + E) + D E)) time, O(N + N D E / C) memory.
    """
    B, N, H, D = q.shape
    G, E = v.shape[2:]
    if not state and sharded.count(N) > 1:

        def engine(tokens, seg, state):
            q, k, v, beta, decay = tokens
            return attend(q, k, v, beta, decay, seg, State(*state), chunk=chunk)

        def summarise(tokens, seg):
            return _summary(tokens[1:], seg, chunk)

        tokens = q, k, v, beta, decay
        out, after = passing.attend(engine, summarise, jnp.matmul, tokens, seg, (H, G))
        return out, State(*after)
    report_use("delta", "XLA")
    state = state or initial_state(B, G, D, E)
    size = 1 << (min(chunk, N) - 1).bit_length()

    def tiles(z: Array, fill: int = 0) -> Array:
        """[B N ...] -> [chunks B C ...]."""
        return jnp.moveaxis(pad(z, size, fill).reshape(B, -1, size, *z.shape[2:]), 1, 0)

    tokens = q.reshape(B, N, G, H // G, D), k, v, beta[..., None], decay[..., None]
    out, after = _attend(tuple(map(tiles, tokens)), tiles(seg, -1), state)
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, H, E)[:, :N], after


def _summary(tokens: tuple[Array, ...], seg: Array, chunk: int):
    """The state that tokens leave by themselves, and the matrix [B G D D] that they leave of the
    one before them: both from one pass, from the state [0, I] and with the values [v, 0]."""
    k, v, beta, decay = tokens
    (B, _, G, D), E = k.shape, v.shape[-1]
    values = jnp.concatenate([v, jnp.zeros_like(k, v.dtype)], -1)
    memory, _ = initial_state(B, G, D, E + D)
    first = jnp.take_along_axis(seg, jnp.argmax(seg >= 0, 1)[:, None], 1)[:, 0]
    state = State(memory.at[..., E:].set(jnp.eye(D)), first)
    _, (memory, latest) = attend(k, k, values, beta, decay, seg, state, chunk=chunk)
    return (memory[..., :E], latest), memory[..., E:]


def attend_by_token(
    q: Array, k: Array, v: Array, beta: Array, decay: Array, seg: Array
) -> tuple[Array, State]:
    """`attend` literally, one token after the other, from an empty state."""
    B, _, H, D = q.shape
    G, E = v.shape[2:]

    def step(state: State, token: tuple) -> tuple[State, Array]:
        seg, *arrays = token
        full = seg >= 0
        q, k, v, beta, decay = (jnp.where(full[:, None, None], z, 0) for z in arrays)
        q, k = (unit(z.astype(jnp.float32)) for z in (q, k))
        past = (seg == state.seg) | ~full
        faded = jnp.exp(decay)[..., None] * jnp.where(past[:, None, None, None], state.memory, 0)
        error = v - jnp.einsum("bgde,bgd->bge", faded, k)
        memory = faded + jnp.einsum("bgd,bge->bgde", k, beta * error)
        out = jnp.einsum("bgde,bgrd->bgre", memory, q.reshape(B, G, -1, D))
        return State(memory, jnp.where(full, seg, state.seg)), out.reshape(B, H, E)

    tokens = seg, q, k, v, beta[..., None], decay[..., None]
    by_time = tuple(jnp.moveaxis(z, 1, 0) for z in tokens)
    state, out = lax.scan(step, initial_state(B, G, D, E), by_time)
    return jnp.moveaxis(out, 0, 1), state


def count_flops(dims: Dims, length: int, chunk: int) -> float:
    """Operations of `attend` over one sequence; the triangular system counts half of its square,
    and the sums of log decays are a product too."""
    H, G, D, E = dims.heads, dims.kv_heads, dims.key_dim, dims.value_dim
    size = 1 << (min(chunk, length) - 1).bit_length()
    tables = H * (D + E) + G * (size + D + E / 2)
    return 2.0 * length * (size * tables + (H + 2 * G) * D * E)


def unit(z: Array) -> Array:
    """Divided by its length along the last axis; 0 stays 0."""
    return z * lax.rsqrt(jnp.sum(z * z, -1, keepdims=True) + 1e-12)


class _Chunk(NamedTuple):
    """f32, heads first: ``q`` [B G R C D], ``k`` [B G C D], ``v`` [B G C E], ``beta`` [B G C 1];
    what is left at token t of the correction at s, ``between`` [B G C C], 0 where it is not seen;
    of the state before the chunk at t, ``since`` [B G C 1], and after the chunk, ``whole``
    [B G 1 1]; after it of the correction at s, ``until`` [B G C 1]."""

    q: Array
    k: Array
    v: Array
    beta: Array
    between: Array
    since: Array
    until: Array
    whole: Array

    def meet(self) -> tuple[Array, Array, Array]:
        """k kᵀ, q kᵀ, and Γ below the diagonal."""
        return scores(self.k, self.k), by_rows(scores, self.q, self.k), jnp.tril(self.between, -1)


def _prepared(seg: Array, before: Array, tokens: tuple) -> _Chunk:
    """Tokens [B C ...] after a state of the document ``before`` [B]."""
    C, full = seg.shape[1], seg >= 0
    latest, _ = latest_document(seg, before)

    def rows(z: Array) -> Array:
        return z[:, None, :, None]

    def heads_first(z: Array) -> Array:
        there = full.reshape(*full.shape, *[1] * (z.ndim - 2))
        return jnp.moveaxis(jnp.where(there, z, 0).astype(jnp.float32), 1, -2)

    q, k, v, beta, decay = map(heads_first, tokens)
    # Over s+1..t, each sum by itself: differences of large sums would round small ones. A product,
    # since a cumulative sum and its gradient are slower.
    sums = jnp.matmul(jnp.tri(C), decay * jnp.tri(C, k=-1), precision="highest")
    from_start = sums[..., :1] + decay[..., :1, :]
    seen = (seg[:, :, None] == seg[:, None]) & jnp.tri(C, dtype=bool)
    old = (seg == before[:, None]) & full
    kept = (seg == latest[:, None]) & full
    return _Chunk(
        unit(q),
        unit(k),
        v,
        beta,
        between=jnp.where(seen[:, None], jnp.exp(sums), 0),
        since=jnp.where(rows(old), jnp.exp(from_start), 0),
        until=jnp.where(rows(kept), jnp.exp(sums[..., -1, :, None]), 0),
        whole=jnp.where(
            (latest == before)[:, None, None, None], jnp.exp(from_start[..., -1:, :]), 0
        ),
    )


def _gathered(a: Array, b: Array) -> Array:
    """Σ over heads and tokens of [B G R C X] and [B G R C Y]: [B G X Y]."""
    B, G, R, C, _ = a.shape
    return collected(a.reshape(B, G, R * C, -1), b.reshape(B, G, R * C, -1))


@jax.custom_vjp
def _attend(tokens: tuple, seg: Array, state: State) -> tuple[Array, State]:
    """Chunks in, ``out`` [chunks B C G R E] and the state after them out."""
    return _forward(tokens, seg, state)[0]


def _forward(tokens: tuple, seg: Array, state: State):
    def chunk(state: State, xs):
        seg, tokens = xs
        S, before = state
        z = _prepared(seg, before, tokens)
        kk, qk, below = z.meet()
        wanted = z.v - mixed(z.since * z.k, S)
        U = triangular.solve(z.beta * kk * below, z.beta * wanted)
        out = by_rows(mixed, qk * z.between[:, :, None], U)
        out += by_rows(mixed, z.since[:, :, None] * z.q, S)
        after = z.whole * S + collected(z.until * z.k, U)
        latest, _ = latest_document(seg, before)
        return State(after, latest), (jnp.moveaxis(out, -2, 1), (state, wanted, U))

    after, (out, kept) = lax.scan(chunk, state, (seg, tokens))
    return (out, after), (tokens, seg, kept)


def _backward(residuals, cotangents):
    tokens, seg, kept = residuals
    d_out, d_state = cotangents

    def chunk(G: Array, xs):
        seg, tokens, ((S, before), wanted, U), d_out = xs
        z, pull = jax.vjp(lambda tokens: _prepared(seg, before, tokens), tokens)
        kk, qk, below = z.meet()
        d_out = jnp.moveaxis(d_out, 1, -2)
        between, since = z.between[:, :, None], z.since[:, :, None]
        dU = _gathered(qk * between, d_out) + mixed(z.until * z.k, G)
        dR = triangular.solve(z.beta * kk * below, dU, transposed=True)
        dv = z.beta * dR
        dP = by_rows(scores, d_out, U)
        dA = -scores(dR, U)
        dkk = z.beta * dA * below
        dqk = dP * between
        asked = by_rows(scores, d_out, S)
        known = -scores(dv, S)
        told = scores(U, G)
        d_k = _gathered(dqk, z.q) + mixed(dkk + dkk.swapaxes(-1, -2), z.k)
        (d_tokens,) = pull(
            _Chunk(
                q=by_rows(mixed, dqk, z.k) + since * asked,
                k=d_k + z.since * known + z.until * told,
                v=dv,
                beta=jnp.sum(dR * wanted, -1, keepdims=True)
                + jnp.sum(dA * kk * below, -1, keepdims=True),
                between=jnp.sum(dP * qk, 2) + jnp.tril(z.beta * dA * kk, -1),
                since=jnp.sum(asked * z.q, (2, 4))[..., None]
                + jnp.sum(known * z.k, -1, keepdims=True),
                until=jnp.sum(told * z.k, -1, keepdims=True),
                whole=jnp.sum(G * S, (2, 3), keepdims=True),
            )
        )
        dS = z.whole * G + _gathered(since * z.q, d_out) - collected(z.since * z.k, dv)
        return dS, d_tokens

    dS, d_tokens = lax.scan(chunk, d_state.memory, (seg, tokens, kept, d_out), reverse=True)
    return d_tokens, None, d_state._replace(memory=dS)


_attend.defvjp(_forward, _backward)
