"""Segments that hand a few learned memory slots from one to the next."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import blockwise, memory_slots, segments
from attnlab.engines.memory_slots import Carry, Partial, Slots
from attnlab.errors import UserError
from attnlab.refusals import refuse_bidirectional, refuse_normaliser
from attnlab.registry import register


class State(NamedTuple):
    """``slots`` that the running segment reads, what has been written of the next ones, how many
    tokens the segment has (``count`` [B]), and the newest ``segment`` tokens."""

    slots: Slots
    written: Partial
    count: Array
    local: Keys


@register
@dataclass(frozen=True)
class RecurrentMemory(Mechanism):
    """Local attention inside segments that read ``slots`` memory tokens, rewritten after each.

    With R_s = (k, v) the slots of segment s, R_0 learned, and w the learned write queries,
        out_i = softmax over [R_s; own segment, j <= i] of (q_i · k) v,
        o = softmax over [R_s; segment s] of (w · k) v,
        R_{s+1} = R_0 + o (W_k, W_v).
    Gradients flow through all segments of a call. Slots carry no position, nor does what is written
    into them; the local part takes rotations and biases. Segments count from the first token of a
    document that the memory has seen. The published form puts the memory tokens before and behind
    the segment at the input of a whole model, so that they pass through all layers; this is its
    recurrence inside one layer, with every layer's slots its own. Shapes: queries [B N H D], keys
    [B N G D], values [B N G E] -> [B N H E]. Cost: O(N (segment + 3 slots) (D + E)) time, as three
    sets of slots may be read in a chunk; O(N) memory; the state holds the slots and the newest
    ``segment`` tokens. Raises `UserError` for a segment < 1, slots < 0, a bidirectional rule.
    Source: Bulatov et al., arXiv 2207.06881.
    """

    segment: int = 256
    slots: int = 16

    cost = Cost(time=1, memory=1, state=0)
    carries = True

    def __post_init__(self):
        if self.segment < 1 or self.slots < 0:
            raise UserError(
                f"recurrent_memory: segment={self.segment}, slots={self.slots}; "
                "use segment >= 1 and slots >= 0"
            )

    def init(self, key: Array, dims: Dims):
        if self.slots == 0:
            return {}
        H, G, D, E = dims.heads, dims.kv_heads, dims.key_dim, dims.value_dim
        m, wide = self.slots, (H * E) ** -0.5
        sizes = {
            "key": ((m, G, D), 1.0),
            "value": ((m, G, E), 1.0),
            "query": ((m, H, D), 1.0),
            "to_key": ((H, E, G, D), wide),
            "to_value": ((H, E, G, E), wide),
        }
        draws = jax.random.split(key, len(sizes))
        return {
            name: scale * jax.random.normal(draw, shape)
            for draw, (name, (shape, scale)) in zip(draws, sizes.items())
        }

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> State:
        G, D, E = dims.kv_heads, dims.key_dim, dims.value_dim
        k = jnp.zeros((batch, self.slots, G, D), jnp.float32)
        v = jnp.zeros((batch, self.slots, G, E), jnp.float32)
        local = Keys.empty(dims, batch, self.segment, dtype)
        written = memory_slots.nothing_written(batch, dims.heads, self.slots, E)
        return State(Slots(k, v), written, jnp.zeros(batch, jnp.int32), local)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        before = state or self._nothing(queries, keys)
        block, count = segments.number(
            keys.seg, self.segment, before.local.seg[:, -1], before.count
        )
        inner, tile = segments.part_of(rule), segments.tile_of(self.segment)
        here = _in_blocks(keys, block, before)
        attended = blockwise.attend(queries._replace(seg=block), here, inner, tile)
        slots, written = before.slots, before.written
        if self.slots:
            carry = Carry(slots, written, before.local.seg[:, -1], jnp.zeros_like(before.count))
            read, carry = memory_slots.read(params, queries, keys, rule, block, carry, self.segment)
            attended, (slots, written, *_) = segments.join(attended, read), carry
        if state:
            _, local = segments.remember(keys, state.local)
            state = State(slots, written, count, local)
        return Result(rule.tap("heads", attended[0]), state, {"lse": attended[1]})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        before = state or self._nothing(queries, keys)
        slots, block, after = _token_by_token(params, keys, rule, before)
        asking, here = queries._replace(seg=block), _in_blocks(keys, block, before)
        bare, H = dataclasses.replace(rule, taps=()), queries.q.shape[2]
        content = memory_slots.content(rule)
        q = content.rotate(queries.cleared().q, queries.pos, "query").astype(jnp.float32)

        def heads(z: Array) -> Array:
            return jnp.repeat(z.astype(jnp.float32), H // z.shape[-2], -2)

        read = jax.vmap(content.product, 1, 2)  # one token after the other
        z = read(q[..., None, :], jnp.swapaxes(slots.k, 2, 3))[..., 0, :]
        z = jnp.concatenate([z, bare.logits(asking, here)], -1)
        seen = jnp.broadcast_to((block >= 0)[:, None, :, None], (*z.shape[:3], self.slots))
        local = jnp.broadcast_to(
            rule.allowed(asking, here)[:, None], (*z.shape[:3], here.pos.shape[1])
        )
        seen = jnp.concatenate([seen, local], -1)
        z = jnp.where(seen, rule.tap("logits", z), MASK)
        probs = rule.tap("probs", jnp.where(seen, jax.nn.softmax(z, -1), 0))
        out = jnp.einsum("bhnm,bnmhe->bnhe", probs[..., : self.slots], heads(slots.v))
        out += jnp.einsum("bhnm,bmhe->bnhe", probs[..., self.slots :], heads(here.cleared().v))
        lse = jnp.where(jnp.any(seen, -1), jax.nn.logsumexp(z, -1), MASK)
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, after if state else (), {"lse": lse, "probs": probs})

    def _nothing(self, queries: Queries, keys: Keys) -> State:
        H, (B, _, G, D), E = queries.q.shape[2], keys.k.shape, keys.v.shape[-1]
        return self.initial_state(Dims(0, H, G, D, E), B, keys.k.dtype)

    def limit(self, length: int):
        return dataclasses.replace(self, segment=length, slots=0)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        sizes = dims.key_dim + dims.value_dim
        local = 2.0 * dims.heads * sizes * segments.count_pairs(length, self.segment, 0)
        return local + memory_slots.count_flops(dims, length, self.segment, self.slots)

    @classmethod
    def examples(cls):
        return (cls(segment=5, slots=3), cls(segment=6, slots=0))


def _in_blocks(keys: Keys, block: Array, before: State) -> Keys:
    """The tokens of the running segment and the new ones, with numbers of segments for ``seg``."""
    slot = jnp.arange(before.local.seg.shape[1])
    running = slot >= slot.size - before.count[:, None]
    local = before.local._replace(seg=jnp.where(running, 0, -1))
    return local.extended(keys._replace(seg=block))


def _token_by_token(params, keys: Keys, rule: Rule, before: State) -> tuple[Slots, Array, State]:
    """What every token reads, [B N m G ·], the number of its segment, and the state behind."""
    S, m, B = before.local.pos.shape[1], before.slots.k.shape[1], keys.pos.shape[0]
    content = memory_slots.content(rule)
    start = memory_slots.start_of(params, B) if m else before.slots

    def written(k: Array, v: Array, count: Array) -> Partial:
        none = memory_slots.nothing_written(*before.written.out.shape)
        if m == 0:
            return none
        held = jnp.arange(S) >= S - count[:, None]
        return memory_slots.more(none, memory_slots.asked(params, content, k), v, held)

    def turn(carry, t):
        slots, k, v, seg, count, block = carry
        new, over = t.seg != seg, count == S
        after = memory_slots.rewritten(params, content, slots, written(k, v, count)) if m else slots
        slots = memory_slots.either(new, start, memory_slots.either(over, after, slots))
        count, block = jnp.where(new | over, 0, count) + 1, block + (new | over)
        k, v = (jnp.concatenate([a[:, 1:], b[:, None]], 1) for a, b in ((k, t.k), (v, t.v)))
        carry = memory_slots.either(t.seg >= 0, (slots, k, v, t.seg, count, block), carry)
        return carry, (slots, jnp.where(t.seg >= 0, block, -1))

    local = before.local
    k, v = (z.astype(jnp.float32) for z in local[:2])
    first = before.slots, k, v, local.seg[:, -1], before.count, jnp.zeros_like(before.count)
    cleared = keys.cleared()
    cleared = cleared._replace(k=cleared.k.astype(jnp.float32), v=cleared.v.astype(jnp.float32))
    by_time = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), cleared)
    (slots, k, v, _, count, _), (read, block) = lax.scan(turn, first, by_time)
    read, block = jax.tree.map(lambda z: jnp.moveaxis(z, 0, 1), (read, block))
    _, local = segments.remember(keys, local)
    return read, block, State(slots, written(k, v, count), count, local)


def _refuse(rule: Rule) -> None:
    refuse_bidirectional("recurrent_memory", rule, "its memory is what came before a segment")
    refuse_normaliser("recurrent_memory", rule)
