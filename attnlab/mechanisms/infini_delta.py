"""Local attention with a memory in which a key written again is overwritten."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Mechanism
from attnlab.engines import association, triangular
from attnlab.engines.association import Chunk, Memory, State
from attnlab.errors import UserError
from attnlab.mechanisms.infini import Update, count_flops, positive, recall, recall_by_token
from attnlab.refusals import refuse_bidirectional
from attnlab.registry import register


@register
@dataclass(frozen=True)
class InfiniDelta(Mechanism):
    """Infini-attention whose memory corrects itself token by token, so that the last value wins.

    With φ(k) = (elu(k) + 1) / |elu(k) + 1| every token of the document writes in turn
        M += φ(k)ᵀ (v − φ(k) M),
    and all tokens of a segment read φ(q) M as it stood at the beginning of the segment:
        out = g φ(q) M + (1 − g) softmax(local),   g = sigmoid(β), 0 while the memory is empty.
    There is no normaliser to divide by: features of unit length make φ(k) M = v exact for the
    newest v of a key, where the published rule (`infini`, update "delta") returns about half of the
    change. The corrections of a chunk solve one triangular system. Shapes, state and refusals as
    `infini`. Cost: O(N (segment (D + E) + D E)) time, O(N) memory. Raises `UserError` for a segment
    < 1 or a bidirectional rule. Source: Munkhdalai et al., arXiv 2404.07143, with the delta rule of
    Schlag et al., 2102.11174, in the chunks of Yang et al., 2406.06484.
    """

    segment: int = 256
    gate: float = -2.0  # β at the start: mostly local

    cost = Cost(time=1, memory=1, state=0)
    carries = True

    def __post_init__(self):
        if self.segment < 1:
            raise UserError(f"infini_delta: segment={self.segment}; use segment >= 1")

    @property
    def relative(self) -> bool:
        return False

    def init(self, key: Array, dims: Dims):
        return {"gate": jnp.full((dims.heads,), self.gate)}

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> State:
        return association.empty(dims, batch, self.segment, dtype)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        return recall(UPDATE, self.segment, params, queries, keys, rule, state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        return recall_by_token(UPDATE, self.segment, params, queries, keys, rule, state)

    def limit(self, length: int):
        return dataclasses.replace(self, segment=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        chunk, columns = min(self.segment, 64, length), dims.value_dim + 1
        known = dims.key_dim * (chunk + columns) + chunk * columns / 2  # the last is half a matrix
        return count_flops(dims, length, self.segment) + 2.0 * dims.kv_heads * length * known

    @classmethod
    def examples(cls):
        return (cls(segment=5, gate=0.0),)


def _unit(z: Array) -> Array:
    z = positive(z)
    return z * jax.lax.rsqrt(jnp.sum(jnp.square(z), -1, keepdims=True) + 1e-12)


def _write(chunk: Chunk) -> Array:
    """w_j + Σ_{i<j} (φ(k_j) φ(k_i)) w_i = v_j − φ(k_j) M for all tokens of a chunk at once. The
    last column only counts, so it is written as it is."""
    going = chunk.going[..., None, None]
    matrix = chunk.memory.past + chunk.memory.now
    known = jnp.einsum("bcgd,bgde->bcge", jnp.where(going, chunk.k, 0), matrix)
    score = jnp.einsum("bcgd,bjgd->bgcj", chunk.k, chunk.k)
    score = jnp.where(jnp.tril(chunk.together, -1)[:, None], score, 0)
    wanted = jnp.moveaxis(chunk.v - known, 2, 1)
    w = triangular.solve(score, wanted)
    return _counted(jnp.moveaxis(w, 1, 2), chunk.v)


def _write_one(memory: Memory, k: Array, v: Array) -> Array:
    return _counted(v - jnp.einsum("bgd,bgde->bge", k, memory.past + memory.now), v)


def _counted(w: Array, v: Array) -> Array:
    return jnp.concatenate([w[..., :-1], v[..., -1:]], -1)


def _refuse(rule) -> None:
    refuse_bidirectional("infini_delta", rule, "its memory is what came before a segment")


UPDATE = Update(_unit, _write, _write_one, lambda found: found[..., :-1])
