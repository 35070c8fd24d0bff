"""Functional interpolation for relative positions."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Position
from attnlab.errors import UserError
from attnlab.positions.lookup import distances, look_up
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Fire(Position):
    """A small learned function of the distance, relative to the length so far.

    logits + f(ψ(Δ) / ψ(max(L, i, j))), ψ(x) = ln(1 + |c| x), Δ = |i − j|, L = |m| ``original``, for
    a query at position i and a key at j; f: 1 -> ``hidden`` -> H with a ReLU between and no last
    bias, which a softmax would cancel. (Under a causal mask j <= i, so that the norm is the
    published ψ(max(L, i)).) Its argument stays in [0, 1], which is why it extends beyond the
    training length; from L on it is not shift invariant. Parameters: ``c`` (0.1 at first), ``m``
    (1), ``slope`` and ``offset`` [hidden], ``out`` [hidden H]; every layer has its own.
    Shapes: pos [B N], [B M] -> [B H N M] f32. f is linear between the ``hidden`` places where a
    ReLU turns on or off, so each pair of tokens looks up the line that it is on: O(ln hidden + H)
    per pair and O(hidden H) in the backward pass. Raises `UserError` for hidden < 1 or original
    < 1. Source: Li et al., arXiv 2310.04418.
    """

    hidden: int = 32
    original: int = 512  # L at first, in tokens

    biased = True
    relative = False

    def __post_init__(self):
        if self.hidden < 1 or self.original < 1:
            raise UserError(
                f"position fire: hidden={self.hidden}, original={self.original}; "
                "both must be at least 1"
            )

    def init(self, key, dims):
        first, second, third = jax.random.split(key, 3)
        bound = self.hidden**-0.5
        return {
            "c": jnp.asarray(0.1),
            "m": jnp.asarray(1.0),
            "slope": jax.random.uniform(first, (self.hidden,), minval=-1),
            "offset": jax.random.uniform(second, (self.hidden,), minval=-1),
            "out": jax.random.uniform(
                third, (self.hidden, dims.heads), minval=-bound, maxval=bound
            ),
        }

    def bias(self, params, q, q_pos, k_pos):
        def psi(x):
            return jnp.log(1.0 + jnp.abs(params["c"]) * x)

        far = psi(jnp.abs(distances(q_pos, k_pos)).astype(jnp.float32))
        longest = jnp.abs(params["m"]) * self.original
        norm_q = psi(jnp.maximum(q_pos, longest))[:, :, None]
        norm_k = psi(jnp.maximum(k_pos, longest))[:, None, :]
        x = far / jnp.maximum(jnp.maximum(norm_q, norm_k), 1e-6)
        return self.curve(params, x)

    def curve(self, params, x):
        """f at ``x`` [B N M] in [0, 1]: f32 [B H N M]."""
        slope, offset, out = params["slope"], params["offset"], params["out"]
        kinks = jax.lax.stop_gradient(jnp.where(slope == 0, -1.0, -offset / slope))
        kinks = jnp.sort(jnp.clip(kinks, -1.0, 2.0))  # f is continuous: no gradient through them
        edges = jnp.pad(kinks, 1, constant_values=(-2.0, 3.0))
        middle = (edges[1:] + edges[:-1]) / 2
        active = (middle[:, None] * slope + offset > 0).astype(jnp.float32)
        lines = jnp.concatenate([(active * slope) @ out, (active * offset) @ out], -1)
        piece = jnp.searchsorted(kinks, x).astype(jnp.int32)
        rise, height = jnp.split(look_up(lines.T[None, :, None], piece), 2, 1)
        return rise * x[:, None] + height
