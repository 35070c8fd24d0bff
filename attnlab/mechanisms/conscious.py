"""A bottleneck of few elements: all heads of a query read the same few keys."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax.lax import stop_gradient

from attnlab.core import MASK, Array, Cost, Dims, Mechanism, Normaliser, Result, count_pairs
from attnlab.engines import blockwise, dense, ring
from attnlab.engines.ranks import largest
from attnlab.errors import UserError
from attnlab.registry import register

Gradient = Literal["masked", "straight_through"]


@register
@dataclass(frozen=True)
class Conscious(Mechanism):
    """Softmax attention over m keys, which all heads of a query share: the state it is aware of.

        T_i = the m = ``elements`` visible keys of the largest Σ_h z_ijh,  z = q·k / √D
        out_ih = Σ_(j in T_i) softmax over T_i of {z_ijh} v_j

    Of equal sums the key in the earlier slot comes first. What a query reads depends on nothing but
    its m elements, m = 1 is hard attention. ``gradient`` says how the logits learn: "masked", those
    of the m elements alone, and none at all with m = 1; "straight_through", all, as if the weights
    were dense: p + (p' − stop(p')) with p' = softmax over all visible keys and p without gradient.
    Values learn from p in both. (Normaliser ``top_k`` lets every head choose for itself.) Which
    elements were read, and not only what they hold, is told by a position that adds to the values:
    ``position=shaw``. One of many forms of a prior that prescribes none; no noise in the choice.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N M (D + E + ln M)) time, hidden pairs included, and O(N + M) memory: queries meet whole
    rows of keys, a tile at a time; with m >= M that of softmax. Decoding keeps all keys and values.
    Raises `UserError` for elements < 1 and an unknown gradient.
    Source: after Bengio, "The Consciousness Prior", arXiv 1709.08568.
    """

    elements: int = 4
    gradient: Gradient = "masked"

    cost = Cost(time=2, memory=1, state=1)

    def __post_init__(self):
        if self.elements < 1 or self.gradient not in get_args(Gradient):
            raise UserError(
                f"conscious: elements={self.elements}, gradient={self.gradient!r}; use "
                f"elements >= 1 and one of {', '.join(get_args(Gradient))}"
            )

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        attend = ring.attend  # of all keys: softmax attention
        if self.elements < keys.pos.shape[1]:
            attend = blockwise.attend  # with all heads, which choose together
            chosen = Selection(rule.normaliser, self.elements, self.gradient)
            rule = dataclasses.replace(rule, normaliser=chosen)
        out, lse = attend(queries, keys, rule)
        return Result(out, state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        seen, z = rule.allowed(queries, keys)[:, None], rule.logits(queries, keys)
        total = jnp.mean(stop_gradient(z), 1, keepdims=True)  # [B 1 N M]
        ahead, slot = total[..., None, :], jnp.arange(z.shape[-1])
        ahead = (ahead > total[..., None]) | (
            (ahead == total[..., None]) & (slot < slot[:, None])
        )  # [B 1 N M M]: is the last one chosen before the one before it?
        kept = seen & (jnp.sum(ahead, -1) < self.elements)
        v, pos = keys.cleared().v.astype(jnp.float32), (queries.pos, keys.pos)
        probs = rule.tap("probs", rule.weights(jnp.where(kept, z, MASK), kept))
        if self.gradient == "masked":
            out = dense.mix(rule, probs, v, *pos)
        else:
            every = rule.tap("probs", rule.weights(z, seen))
            learns = dense.mix(stop_gradient(rule), every, stop_gradient(v), *pos)
            out = dense.mix(rule, stop_gradient(probs), v, *pos) + learns - stop_gradient(learns)
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, state, {"lse": dense.log_sum(z, seen), "probs": probs})

    def limit(self, length: int):
        return dataclasses.replace(self, elements=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        whole = self.elements >= length
        pairs = count_pairs(length, None, causal) if whole else length**2
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs

    @classmethod
    def examples(cls):
        return (cls(elements=5), cls(elements=4, gradient="straight_through"))


@dataclass(frozen=True)
class Selection(Normaliser):
    """The normaliser ``origin`` over the ``elements`` keys of the largest logits, by their mean
    over the heads; see `Conscious`."""

    origin: Normaliser
    elements: int
    gradient: Gradient

    separable = False
    whole = True

    def scale(self, params: Any, pos: Array, causal: bool):
        return self.origin.scale(params, pos, causal)

    def weights(self, params: Any, z: Array, seen: Array) -> Array:
        kept = seen & largest(jnp.mean(stop_gradient(z), 1, keepdims=True), self.elements)
        probs = self.origin.weights(params, jnp.where(kept, z, MASK), kept)
        if self.gradient == "masked":
            return probs
        every = self.origin.weights(params, z, seen)
        return stop_gradient(probs) + (every - stop_gradient(every))
