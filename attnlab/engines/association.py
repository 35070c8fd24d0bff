"""An associative memory that is read before it is written, a segment at a time.

A matrix per head maps features of a key to its value. All tokens of a segment read the matrix as it
stood when their segment began; what they write is seen from the next segment on:
    read_t = φ(q_t) Σ_{j : same document, segment_j < segment_t} φ(k_j)ᵀ w_j.
With w_j = [v_j, 1] the last column of what is read is the normaliser of a kernel attention. Chunks
of tokens are independent of segments: inside a chunk the sum is a masked product, and two matrices
are carried from chunk to chunk, that of earlier segments and that of the running one.
Cost: O(N (C (D + E) + D E)) time for chunks of C tokens, O(N) memory: a chunk is computed again in
the backward pass. Source: Munkhdalai et al., arXiv 2404.07143; chunks: Yang et al., 2312.06635.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Dims, Keys, Queries
from attnlab.engines import report_use, segments

FAINT = 1e-12
"""A normaliser below this is that of an empty memory."""


class Memory(NamedTuple):
    """``past`` and ``now`` [B G D E+1] f32: written by earlier segments of the document and by the
    running one; ``seg``, ``segment`` [B]: whose document, which segment."""

    past: Array
    now: Array
    seg: Array
    segment: Array


class Tokens(NamedTuple):
    """``q`` [B N G R D] and ``k`` [B N G D]: features, 0 in empty slots; ``v`` [B N G E+1] values
    and a 1; ``seg``, ``segment`` [B N]."""

    q: Array
    k: Array
    v: Array
    seg: Array
    segment: Array


class Chunk(NamedTuple):
    """What a rule for writing may ask: the tokens' ``k`` and ``v`` [B C G ·], the carried `Memory`,
    which tokens read its ``past`` (``going``) and its ``now`` too (``later``) [B C], and which
    tokens of the chunk each reads (``within``) or belong to its document (``together``) [B C C]."""

    k: Array
    v: Array
    memory: Memory
    going: Array
    later: Array
    within: Array
    together: Array


Write = Callable[[Chunk], Array]


class State(NamedTuple):
    """Between calls: the two matrices of `Memory`, and the newest ``segment`` tokens, the last of
    which says whose they are."""

    past: Array
    now: Array
    local: Keys


def empty(dims: Dims, batch: int, segment: int, dtype=jnp.float32) -> State:
    """The state before the first token."""
    matrix = jnp.zeros((batch, dims.kv_heads, dims.key_dim, dims.value_dim + 1), jnp.float32)
    return State(matrix, matrix, Keys.empty(dims, batch, segment, dtype))


def memory_of(state: State | tuple[()], tokens: Tokens, segment: int) -> Memory:
    """What is known before the first of ``tokens``."""
    B, _, G, D = tokens.k.shape
    if state:
        last = state.local.pos[:, -1] // segment
        return Memory(state.past, state.now, state.local.seg[:, -1], last)
    zero = jnp.zeros((B, G, D, tokens.v.shape[-1]), jnp.float32)
    nobody = jnp.full((B,), -1, jnp.int32)
    return Memory(zero, zero, nobody, nobody)


def tokens_of(queries: Queries, keys: Keys, features: Callable[[Array], Array], segment: int):
    """Queries and the keys of the same tokens as `Tokens`, in f32."""
    B, N, G, _ = keys.k.shape
    full = (keys.seg >= 0)[..., None, None]
    queries, keys = queries.cleared(), keys.cleared()
    q, k = (jnp.where(full, features(z.astype(jnp.float32)), 0) for z in (queries.q, keys.k))
    v = keys.v.astype(jnp.float32)
    v = jnp.where(full, jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1), 0)
    return Tokens(q.reshape(B, N, G, -1, q.shape[-1]), k, v, keys.seg, keys.pos // segment)


def associate(write: Write, tokens: Tokens, memory: Memory, chunk: int) -> tuple[Array, Memory]:
    """What every query reads, f32 [B N G R E+1], and the memory behind the last token. ``write``
    says what each token of a `Chunk` adds under its key, [B C G E+1]."""
    report_use("association", "XLA")
    N = tokens.seg.shape[1]

    def tiled(z: Array) -> Array:
        fill = -1 if z.ndim == 2 else 0
        pad = [(0, 0), (0, -N % chunk)] + [(0, 0)] * (z.ndim - 2)
        z = jnp.pad(z, pad, constant_values=fill)
        return jnp.moveaxis(z.reshape(z.shape[0], -1, chunk, *z.shape[2:]), 1, 0)

    @jax.checkpoint
    def step(memory, part):
        return _step(write, memory, part)

    memory, out = lax.scan(step, memory, jax.tree.map(tiled, tokens))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :N], memory


def read(chunk: Chunk, q: Array, w: Array | None) -> Array:
    """What features [B C G R D] find in the carried memory and, unless None, in what the tokens of
    the chunk have written, ``w``: [B C G R E+1]."""
    going, later = (z[..., None, None, None] for z in (chunk.going, chunk.later))
    out = jnp.einsum("bcgrd,bgde->bcgre", jnp.where(going, q, 0), chunk.memory.past)
    out += jnp.einsum("bcgrd,bgde->bcgre", jnp.where(later, q, 0), chunk.memory.now)
    if w is None:
        return out
    score = jnp.einsum("bcgrd,bjgd->bgrcj", q, chunk.k)
    score = jnp.where(chunk.within[:, None, None], score, 0)
    return out + jnp.einsum("bgrcj,bjge->bcgre", score, w)


def count_reads(dims: Dims, length: int, chunk: int) -> float:
    """Operations of `read` for all tokens: from both matrices and, masked or not, their chunk."""
    columns, chunk = dims.value_dim + 1, min(chunk, length)
    each = 2 * dims.key_dim * columns + chunk * (dims.key_dim + columns)
    return 2.0 * dims.heads * length * each


def _step(write: Write, memory: Memory, t: Tokens) -> tuple[Memory, Array]:
    full = t.seg >= 0
    going = full & (t.seg == memory.seg[:, None])
    later = going & (t.segment > memory.segment[:, None])
    together = (t.seg[:, :, None] == t.seg[:, None]) & full[:, :, None]
    within = together & (t.segment[:, None] < t.segment[:, :, None])
    chunk = Chunk(t.k, t.v, memory, going, later, within, together)
    w = write(chunk)
    return _written(memory, t, w), read(chunk, t.q, w)


def _written(memory: Memory, t: Tokens, w: Array) -> Memory:
    """The memory behind the last token of a chunk."""
    full = t.seg >= 0
    last = jnp.max(jnp.where(full, jnp.arange(full.shape[1]), 0), 1, keepdims=True)
    seg, segment = (jnp.take_along_axis(z, last, 1)[:, 0] for z in (t.seg, t.segment))
    some = seg >= 0
    seg, segment = (
        jnp.where(some, a, b) for a, b in ((seg, memory.seg), (segment, memory.segment))
    )
    mine = full & (t.seg == seg[:, None])
    running = mine & (t.segment == segment[:, None])

    def total(which: Array) -> Array:
        return jnp.einsum("bcgd,bcge->bgde", jnp.where(which[..., None, None], t.k, 0), w)

    def kept(which: Array, matrix: Array) -> Array:
        return jnp.where(which[:, None, None, None], matrix, 0)

    same, moved = seg == memory.seg, segment > memory.segment
    past = kept(same, memory.past) + kept(same & moved, memory.now) + total(mine & ~running)
    return Memory(past, kept(same & ~moved, memory.now) + total(running), seg, segment)


def local_of(keys: Keys, state: State | tuple[()]) -> tuple[Keys, Any]:
    """The keys of the segment that is being written, old and new, and those to remember."""
    return segments.remember(keys, state.local if state else ())
