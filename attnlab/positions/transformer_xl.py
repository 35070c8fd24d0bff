"""Relative positions of Transformer-XL."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Position
from attnlab.errors import UserError
from attnlab.positions.rope import frequencies
from attnlab.registry import register


@register
@dataclass(frozen=True)
class TransformerXl(Position):
    """Sinusoids of the distance, projected to meet the query; learned biases beside the query.

    logits = ((q + u)·k + (q + v)·W R_Δ) / √D, R_Δ = [sin Δθ, cos Δθ], θ_t = 10000^(−2t / width),
    Δ = pos_q − pos_k of either sign. Parameters: ``u``, ``v`` [H D], ``w`` [width H D]; every layer
    has its own. With the sines of a difference written out, the second term is one matmul of
    queries and keys that hold [cos jθ, sin jθ]; no array of distances is made.
    Shapes: q [B H N D], pos [B N], [B M] -> [B H N M] f32. Cost: ``width`` multiply-adds per logit.
    Raises `UserError` for an odd width. Source: Dai et al., arXiv 1901.02860.
    """

    biased = True

    def init(self, key, dims):
        zeros = jnp.zeros((dims.heads, dims.key_dim))
        shape = (dims.width, dims.heads, dims.key_dim)
        w = dims.width**-0.5 * jax.random.normal(key, shape)
        return {"u": zeros, "v": zeros, "w": w}

    def rotate(self, params, z, pos, side):
        if side == "key":
            return z
        return (z.astype(jnp.float32) + params["u"]).astype(z.dtype)

    def bias(self, params, q, q_pos, k_pos):
        u, v, w = (params[name] for name in "uvw")
        asked = q.astype(jnp.float32) + (v - u)[:, None]  # q came with u added, by `rotate`
        for_sin, for_cos = jnp.split(jnp.einsum("bhnd,whd->bhnw", asked, w), 2, -1)
        theta = frequencies(10_000.0, w.shape[0])
        origin = q_pos[:, :1]  # near enough that phases stay small, and the same after any shift

        def waves(pos):
            phase = (pos - origin).astype(jnp.float32)[..., None] * theta
            return jnp.sin(phase)[:, None], jnp.cos(phase)[:, None]

        (sin_i, cos_i), (sin_j, cos_j) = waves(q_pos), waves(k_pos)
        left = [for_sin * sin_i + for_cos * cos_i, for_cos * sin_i - for_sin * cos_i]
        right = jnp.concatenate([cos_j, sin_j], -1)[:, 0]
        product = jnp.einsum("bhnw,bmw->bhnm", jnp.concatenate(left, -1), right)
        return product * q.shape[-1] ** -0.5

    def validate(self, dims):
        if dims.width % 2:
            raise UserError(
                f"position transformer_xl: width {dims.width} is odd; use {dims.width + 1}"
            )
