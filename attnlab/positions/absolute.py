"""Sinusoidal absolute positions, added to the embeddings."""

from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.core import Position
from attnlab.errors import UserError
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Absolute(Position):
    """Sinusoids added to the embeddings: x + [sin(pos θ), cos(pos θ)], θ_t = base^(−2t / width).

    Shapes: x [B N width], pos [B N]. Phases are computed in f32. Any length, no parameters. Raises
    `UserError` for an odd width. Source: Vaswani et al., arXiv 1706.03762.
    """

    base: float = 10_000.0

    relative = False

    def embed(self, params, x, pos):
        half = x.shape[-1] // 2
        theta = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        phase = pos[..., None].astype(jnp.float32) * theta
        return x + jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1).astype(x.dtype)

    def validate(self, dims):
        if dims.width % 2:
            raise UserError(f"position absolute: width {dims.width} is odd; use {dims.width + 1}")
