"""Rotary position embedding."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Dims, Position
from attnlab.errors import UserError
from attnlab.registry import register


def frequencies(base: float | Array, size: int) -> Array:
    """θ_t = base^(−2t / size) for t < size / 2, f32."""
    half = size // 2
    return base ** (-jnp.arange(half, dtype=jnp.float32) / half)


def turn(z: Array, pos: Array, theta: Array) -> Array:
    """``z`` [B N heads D] with halves (a, b) turned by φ_t = pos θ_t, in the dtype of z:
    (a cos φ − b sin φ, b cos φ + a sin φ); phases and products in f32."""
    phase = pos[..., None, None].astype(jnp.float32) * theta
    # The barrier keeps XLA from recomputing both for every head and both halves.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(phase), jnp.sin(phase)))
    a, b = jnp.split(z.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(z.dtype)


def refuse_odd(name: str, dims: Dims) -> None:
    """Raises `UserError` for a head size that has no halves."""
    if dims.key_dim % 2:
        raise UserError(
            f"position {name}: head size {dims.key_dim} is odd; "
            f"use {dims.key_dim - 1} or {dims.key_dim + 1}"
        )


def refuse_shrinking(name: str, factor: float) -> None:
    """Raises `UserError` for a factor that would make the context shorter."""
    if not factor >= 1:
        raise UserError(f"position {name}: factor={factor:g} must be at least 1")


@register
@dataclass(frozen=True)
class Rope(Position):
    """Queries and keys turned by their position, so that q·k depends on the distance only.

    With halves z = (a, b) and φ_t = pos base^(−2t / D):
        z ← (a cos φ − b sin φ, b cos φ + a sin φ).
    Shapes: z [B N heads D], pos [B N]; phases in f32, result in the dtype of z. Cost O(N D).
    Raises `UserError` for an odd head size. Source: Su et al., arXiv 2104.09864 (the half-split
    order, a fixed permutation of the interleaved one).
    """

    base: float = 10_000.0

    def rotate(self, params, z, pos, side):
        return turn(z, pos, frequencies(self.base, z.shape[-1]))

    def validate(self, dims):
        refuse_odd("rope", dims)
