"""Memory as context: segments that read a memory, attend to what it recalled, and write to it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import blockwise, momentum, persistent, segments
from attnlab.engines.delta import unit
from attnlab.engines.undecayed import latest_document, pad
from attnlab.errors import UserError
from attnlab.mechanisms.titans import Titans, validate
from attnlab.mechanisms.titans_gate import gated, refuse
from attnlab.mechanisms.titans_layer import count_projections, projected, projections
from attnlab.refusals import refuse_taps
from attnlab.registry import register


class State(NamedTuple):
    """``memory`` after the newest token, its matrix ``start`` [B G D E] when the running segment
    began; of that segment the ``tokens``, and what was ``recalled`` for each, as keys."""

    memory: momentum.State
    start: Array
    tokens: Keys
    recalled: Keys


class Carry(NamedTuple):
    """`State` inside a call, without the tokens; ``block`` [B] numbers the running segment, and is
    the ``seg`` of what was ``recalled`` in it."""

    memory: momentum.State
    start: Array
    block: Array
    recalled: Keys


class Part(NamedTuple):
    """Some tokens [B C ...] of a call: ``queries``, whose ``seg`` is the number of their segment,
    their document ``seg``, and ``out`` and ``lse`` [B C H] of the attention to P and to tokens."""

    queries: Queries
    seg: Array
    out: Array
    lse: Array


@register
@dataclass(frozen=True)
class TitansContext(Mechanism):
    """Attention inside segments, beside what the memory of `titans` recalls for them (Titans MAC).

    With M' the memory of `titans` as it stood when the segment of token i began, and P
    ``persistent`` learned keys and values that all queries see,
        h_i = M'ᵀ q_i / |q_i|,   (k'_i, v'_i) = h_i (W_k, W_v)
        y_i = softmax over [P; h_j; tokens j], j <= i in the same segment, of q_i · (p, k'_j, k_j)
        (q''_i, k''_i, v''_i) = y_i (U_q, U_k, U_v),   M learns k''_i -> v''_i by gates of y_i
        out_i = norm(y_i) ∘ sigmoid(norm'(m_i)),   m_i = M_iᵀ q''_i
    As published, all tokens of a segment see every h_j of it, and m is read from the memory that
    has learned the whole segment: both show a token what comes after it. Here h_j is visible from
    its own token on, at whose position it stands, and M_i is the memory that has learned the tokens
    up to i. What is simplified: the q that reads the memory is the one that attends; h has
    projections of its own, not those of the tokens; P is keys and values, which the memory does not
    learn; ``rate`` and ``chunk`` are those of `titans`, whose steps are exact. The first segment of
    a document has nothing to recall and sees no h. norm, norm' as in `titans_gate`.
    Segments count from the first token of a document that the memory has seen, and follow each
    other one by one. Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E]; W_k
    [H E G D], W_v [H E G E], U likewise and U_q [H E H D]. Cost: O(N (segment (D + E) + D E + H E
    (D + E))) time a head, O(N) memory; where segments do not begin with a call, a part of it twice.
    The state holds two memories, and the keys of a segment twice. Raises `UserError` for a segment
    < 1, persistent < 0, steps that `titans` refuses and, when called, without an order of time and
    for taps on logits: what a segment attends to hangs on the attention of the one before.
    Source: Behrouz et al., arXiv 2501.00663.
    """

    segment: int = 256
    persistent: int = 4
    rate: float = 1.0
    chunk: int = 32

    cost = Cost(time=1, memory=1, state=0)

    def __post_init__(self):
        if self.segment < 1 or self.persistent < 0:
            raise UserError(
                f"titans_context: segment={self.segment}, persistent={self.persistent}; "
                "use segment >= 1 and persistent >= 0"
            )
        validate(self, self.rate, self.chunk)

    @property
    def titans(self) -> Titans:
        """The memory."""
        return Titans(self.rate, self.chunk)

    def init(self, key: Array, dims: Dims):
        draws = jax.random.split(key, 4)
        scale = jnp.ones((dims.heads, dims.value_dim))
        recalled = projections(draws[2], dims)
        return {
            "memory": self.titans.init(draws[0], _of_outputs(dims)),
            "persistent": persistent.init(draws[1], dims, self.persistent),
            "recalled": {name: recalled[name] for name in ("key", "value")},
            "attended": projections(draws[3], dims),
            "norm": {"attention": scale, "memory": scale},
        }

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> State:
        memory = self.titans.initial_state(dims, batch, dtype)
        tokens = Keys.empty(dims, batch, self.segment, dtype)
        return State(memory, memory.memory, tokens, tokens)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(self, rule)
        (B, N), dtype = queries.pos.shape, queries.q.dtype
        # In f32: what is rounded on its way from segment to segment adds up.
        queries, keys = segments.precise(queries), segments.precise(keys)
        before = segments.precise(state) if state else self._nothing(queries, keys)
        running = jnp.sum(before.tokens.seg >= 0, 1)
        block, _ = segments.number(keys.seg, self.segment, before.memory.seg, running)
        here = before.tokens.extended(keys._replace(seg=block))
        asking, tile = queries.cleared()._replace(seg=block), segments.tile_of(self.segment)
        out, lse = persistent.attend(params["persistent"], asking, here, rule, tile)
        carry = Carry(before.memory, before.start, jnp.zeros(B, jnp.int32), before.recalled)
        size = min(N, self.segment)

        def tiles(z: Array, fill: int = 0) -> Array:
            """[B N ...] -> [chunks B C ...]."""
            return jnp.moveaxis(pad(z, size, fill).reshape(B, -1, size, *z.shape[2:]), 1, 0)

        parts = Part(
            Queries(tiles(asking.q), tiles(asking.pos), tiles(block, -1)),
            tiles(keys.seg, -1),
            tiles(out),
            tiles(jnp.swapaxes(lse, 1, 2)),
        )
        carry, out = lax.scan(lambda c, part: self._step(params, rule, c, part), carry, parts)
        out = jnp.moveaxis(out, 0, 1).reshape(B, -1, *out.shape[3:])[:, :N]
        after = segments.as_before(self._after(carry, here), state) if state else ()
        return Result(rule.tap("heads", out.astype(dtype)), after, {})

    def _nothing(self, queries: Queries, keys: Keys) -> State:
        H, (B, _, G, D), E = queries.q.shape[2], keys.k.shape, keys.v.shape[-1]
        return self.initial_state(Dims(0, H, G, D, E), B, keys.k.dtype)

    def _after(self, carry: Carry, here: Keys) -> State:
        """The state, in which the running segment has the number 0."""

        def running(keys: Keys) -> Keys:
            return keys._replace(seg=jnp.where(keys.seg == carry.block[:, None], 0, -1))

        tokens = segments.newest(here, self.segment)
        return State(carry.memory, carry.start, running(tokens), running(carry.recalled))

    def _step(self, params, rule: Rule, carry: Carry, part: Part) -> tuple[Carry, Array]:
        """At most ``segment`` tokens: the end of the running segment, the beginning of the next,
        and documents that begin here. ``out`` [B C H E] f32."""
        (q, pos, block), same = part.queries, part.seg == carry.memory.seg[:, None]
        going = same & (block == carry.block[:, None]) & (block >= 0)
        moved = same & ~going & (block >= 0)
        known = jnp.any(carry.recalled.seg == carry.block[:, None], 1, keepdims=True)
        shown, unit_q = jnp.where(going & known | moved, block, -1), unit(q.astype(jnp.float32))

        def attended(turn: Array) -> tuple[Array, Keys]:
            """y, and what was recalled, for the memory ``turn`` between two segments."""
            h = jnp.where(going[..., None, None], read(carry.start, unit_q), read(turn, unit_q))
            new = recalled(params["recalled"], h, pos, shown, carry.recalled.k.dtype)
            met = carry.recalled.extended(new)
            inner, tile = segments.part_of(rule), segments.tile_of(self.segment)
            found = blockwise.attend(part.queries, met, inner, tile)
            return segments.join((part.out, jnp.swapaxes(part.lse, 1, 2)), found)[0], met

        def turned() -> Array:
            y, _ = attended(carry.memory.memory)
            seg = jnp.where(going, part.seg, -1)
            return self._learn(self.titans, params, y, pos, seg, carry.memory)[1].memory

        ends = jnp.any(going, 1) & jnp.any(moved, 1)
        turn = lax.cond(jnp.any(ends), turned, lambda: carry.memory.memory)
        y, met = attended(turn)
        m, memory = self._learn(self.titans, params, y, pos, part.seg, carry.memory)
        latest, _ = latest_document(block, carry.block)
        stays, goes_on = latest == carry.block, memory.seg == carry.memory.seg
        start = jnp.where(_rows(goes_on), turn, 0)
        start = jnp.where(_rows(stays), carry.start, start)
        after = Carry(memory, start, latest, segments.newest(met, self.segment))
        return after, gated(params["norm"], y, m)

    def _learn(self, form, params, y: Array, pos: Array, seg: Array, memory: momentum.State):
        """What the memory answers to ``y`` [B C H E] while it learns it, and the memory after."""
        y = y.astype(jnp.float32)
        q, k, v = (projected(y, params["attended"][name]) for name in ("query", "key", "value"))
        x = y.reshape(*y.shape[:2], -1)
        tokens = Queries(q, pos, seg), Keys(k, v, pos, seg)
        found = form(params["memory"], *tokens, Rule(), memory, x=x)
        return found.out, found.state

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        """Without a past."""
        _refuse(self, rule)
        nothing, B = self._nothing(queries, keys), queries.pos.shape[0]
        unknown = jnp.full(queries.pos.shape, -1, jnp.int32)
        first = _Literal(
            nothing.memory,
            nothing.start,
            *(jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.int32), jnp.ones(B, bool)),
            keys._replace(seg=unknown),
            keys._replace(seg=unknown),
        )

        def turn(carry: _Literal, i: Array) -> tuple[_Literal, Array]:
            after, out = self._literally(params, rule, carry, queries, keys, i)
            full = keys.seg[:, i] >= 0
            kept = jax.tree.map(
                lambda a, b: jnp.where(full.reshape(-1, *[1] * (a.ndim - 1)), a, b), after, carry
            )
            return kept, jnp.where(_rows(full)[..., 0], out, 0)

        _, out = lax.scan(turn, first, jnp.arange(queries.pos.shape[1]))
        out = jnp.moveaxis(out, 0, 1).astype(queries.q.dtype)
        return Result(rule.tap("heads", out), state, {})

    def _literally(self, params, rule: Rule, carry: "_Literal", queries, keys, i: Array):
        """Token ``i`` of every row."""
        seg, pos = keys.seg[:, i], keys.pos[:, i][:, None]
        new, over = seg != carry.memory.seg, carry.count == self.segment
        start = jnp.where(_rows(over), carry.memory.memory, carry.start)
        start, first = jnp.where(_rows(new), 0, start), new | (carry.first & ~over)
        count = jnp.where(new | over, 0, carry.count) + 1
        block = carry.block + (new | over)
        q = queries.cleared().q[:, i][:, None]
        h = read(start, unit(q.astype(jnp.float32)))
        shown = jnp.where(first, -1, block)[:, None]
        mine = recalled(params["recalled"], h, pos, shown, keys.k.dtype)
        past = jax.tree.map(lambda all, one: all.at[:, i].set(one[:, 0]), carry.recalled, mine)
        tokens = carry.tokens._replace(seg=carry.tokens.seg.at[:, i].set(block))
        asking, seen = Queries(q, pos, block[:, None]), past.extended(tokens)
        y, _ = persistent.attend_densely(params["persistent"], asking, seen, rule)
        form = self.titans.reference
        m, memory = self._learn(form, params, y, pos, seg[:, None], carry.memory)
        after = _Literal(memory, start, count, block, first, past, tokens)
        return after, gated(params["norm"], y, m)[:, 0]

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        H, D, E = dims.heads, dims.key_dim, dims.value_dim
        pairs = 2 * segments.count_pairs(length, self.segment, 0)
        pairs -= segments.count_pairs(min(length, self.segment), self.segment, 0)  # sees no h
        attention = 2.0 * H * (D + E) * pairs
        attention += persistent.count_flops(dims, length, self.persistent)
        reads = 4.0 * length * H * D * E
        made = count_projections(dims, length) + count_projections(dims, length, queries=False)
        return attention + reads + made + self.titans.flops(_of_outputs(dims), length)

    @classmethod
    def examples(cls):
        return (cls(segment=5, persistent=3, chunk=8), cls(segment=8, persistent=0, chunk=4))


class _Literal(NamedTuple):
    """What `TitansContext.reference` knows after a token: `State`, the tokens of the running
    segment (``count``), its number (``block``), whether it is the ``first`` of its document, all
    [B], and what was recalled for tokens of the call, and these, with ``seg`` −1 from here on."""

    memory: momentum.State
    start: Array
    count: Array
    block: Array
    first: Array
    recalled: Keys
    tokens: Keys


def read(memory: Array, q: Array) -> Array:
    """Mᵀ q: [B G D E], [B C H D] -> [B C H E]."""
    B, C, H, D = q.shape
    q = q.reshape(B, C, memory.shape[1], -1, D)
    return jnp.einsum("bgde,bcgrd->bcgre", memory, q).reshape(B, C, H, -1)


def recalled(weights: Any, h: Array, pos: Array, seg: Array, dtype: Any) -> Keys:
    """What the memory recalled, as tokens beside those it was recalled for."""
    k, v = (projected(h, weights[name]).astype(dtype) for name in ("key", "value"))
    return Keys(k, v, pos, seg)


def _of_outputs(dims: Dims) -> Dims:
    """Sizes for a memory whose gates read the outputs of all heads."""
    return dims._replace(width=dims.heads * dims.value_dim)


def _rows(which: Array) -> Array:
    """[B] -> [B 1 1 1]."""
    return which[:, None, None, None]


def _refuse(mechanism: Mechanism, rule: Rule) -> None:
    refuse(mechanism, rule)
    refuse_taps("titans_context", rule)  # no whole array of them is ever there to be rewritten
