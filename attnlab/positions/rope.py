"""Rotary position embedding."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Position
from attnlab.errors import UserError
from attnlab.registry import register


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
        half = z.shape[-1] // 2
        theta = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        phase = pos[..., None, None].astype(jnp.float32) * theta
        # The barrier keeps XLA from recomputing both for every head and both halves.
        cos, sin = jax.lax.optimization_barrier((jnp.cos(phase), jnp.sin(phase)))
        a, b = jnp.split(z.astype(jnp.float32), 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(z.dtype)

    def validate(self, dims):
        if dims.key_dim % 2:
            raise UserError(
                f"position rope: head size {dims.key_dim} is odd; "
                f"use {dims.key_dim - 1} or {dims.key_dim + 1}"
            )
