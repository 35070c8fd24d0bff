"""The vocabulary: what every mechanism receives, may ask, and returns.

Axis letters: B batch, N query, M key, H heads, G kv heads (G divides H), D key dim, E value dim.
Tokens carry their own position and segment, so a sort, gather, eviction, pad or shard moves the
whole pytree and no mask can go stale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.products import scores
from attnlab.registry import Registry

MASK = -1e30
"""The logit of a key that may not be seen: large and finite, so that no gradient is NaN."""

Array = jax.Array


class Queries(NamedTuple):
    """Tokens that ask. ``q`` [B N H D]; ``pos`` [B N] int32; ``seg`` [B N] int32, < 0 = empty."""

    q: Array
    pos: Array
    seg: Array

    def cleared(self) -> Queries:
        """The same, with 0 in empty slots: a masked NaN would still spoil a gradient (0 * NaN)."""
        return self._replace(q=jnp.where(self.seg[..., None, None] >= 0, self.q, 0))


class Keys(NamedTuple):
    """Tokens that answer. ``k`` [B M G D]; ``v`` [B M G E]; ``pos``, ``seg`` [B M] int32.

    A slot with ``seg`` < 0 is empty: whatever it holds, even NaN, is never seen. The KV cache is
    itself a `Keys`, unrotated. ``count`` [B M] f32 says how many tokens a slot stands for, None
    that each is one: a mean over c tokens weighs as much as they do when ln c is added to its
    logit, and a uniform query then sees their true mean. ``unit`` [B M] int32 marks where units of
    text begin and end, see `Mechanism.marked`; None: unknown.
    """

    k: Array
    v: Array
    pos: Array
    seg: Array
    count: Array | None = None
    unit: Array | None = None

    @property
    def log_count(self) -> Array | None:
        """ln ``count``, without a gradient: f32 [B M], 0 in empty slots."""
        if self.count is None:
            return None
        full = (self.seg >= 0) & (self.count > 0)
        return jax.lax.stop_gradient(jnp.log(jnp.where(full, self.count, 1.0)))

    def cleared(self) -> Keys:
        """The same, with 0 in empty slots: a masked NaN would still spoil a gradient (0 * NaN)."""
        full = self.seg[..., None, None] >= 0
        return self._replace(k=jnp.where(full, self.k, 0), v=jnp.where(full, self.v, 0))

    @classmethod
    def empty(cls, dims: Dims, batch: int, length: int, dtype: Any = jnp.float32) -> Keys:
        """``length`` empty slots."""
        pos = jnp.zeros((batch, length), jnp.int32)
        return cls(
            jnp.zeros((batch, length, dims.kv_heads, dims.key_dim), dtype),
            jnp.zeros((batch, length, dims.kv_heads, dims.value_dim), dtype),
            pos,
            pos - 1,
        )

    def ordered(self) -> tuple[Keys, Array]:
        """The same tokens sorted by segment, then position, and where each came from: [B M]."""
        order = jnp.lexsort((self.pos, self.seg))

        def sort(z: Array) -> Array:
            return jnp.take_along_axis(z, order.reshape(order.shape + (1,) * (z.ndim - 2)), 1)

        return jax.tree.map(sort, self), order

    def extended(self, new: Keys) -> Keys:
        """These tokens followed by ``new`` ones."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], 1), self, new)


class Result(NamedTuple):
    """``out`` [B N H E] in the dtype of the queries; ``state`` for the next call; ``aux`` a dict.

    Keys of ``aux``: ``lse`` [B H N] f32, ``probs`` [B H N M] (dense forms only), ``loss`` (scalar
    terms added to the training loss, means over the tokens of the batch), ``statistics`` (next
    value of the parameters of that name, see `Mechanism.init`), ``stats`` (scalars worth logging).
    """

    out: Array
    state: Any = ()
    aux: Any = None


class Dims(NamedTuple):
    """Sizes a mechanism needs to make its parameters, state and FLOP count."""

    width: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


class Cost(NamedTuple):
    """Declared growth exponents in the sequence length N: time and memory of a forward plus
    backward pass, and size of the decoding state. Checked by measurement."""

    time: float
    memory: float
    state: float


def count_pairs(length: int, window: int | None = None, causal: bool = True) -> int:
    """Number of (query, key) pairs of a self-attention of ``length`` tokens.

    A ``window`` counts the visible keys on one side including the query itself.
    """
    w = length if window is None else min(window, length)
    one_sided = w * (w + 1) // 2 + (length - w) * w
    return one_sided if causal else 2 * one_sided - length


class Pattern:
    """Which keys a query may see, as a predicate of positions; a frozen dataclass, so that equal
    patterns hash equal and nothing retraces."""

    def visible(self, q_pos: Array, k_pos: Array) -> Array:
        """Elementwise bool, on arrays that broadcast."""
        raise NotImplementedError

    def reaches(self, q_low: Array, q_high: Array, k_low: Array, k_high: Array) -> Array:
        """False only if no query position in [q_low, q_high] sees a key position in
        [k_low, k_high]; lets engines skip whole tiles."""
        raise NotImplementedError


class Position:
    """Base of position modules: frozen dataclasses whose fields are their config schema.

    Override what applies: `embed` (added to the embeddings), `rotate` (queries and keys), `bias`
    (added to the logits). The defaults do nothing.
    """

    relative: ClassVar[bool] = True
    """Outputs do not change when every position grows by the same amount."""
    biased: ClassVar[bool] = False
    """`bias` is not None: only mechanisms that form logits can host it."""
    shared: ClassVar[bool] = False
    """One set of parameters serves all layers (and `embed`); otherwise each layer has its own."""
    whole: ClassVar[bool] = False
    """`row_bias` or `row_values` is not None: a query meets all its keys at once, so only
    mechanisms that attend in a single pass can host it."""

    def init(self, key: Array, dims: Dims) -> Any:
        """Learned parameters of one layer (a pytree, ``{}`` when there are none)."""
        return {}

    def embed(self, params: Any, x: Array, pos: Array) -> Array:
        """``x`` [B N width] with position information added; called once, before layer one, with
        the shared parameters (``{}`` where layers have their own)."""
        return x

    def rotate(self, params: Any, z: Array, pos: Array, side: str) -> Array:
        """``z`` [B N heads D] turned by its position; ``side`` is "query" or "key"."""
        return z

    def bias(self, params: Any, q: Array, q_pos: Array, k_pos: Array) -> Array | None:
        """Added to the scaled logits: broadcastable to [B H N M], f32, or None.

        ``q`` [B H N D] (rotated), ``q_pos`` [B N], ``k_pos`` [B M]: tiles of a longer sequence.
        """
        return None

    def row_bias(
        self, params: Any, z: Array, seen: Array, q: Array, q_pos: Array, k_pos: Array
    ) -> Array | None:
        """Added to the logits ``z`` [B H N M] of whole rows; [B H N M] f32, or None.

        ``seen`` [B 1 N M] tells which keys count; ``z`` is finite and otherwise meaningless where
        it is False. Keys stand in the order of their segments and positions. The rest as in `bias`.
        """
        return None

    def row_values(self, params: Any, probs: Array, q_pos: Array, k_pos: Array) -> Array | None:
        """Added to the output: [B N H E] f32 from the weights ``probs`` [B H N M] of whole rows, in
        any order of the keys, or None."""
        return None

    def validate(self, dims: Dims) -> None:
        """Raise `UserError` where the sizes make no sense for this module."""


class Normaliser:
    """Base of normalisers, which turn a row of logits into weights: frozen dataclasses whose fields
    are their config schema. The defaults are those of softmax.

    Three kinds: softmax of rescaled queries (`scale`), which every mechanism hosts; softmax of
    which each row keeps a `share`; and any other function of a row (`whole`). Only the first kind
    is ``separable``.
    """

    relative: ClassVar[bool] = True
    """Weights do not change when every position grows by the same amount."""
    separable: ClassVar[bool] = True
    """Rows over different keys can be merged by their log-sum-exp: weights = exp(z − lse)."""
    whole: ClassVar[bool] = False
    """`weights` needs the whole row at once."""

    def init(self, key: Array, dims: Dims) -> Any:
        """Learned parameters of one layer (a pytree, ``{}`` when there are none)."""
        return {}

    def scale(self, params: Any, pos: Array, causal: bool) -> Array | None:
        """What queries at ``pos`` [B N] are multiplied by: f32 [B N H] or [B N 1], or None."""
        return None

    def share(self, lse: Array) -> Array | None:
        """The sum of a row's weights, which are otherwise those of softmax, from the log-sum-exp
        of its logits [B H N]; None = 1."""
        return None

    def weights(self, params: Any, z: Array, seen: Array) -> Array:
        """The definition, on whole rows of logits: f32 [B H N M], 0 where a key is not seen.

        ``z`` [B H N M] f32 (of scaled queries), `MASK` where ``seen`` [B 1 N M] is False.
        """
        # Any shift gives the same result, so it has no gradient; that of a maximum is NaN when the
        # compiler rounds the logits differently where it looks for the maximum again.
        top = jax.lax.stop_gradient(jnp.max(z, -1, keepdims=True))
        weight = jnp.where(seen, jnp.exp(z - top), 0.0)
        total = jnp.sum(weight, -1, keepdims=True)
        return weight / jnp.where(total > 0, total, 1.0)

    def validate(self, dims: Dims, causal: bool) -> None:
        """Raise `UserError` where the sizes or the direction make no sense for this module."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rule:
    """How a query meets a key: the one place that scales, rotates, biases, masks and normalises.

        logits = cap(scale q kᵀ) + bias,  seen iff  same segment ∧ (not causal ∨ pos_k <= pos_q) ∧
        every pattern

    with cap(z) = c tanh(z / c) when ``soft_cap`` c > 0. The mechanism calls the rule; the model
    never rotates or masks. A pytree: ``params`` (of the position module) and ``normaliser_params``
    are traced, the rest is static. ``kernels`` is the arithmetic that is asked for, see
    `attnlab.engines.kernels`; it travels here so that nothing compiled for another is used.
    """

    params: Any = dataclasses.field(default_factory=dict)
    position: Position = dataclasses.field(
        default_factory=lambda: _NOWHERE, metadata={"static": True}
    )
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    scale: float | None = dataclasses.field(default=None, metadata={"static": True})
    soft_cap: float = dataclasses.field(default=0.0, metadata={"static": True})
    patterns: tuple[Pattern, ...] = dataclasses.field(default=(), metadata={"static": True})
    taps: tuple[tuple[str, Callable[[Array], Array]], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )
    normaliser: Normaliser = dataclasses.field(
        default_factory=lambda: _EXPONENTIAL, metadata={"static": True}
    )
    normaliser_params: Any = dataclasses.field(default_factory=dict)
    kernels: str = dataclasses.field(default="xla", metadata={"static": True})

    def restrict(self, pattern: Pattern) -> Rule:
        """The same rule, in which a key must also satisfy ``pattern``."""
        return dataclasses.replace(self, patterns=(*self.patterns, pattern))

    def tap(self, name: str, array: Array) -> Array:
        """``array`` as rewritten by the taps placed on ``name``: "logits" and "probs" [B H N M],
        "heads" [B N H E]. Identity by default."""
        for place, function in self.taps:
            if place == name:
                array = function(array)
        return array

    @property
    def observed(self) -> bool:
        """A tap wants the whole [B H N M] array, so only a dense form can serve it."""
        return any(place in ("logits", "probs") for place, _ in self.taps)

    @property
    def whole(self) -> bool:
        """A query must meet all its keys at once: its row is not a merger of parts."""
        return self.normaliser.whole or self.position.whole

    @property
    def separable(self) -> bool:
        """Attention over disjoint sets of keys can be merged by its log-sum-exp."""
        return self.normaliser.separable and not self.position.whole

    def rotate(self, z: Array, pos: Array, side: str) -> Array:
        """Queries or keys [B N heads D] as the position module turns them; queries also as the
        normaliser scales them."""
        z = self.position.rotate(self.params, z, pos, side)
        if side != "query":
            return z
        factor = self.normaliser.scale(self.normaliser_params, pos, self.causal)
        return z if factor is None else (z * factor[..., None]).astype(z.dtype)

    def weights(self, z: Array, seen: Array) -> Array:
        """Whole rows of logits as the normaliser weighs them; see `Normaliser.weights`."""
        return self.normaliser.weights(self.normaliser_params, z, seen)

    def bias(self, q: Array, q_pos: Array, k_pos: Array) -> Array | None:
        """The position module's addition to the logits; see `Position.bias`."""
        return self.position.bias(self.params, q, q_pos, k_pos)

    def allowed(self, queries: Queries, keys: Keys) -> Array:
        """Which keys each query may see: bool [B N M]."""
        return self.visible(queries.pos, queries.seg, keys.pos, keys.seg)

    def visible(self, q_pos: Array, q_seg: Array, k_pos: Array, k_seg: Array) -> Array:
        """`allowed` from positions and segments alone: [B N], [B N], [B M], [B M] -> [B N M]."""
        return self.sees(q_pos[:, :, None], q_seg[:, :, None], k_pos[:, None], k_seg[:, None])

    def sees(self, q_pos: Array, q_seg: Array, k_pos: Array, k_seg: Array) -> Array:
        """`visible`, elementwise: bool, from arrays that broadcast."""
        seen = (q_seg == k_seg) & (k_seg >= 0)
        if self.causal:
            seen &= k_pos <= q_pos
        for pattern in self.patterns:
            seen &= pattern.visible(q_pos, k_pos)
        return seen

    def product(self, q: Array, k: Array) -> Array:
        """Scaled, capped q kᵀ in f32, heads first: [B H N D], [B G M D] -> [B H N M]."""
        B, H, N, D = q.shape
        G, M = k.shape[1:3]
        scale = D**-0.5 if self.scale is None else self.scale
        z = scores(q.reshape(B, G, H // G * N, D), k).reshape(B, H, N, M) * scale
        return jnp.tanh(z / self.soft_cap) * self.soft_cap if self.soft_cap else z

    def biased(self, q: Array, k: Array, q_pos: Array, k_pos: Array) -> Array:
        """`product` plus the position bias, before any mask; arguments as for both."""
        z = self.product(q, k)
        bias = self.bias(q, q_pos, k_pos)
        return z if bias is None else z + bias

    def rows(self, q: Array, k: Array, seen: Array, q_pos: Array, k_pos: Array) -> Array:
        """`biased` plus what the position module adds to whole rows, before any mask.

        ``seen`` [B 1 N M]; keys are all there are, ordered if the position module is ``whole``.
        """
        z = self.biased(q, k, q_pos, k_pos)
        if not self.position.whole:
            return z
        bias = self.position.row_bias(self.params, z, seen, q, q_pos, k_pos)
        return z if bias is None else z + bias

    def logits(self, queries: Queries, keys: Keys) -> Array:
        """Rotate, product, bias, tap, mask: f32 [B H N M], `MASK` where a key is not seen."""
        queries, keys = queries.cleared(), keys.cleared()
        back = None
        if self.position.whole:
            keys, order = keys.ordered()
            back = jnp.argsort(order, -1)
        q = self.rotate(queries.q, queries.pos, "query").swapaxes(1, 2)
        k = self.rotate(keys.k, keys.pos, "key").swapaxes(1, 2)
        seen = self.allowed(queries, keys)[:, None]
        z = self.rows(q, k, seen, queries.pos, keys.pos)
        log_count = keys.log_count
        z = z if log_count is None else z + log_count[:, None, None]
        if back is not None:
            z, seen = (jnp.take_along_axis(a, back[:, None, None], -1) for a in (z, seen))
        return jnp.where(seen, self.tap("logits", z), MASK)


@dataclass(frozen=True)
class Nowhere(Position):
    """No position information; the default of a bare `Rule`."""


_NOWHERE = Nowhere()


@dataclass(frozen=True)
class Exponential(Normaliser):
    """Softmax; the default of a bare `Rule`."""


_EXPONENTIAL = Exponential()


class Mechanism:
    """Base of attention mechanisms: frozen dataclasses whose fields are their config schema.

    Equal values hash equal, so jit does not retrace. A subclass gives `__call__`, `reference`,
    `cost` and `flops`, and whatever else applies.
    """

    cost: ClassVar[Cost]
    carries: ClassVar[bool] = False
    """Training hands the state on from batch to batch (``task.packing=stream``): a memory longer
    than a batch's rows. The state must then tell documents apart by the segments it keeps; its
    arrays are finite and have the rows of the batch as first axis (see `attnlab.carry`)."""
    recalls: ClassVar[bool] = False
    """Decoding needs the whole past besides the state: a call with a state is handed the `Keys`
    buffer, new tokens included, as if there were none."""
    isotropic: ClassVar[bool] = True
    """Queries and keys turned alike give the same outputs. False for feature maps, which act on
    coordinates: with a position module that rotates, outputs then follow positions themselves."""

    spreads: ClassVar[bool] = False
    """Its engines keep the tokens of a sequence on the devices of the mesh axis ``seq`` in training
    (see `attnlab.engines.sharded`); otherwise every device gathers all of them."""
    marked: ClassVar[bool] = False
    """The model hands over keys with a ``unit``: 4 b + e for a token that begins a unit of level b
    and ends one of level e; 0 none, 1 a word, 2 a sentence, 3 a paragraph, and all levels below."""

    def source(self, x: Array, embedded: Array, pos: Array) -> Array | None:
        """What the model projects queries and keys of a layer from, [B N width]: ``x``, the block's
        input, unless a mechanism says otherwise. ``embedded`` [B N width] is the same block's input
        if no layer came before it, and ``pos`` [B N]. None: nothing is projected, and queries and
        keys are 0. Values are always projected from ``x``. Who calls a mechanism without the model
        sees to this himself."""
        return x

    @property
    def relative(self) -> bool:
        """With a relative position module, outputs do not change when every position grows by the
        same amount. False for what counts from the start of a document: sinks, blocks, levels."""
        return True

    def init(self, key: Array, dims: Dims) -> Any:
        """Parameters of one layer (a pytree, ``{}`` when there are none).

        What stands under the key ``"statistics"`` is measured, not learned (moving averages, random
        features): no gradient reaches it, and a training step replaces it by what the call returns
        as ``aux["statistics"]``.
        """
        return {}

    def initial_state(self, dims: Dims, batch: int, dtype: Any = jnp.float32) -> Any:
        """The state before the first token. ``()`` means that decoding needs the whole past, which
        the model then keeps as a `Keys` buffer; anything else means that the mechanism is handed
        only the new tokens and remembers what it needs."""
        return ()

    def carried(self, state: Any) -> Any:
        """What of the state training hands on, if it ``carries``; a call that is given this returns
        as much."""
        return state

    def __call__(
        self,
        params: Any,
        queries: Queries,
        keys: Keys,
        rule: Rule,
        state: Any = (),
        *,
        x: Array | None = None,
        key: Array | None = None,
    ) -> Result:
        """Attend. The same call serves training, segment recurrence and decoding.

        ``state=()`` means no past. ``x`` [B N width] is the block's input, for gates and routers;
        ``key`` a PRNG key for mechanisms that draw. In a call with as many keys as queries both
        are the same tokens, in order.
        """
        raise NotImplementedError

    def reference(
        self,
        params: Any,
        queries: Queries,
        keys: Keys,
        rule: Rule,
        state: Any = (),
        *,
        x: Array | None = None,
        key: Array | None = None,
    ) -> Result:
        """The equations, literally, with dense arrays: slow, obvious, the oracle of the tests."""
        raise NotImplementedError

    def limit(self, length: int) -> Mechanism | None:
        """This mechanism with the fields at which it *is* softmax attention for sequences of
        ``length`` tokens, or None if there are none."""
        return None

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        """Floating-point operations of the outputs of one forward pass over one sequence.

        Those of matrix products, a multiply-add for two; what is done entry by entry (exp, gates,
        means), projections, losses and statistics are not counted, nor are pairs that the mask
        hides. Blocks of the mechanism's own (chunks of a recurrence, buckets, windows of a search)
        count whole, as they are computed; tiles, which an engine chooses by shape, do not.
        """
        raise NotImplementedError

    @classmethod
    def examples(cls) -> tuple[Mechanism, ...]:
        """Small instances that together visit every branch at some 32 tokens; the test battery
        runs on them."""
        return (cls(),)


mechanisms: Registry[Mechanism] = Registry("attnlab.mechanisms", Mechanism)
positions: Registry[Position] = Registry("attnlab.positions", Position)
normalisers: Registry[Normaliser] = Registry("attnlab.normalisers", Normaliser)
