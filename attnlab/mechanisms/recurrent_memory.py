"""Segments that hand a few learned memory slots from one to the next."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import blockwise, report_use, segments
from attnlab.errors import UserError
from attnlab.refusals import refuse_bidirectional, refuse_normaliser
from attnlab.registry import register


class Slots(NamedTuple):
    """What is read: keys [B m G D] and values [B m G E], f32."""

    k: Array
    v: Array


class Partial(NamedTuple):
    """A softmax of the write queries over the tokens so far: ``top``, ``total`` [B H m] and
    ``out`` [B H m E], f32, not yet divided."""

    top: Array
    total: Array
    out: Array


class State(NamedTuple):
    """``slots`` that the running segment reads, what has been written of the next ones, how many
    tokens the segment has (``count`` [B]), and the newest ``segment`` tokens."""

    slots: Slots
    written: Partial
    count: Array
    local: Keys


class Carry(NamedTuple):
    """`State` inside a call: ``seg`` and ``block`` [B] of the last token."""

    slots: Slots
    written: Partial
    seg: Array
    block: Array


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
    [B N G D], values [B N G E] -> [B N H E]. Cost: O(N (segment + slots) (D + E)) time, O(N)
    memory; the state holds the slots and the newest ``segment`` tokens. Raises `UserError` for a
    segment < 1, slots < 0, a bidirectional rule. Source: Bulatov et al., arXiv 2207.06881.
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
        draw = [
            jax.random.normal(k, s)
            for k, s in zip(
                jax.random.split(key, 5),
                (
                    (self.slots, G, D),
                    (self.slots, G, E),
                    (self.slots, H, D),
                    (H, E, G, D),
                    (H, E, G, E),
                ),
            )
        ]
        wide = (H * E) ** -0.5
        return {
            "key": draw[0],
            "value": draw[1],
            "query": draw[2],
            "to_key": draw[3] * wide,
            "to_value": draw[4] * wide,
        }

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> State:
        G, D, E = dims.kv_heads, dims.key_dim, dims.value_dim
        k = jnp.zeros((batch, self.slots, G, D), jnp.float32)
        v = jnp.zeros((batch, self.slots, G, E), jnp.float32)
        local = Keys.empty(dims, batch, self.segment, dtype)
        written = _nothing_written(batch, dims.heads, self.slots, E)
        return State(Slots(k, v), written, jnp.zeros(batch, jnp.int32), local)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        before = state or self._nothing(params, queries, keys)
        block, count = segments.number(
            keys.seg, self.segment, before.local.seg[:, -1], before.count
        )
        inner, tile = segments.part_of(rule), segments.tile_of(self.segment)
        here = _in_blocks(keys, block, before)
        attended = blockwise.attend(queries._replace(seg=block), here, inner, tile)
        slots, written = before.slots, before.written
        if self.slots:
            carry = Carry(slots, written, before.local.seg[:, -1], jnp.zeros_like(before.count))
            read, carry = _read(params, queries, keys, rule, block, carry, self.segment)
            attended, (slots, written, *_) = segments.join(attended, read), carry
        if state:
            _, local = segments.remember(keys, state.local)
            state = State(slots, written, count, local)
        return Result(rule.tap("heads", attended[0]), state, {"lse": attended[1]})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        before = state or self._nothing(params, queries, keys)
        slots, block, after = _token_by_token(params, keys, rule, before)
        asking, here = queries._replace(seg=block), _in_blocks(keys, block, before)
        bare, H = dataclasses.replace(rule, taps=()), queries.q.shape[2]
        q = queries.cleared().q.astype(jnp.float32)

        def heads(z: Array) -> Array:
            return jnp.repeat(z.astype(jnp.float32), H // z.shape[-2], -2)

        read = jax.vmap(_content(rule).product, 1, 2)  # one token after the other
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

    def _nothing(self, params, queries: Queries, keys: Keys) -> State:
        H, (B, _, G, D), E = queries.q.shape[2], keys.k.shape, keys.v.shape[-1]
        return self.initial_state(Dims(0, H, G, D, E), B, keys.k.dtype)

    def limit(self, length: int):
        return dataclasses.replace(self, segment=length, slots=0)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        whole = length // self.segment
        pairs = segments.count_pairs(length, self.segment, 0)
        pairs += 2 * length * self.slots + whole * self.slots**2
        sizes = dims.key_dim + dims.value_dim
        project = whole * self.slots * dims.heads * dims.value_dim * dims.kv_heads * sizes
        return 2.0 * dims.heads * sizes * pairs + 2.0 * project

    @classmethod
    def examples(cls):
        return (cls(segment=5, slots=3), cls(segment=6, slots=0))


def _content(rule: Rule) -> Rule:
    """The same scale and cap, and no positions."""
    return Rule(scale=rule.scale, soft_cap=rule.soft_cap)


def _in_blocks(keys: Keys, block: Array, before: State) -> Keys:
    """The tokens of the running segment and the new ones, with numbers of segments for ``seg``."""
    slot = jnp.arange(before.local.seg.shape[1])
    running = slot >= slot.size - before.count[:, None]
    local = before.local._replace(seg=jnp.where(running, 0, -1))
    return local.extended(keys._replace(seg=block))


def _read(
    params, queries: Queries, keys: Keys, rule: Rule, block: Array, carry: Carry, segment: int
) -> tuple[tuple[Array, Array], Carry]:
    """``(out, lse)`` over the slots, a chunk of at most ``segment`` tokens at a time: it holds the
    end of the running segment, the beginning of the next, and documents that begin in it."""
    report_use("recurrent_memory", "XLA")
    B, N, H, _ = queries.q.shape
    size = min(N, segment, 256)

    def tiled(z: Array, fill: int = 0) -> Array:
        pad = [(0, 0), (0, -N % size)] + [(0, 0)] * (z.ndim - 2)
        z = jnp.pad(z, pad, constant_values=fill)
        return jnp.moveaxis(z.reshape(B, -1, size, *z.shape[2:]), 1, 0)

    q, k, v = (tiled(z.astype(jnp.float32)) for z in (queries.cleared().q, *keys.cleared()[:2]))
    content = _content(rule)
    start = Slots(*(jnp.broadcast_to(params[z], (B, *params[z].shape)) for z in ("key", "value")))
    carry = carry._replace(slots=_either(carry.seg >= 0, carry.slots, start))

    @jax.checkpoint
    def step(carry, part):
        return _chunk(params, content, start, carry, *part)

    carry, (out, lse) = lax.scan(step, carry, (q, k, v, tiled(keys.seg, -1), tiled(block, -1)))
    out = jnp.moveaxis(out, 0, 1).reshape(B, -1, H, out.shape[-1])[:, :N]
    lse = jnp.moveaxis(lse, 0, 2).reshape(B, H, -1)[..., :N]
    return (out.astype(queries.q.dtype), lse), carry


def _chunk(params, rule: Rule, start: Slots, carry: Carry, q, k, v, seg, block):
    full = block >= 0
    same = full & (seg == carry.seg[:, None])
    going = same & (block == carry.block[:, None])
    moved = same & ~going
    asking = jnp.swapaxes(
        jnp.broadcast_to(params["query"], (q.shape[0], *params["query"].shape)), 1, 2
    )
    z = rule.product(asking, jnp.swapaxes(k, 1, 2))
    second = _rewritten(params, rule, carry.slots, _more(carry.written, z, v, going))
    choices = carry.slots, second, start
    which = jnp.stack([going, moved, full & ~same], -1)
    read = _look(rule, q, choices, which)

    last = jnp.max(jnp.where(full, jnp.arange(full.shape[1]), 0), 1, keepdims=True)
    seg, last = (jnp.take_along_axis(y, last, 1)[:, 0] for y in (seg, block))
    some = last >= 0
    seg, last = jnp.where(some, seg, carry.seg), jnp.where(some, last, carry.block)
    stays = (seg == carry.seg) & (last == carry.block)
    slots = _either(stays, carry.slots, _either(seg == carry.seg, second, start))
    none = _nothing_written(*carry.written.out.shape)
    written = _more(_either(stays, carry.written, none), z, v, full & (block == last[:, None]))
    return Carry(slots, written, seg, last), read


def _look(rule: Rule, q: Array, choices: tuple[Slots, ...], which: Array) -> tuple[Array, Array]:
    """Softmax over the slots of the choice that ``which`` [B C choices] makes for each query:
    ``out`` [B C H E], ``lse`` [B H C]."""
    k, v = (jnp.concatenate(z, 1) for z in zip(*choices))
    seen = jnp.repeat(which, k.shape[1] // which.shape[-1], -1)[:, None]
    z = rule.product(jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2))
    z = jnp.where(seen, z, MASK)
    probs = jnp.where(seen, jax.nn.softmax(z, -1), 0)
    lse = jnp.where(jnp.any(seen, -1), jax.nn.logsumexp(z, -1), MASK)
    return jnp.swapaxes(_weigh(probs, v), 1, 2), lse


def _weigh(weight: Array, v: Array) -> Array:
    """[B H n M], [B M G E] -> [B H n E]."""
    B, H, n, M = weight.shape
    weight = weight.reshape(B, v.shape[2], -1, n, M)
    return jnp.einsum("bgrnm,bmge->bgrne", weight, v).reshape(B, H, n, -1)


def _nothing_written(batch: int, heads: int, slots: int, value_dim: int) -> Partial:
    zero = jnp.zeros((batch, heads, slots), jnp.float32)
    return Partial(zero + MASK, zero, jnp.zeros((*zero.shape, value_dim), jnp.float32))


def _more(written: Partial, z: Array, v: Array, which: Array) -> Partial:
    """``written`` and the tokens ``which`` [B C], with logits z [B H m C] and values [B C G E]."""
    which = which[:, None, None]
    z = jnp.where(which, z, MASK)
    top = lax.stop_gradient(jnp.maximum(written.top, jnp.max(z, -1)))
    shrink = jnp.exp(written.top - top)
    weight = jnp.where(which, jnp.exp(z - top[..., None]), 0)
    total = written.total * shrink + jnp.sum(weight, -1)
    return Partial(top, total, written.out * shrink[..., None] + _weigh(weight, v))


def _rewritten(params, rule: Rule, slots: Slots, written: Partial) -> Slots:
    """The slots of the next segment: R_0 + o (W_k, W_v)."""
    B, m = slots.k.shape[:2]
    asking = jnp.swapaxes(jnp.broadcast_to(params["query"], (B, *params["query"].shape)), 1, 2)
    z = rule.product(asking, jnp.swapaxes(slots.k, 1, 2))
    whole = _more(written, z, slots.v, jnp.ones((B, m), bool))
    out = whole.out / whole.total[..., None]
    k = params["key"] + jnp.einsum("bhme,hegd->bmgd", out, params["to_key"])
    return Slots(k, params["value"] + jnp.einsum("bhme,hegf->bmgf", out, params["to_value"]))


def _either(which: Array, a, b):
    """Rows of pytree ``a`` where ``which`` [B], else of ``b``."""
    return jax.tree.map(lambda x, y: jnp.where(which.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)


def _token_by_token(params, keys: Keys, rule: Rule, before: State) -> tuple[Slots, Array, State]:
    """What every token reads, [B N m G ·], the number of its segment, and the state behind."""
    S, m = before.local.pos.shape[1], before.slots.k.shape[1]
    B, content = keys.pos.shape[0], _content(rule)
    start = before.slots
    if m:
        start = Slots(
            *(jnp.broadcast_to(params[z], (B, *params[z].shape)) for z in ("key", "value"))
        )
    cleared = Keys(*(z.astype(jnp.float32) for z in keys.cleared()[:2]), *keys[2:])

    def written(k: Array, v: Array, count: Array) -> Partial:
        none = _nothing_written(B, before.written.top.shape[1], m, v.shape[-1])
        if m == 0:
            return none
        asking = jnp.swapaxes(jnp.broadcast_to(params["query"], (B, *params["query"].shape)), 1, 2)
        z = content.product(asking, jnp.swapaxes(k, 1, 2))
        return _more(none, z, v, jnp.arange(S) >= S - count[:, None])

    def turn(carry, t):
        slots, k, v, seg, count, block = carry
        new, over = t.seg != seg, count == S
        after = _rewritten(params, content, slots, written(k, v, count)) if m else slots
        slots = _either(new, start, _either(over, after, slots))
        count, block = jnp.where(new | over, 0, count) + 1, block + (new | over)
        k, v = (jnp.concatenate([a[:, 1:], b[:, None]], 1) for a, b in ((k, t.k), (v, t.v)))
        carry = _either(t.seg >= 0, (slots, k, v, t.seg, count, block), carry)
        return carry, (slots, jnp.where(t.seg >= 0, block, -1))

    local = before.local
    k, v = (z.astype(jnp.float32) for z in local[:2])
    first = before.slots, k, v, local.seg[:, -1], before.count, jnp.zeros_like(before.count)
    by_time = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), cleared)
    (slots, k, v, _, count, _), (read, block) = lax.scan(turn, first, by_time)
    read, block = jax.tree.map(lambda z: jnp.moveaxis(z, 0, 1), (read, block))
    _, local = segments.remember(keys, local)
    return read, block, State(slots, written(k, v, count), count, local)


def _refuse(rule: Rule) -> None:
    refuse_bidirectional("recurrent_memory", rule, "its memory is what came before a segment")
    refuse_normaliser("recurrent_memory", rule)
