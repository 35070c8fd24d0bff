"""Local attention with a compressive memory that does not grow."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule, count_pairs
from attnlab.engines import association, blockwise, dense, segments
from attnlab.engines.association import FAINT, Chunk, Memory, State, Tokens, Write
from attnlab.errors import UserError, did_you_mean
from attnlab.refusals import refuse_bidirectional
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Infini(Mechanism):
    """Local attention inside segments, gated with a matrix memory of all segments before.

    With σ = elu + 1 and M, z as they stood at the beginning of the query's segment,
        out = g σ(q) M / σ(q) z + (1 − g) softmax(local),   g = sigmoid(β), one β a head;
        update "linear": M += Σ σ(k)ᵀ v,  "delta": M += Σ σ(k)ᵀ (v − σ(k) M / σ(k) z);  z += Σ σ(k).
    g is 0 while the memory is empty. Keys in the memory carry no position; the local part takes
    rotations and biases. The published delta rule divides by a normaliser that grows with every
    write, so that a key written twice is not overwritten; `infini_delta` overwrites it. Gradients
    flow through the memory. Shapes: queries [B N H D], keys [B N G D], values [B N G E] ->
    [B N H E]; the memory [B G D E+1] is f32. Cost: O(N ((segment + C) (D + E) + D E)) time in
    chunks of C = min(segment, 64) tokens, which may begin anywhere in a segment and read two
    matrices; O(N (1 + D E / C)) memory; the state does not grow. Raises `UserError` for a
    segment < 1, an unknown update, a bidirectional rule.
    Source: Munkhdalai et al., arXiv 2404.07143.
    """

    segment: int = 256
    update: str = "linear"
    gate: float = -2.0  # β at the start: mostly local

    cost = Cost(time=1, memory=1, state=0)
    carries = True

    def __post_init__(self):
        if self.segment < 1:
            raise UserError(f"infini: segment={self.segment}; use segment >= 1")
        if self.update not in UPDATES:
            raise UserError(
                f"infini: no update {self.update!r}; {did_you_mean(self.update, UPDATES)}"
            )

    @property
    def relative(self) -> bool:
        return False

    def init(self, key: Array, dims: Dims):
        return {"gate": jnp.full((dims.heads,), self.gate)}

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> State:
        return association.empty(dims, batch, self.segment, dtype)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        return recall(UPDATES[self.update], self.segment, params, queries, keys, rule, state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        update = UPDATES[self.update]
        return recall_by_token(update, self.segment, params, queries, keys, rule, state)

    def limit(self, length: int):
        return dataclasses.replace(self, segment=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        counted = count_flops(dims, length, self.segment)
        if self.update == "linear":
            return counted
        asks = dims._replace(heads=dims.kv_heads)
        return counted + 2 * association.count_reads(asks, length, min(self.segment, 64))

    @classmethod
    def examples(cls):
        return (cls(segment=5, gate=0.0), cls(segment=6, update="delta", gate=0.0))


class Update(NamedTuple):
    """How a memory is written and asked: ``features`` of queries and keys; ``write`` what tokens of
    a chunk add under their keys, ``write_one`` the same for one token, from `Memory`, k [B G D]
    and v [B G E+1]; ``answer`` the values in what was found [... E+1]."""

    features: Callable[[Array], Array]
    write: Write
    write_one: Callable[[Memory, Array, Array], Array]
    answer: Callable[[Array], Array]


def recall(
    update: Update, segment: int, params, queries: Queries, keys: Keys, rule: Rule, state
) -> Result:
    """Attention inside segments and what a memory of those before answers, gated."""
    tokens = association.tokens_of(queries, keys, update.features, segment)
    memory = association.memory_of(state, tokens, segment)
    found, memory = association.associate(update.write, tokens, memory, min(segment, 64))
    keys, local = association.local_of(keys, state)
    inner = segments.part_of(rule).restrict(segments.own(segment))
    out, _ = blockwise.attend(queries, keys, inner, segments.tile_of(segment))
    return _gated(update, params, found, out, rule, memory, local)


def recall_by_token(
    update: Update, segment: int, params, queries: Queries, keys: Keys, rule: Rule, state
) -> Result:
    """`recall`, literally: every token reads, then writes."""
    tokens = association.tokens_of(queries, keys, update.features, segment)
    memory = association.memory_of(state, tokens, segment)

    def turn(memory: Memory, t: Tokens):
        same, full = t.seg == memory.seg, t.seg >= 0
        moved = (t.segment > memory.segment)[:, None, None, None]
        past = jnp.where(moved, memory.past + memory.now, memory.past)
        now = jnp.where(moved, 0, memory.now)
        past, now = (jnp.where(same[:, None, None, None], z, 0) for z in (past, now))
        found = jnp.einsum("bgrd,bgde->bgre", t.q, past)
        w = update.write_one(Memory(past, now, t.seg, t.segment), t.k, t.v)
        after = Memory(past, now + t.k[..., None] * w[:, :, None], t.seg, t.segment)

        def either(a, b):
            return jnp.where(full.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        return jax.tree.map(either, after, memory), found

    memory, found = lax.scan(turn, memory, jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), tokens))
    keys, local = association.local_of(keys, state)
    inner = segments.part_of(rule).restrict(segments.own(segment))
    out, _, _ = dense.attend(queries, keys, inner)
    return _gated(update, params, jnp.moveaxis(found, 0, 1), out, rule, memory, local)


def _gated(
    update: Update, params, found: Array, out: Array, rule: Rule, memory: Memory, local
) -> Result:
    found = found.reshape(*out.shape[:3], -1)
    gate = jnp.where(found[..., -1:] > FAINT, jax.nn.sigmoid(params["gate"])[:, None], 0)
    mixed = gate * update.answer(found) + (1 - gate) * out.astype(jnp.float32)
    state = State(memory.past, memory.now, local) if local else ()
    return Result(rule.tap("heads", mixed.astype(out.dtype)), state, {})


def positive(z: Array) -> Array:
    """σ = elu + 1."""
    return jax.nn.elu(z) + 1


def normalised(found: Array) -> Array:
    """σ(q) M / σ(q) z; 0 from an empty memory."""
    some = found[..., -1:] > FAINT
    return jnp.where(some, found[..., :-1] / jnp.where(some, found[..., -1:], 1), 0)


def _delta(chunk: Chunk) -> Array:
    """A chunk of at most ``segment`` tokens meets at most two segments of a document. Those of the
    first find all they need in the carried memory, those of the second in what the first wrote."""
    k = chunk.k[:, :, :, None]
    first = _corrected(chunk.v, association.read(chunk, k, None)[:, :, :, 0])
    return _corrected(chunk.v, association.read(chunk, k, first)[:, :, :, 0])


def _delta_one(memory: Memory, k: Array, v: Array) -> Array:
    return _corrected(v, jnp.einsum("bgd,bgde->bge", k, memory.past))


def _corrected(v: Array, found: Array) -> Array:
    """v − σ(k) M / σ(k) z, and the 1 that z grows by."""
    return v.at[..., :-1].add(-normalised(found))


UPDATES = {
    "linear": Update(positive, lambda chunk: chunk.v, lambda memory, k, v: v, normalised),
    "delta": Update(positive, _delta, _delta_one, normalised),
}


def count_flops(dims: Dims, length: int, segment: int) -> float:
    """Operations of local pairs, and of reading and writing the memory."""
    whole, rest = divmod(length, segment)
    pairs = whole * count_pairs(segment) + count_pairs(rest)
    local = 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs
    written = 4.0 * dims.kv_heads * length * dims.key_dim * (dims.value_dim + 1)
    return local + written + association.count_reads(dims, length, min(segment, 64))


def _refuse(rule: Rule) -> None:
    refuse_bidirectional("infini", rule, "its memory is what came before a segment")
