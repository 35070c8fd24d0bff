"""Capsule routing: heads vote for the outputs, and votes that agree count more."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Mechanism, Result, Rule, count_pairs
from attnlab.engines import blockwise, dense, segments
from attnlab.errors import UserError
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Capsule(Mechanism):
    """Exact attention whose heads vote for the outputs, routed by agreement within each token.

    Head i with output A_i sends the vote u_ij = A_i W_ij to output capsule j (as many as heads).
    From b = 0, ``iterations`` times:
        c_ij = softmax_j b,  s_j = Σ_i c_ij u_ij,  y_j = squash(s_j),  b_ij += u_ij·y_j
    and out_j = y_j of the last, squash(s) = |s|² / (1 + |s|²) s / |s|. Routing is per token and so
    causal. No gradient flows through b: the couplings of the last iteration are constants to it.
    Parameters: W [H H E E] ~ N(0, 1 / E).
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E], |out_j| < 1.
    Cost: that of softmax attention, O(N H² E²) for the votes and O(N H² E) memory; decoding keeps
    all keys and values. Raises `UserError` for iterations < 1.
    Source: Sabour et al., arXiv 1710.09829.
    """

    iterations: int = 3

    cost = Cost(time=2, memory=1, state=1)

    def __post_init__(self):
        if self.iterations < 1:
            raise UserError(f"capsule: iterations={self.iterations}; use iterations >= 1")

    def init(self, key, dims):
        H, E = dims.heads, dims.value_dim
        return {"votes": E**-0.5 * jax.random.normal(key, (H, H, E, E))}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, lse = blockwise.attend(queries, keys, segments.part_of(rule))
        return Result(self._routed(params, out, rule), state, {"lse": lse})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, lse, probs = dense.attend(queries, keys, segments.part_of(rule))
        return Result(self._routed(params, out, rule), state, {"lse": lse, "probs": probs})

    def _routed(self, params, out: Array, rule: Rule) -> Array:
        votes = jnp.einsum("bnie,ijef->bnijf", out.astype(jnp.float32), params["votes"])
        return rule.tap("heads", route(votes, self.iterations).astype(out.dtype))

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        H, E = dims.heads, dims.value_dim
        pairs = H * (dims.key_dim + E) * count_pairs(length, None, causal)
        return 2.0 * (pairs + length * H * H * E * (E + 2 * self.iterations - 1))

    @classmethod
    def examples(cls):
        return (cls(),)


def route(votes: Array, iterations: int) -> Array:
    """The outputs that ``votes`` [.. I J E] agree on: [.. J E], f32."""
    constant = jax.lax.stop_gradient(votes)
    b = jnp.zeros(votes.shape[:-1], jnp.float32)
    for _ in range(iterations - 1):
        b += jnp.einsum("...ije,...je->...ij", constant, squash(_combine(b, constant)))
    return squash(_combine(b, votes))


def squash(s: Array) -> Array:
    """``s`` [.. E] with its length |s| made |s|² / (1 + |s|²); 0 stays 0, with gradient 0."""
    square = jnp.sum(s * s, -1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return jnp.where(square > 0, length / (1.0 + square), 0.0) * s


def _combine(b: Array, votes: Array) -> Array:
    return jnp.einsum("...ij,...ije->...je", jax.nn.softmax(b, -1), votes)
