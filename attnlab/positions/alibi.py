"""Attention with linear biases."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from attnlab.core import Position
from attnlab.registry import register


def slopes(heads: int) -> np.ndarray:
    """m_h = 2^(−8 (h+1) / H) for a power of two; else those of the power below, then every other
    slope of the power above. f32 [H]."""
    below = 1 << (heads.bit_length() - 1)
    first = 2.0 ** (-8.0 / below * np.arange(1, below + 1))
    rest = 2.0 ** (-4.0 / below * np.arange(1, 2 * below + 1, 2))[: heads - below]
    return np.concatenate([first, rest]).astype(np.float32)


@register
@dataclass(frozen=True)
class Alibi(Position):
    """A penalty that grows with distance: logits − m_h |pos_q − pos_k|, one slope m_h per head.

    Shapes: q [B H N D], pos [B N], [B M] -> [B H N M] f32. No parameters; extends beyond the
    training length. Source: Press et al., arXiv 2108.12409.
    """

    biased = True

    def bias(self, params, q, q_pos, k_pos):
        distance = jnp.abs(q_pos[:, None, :, None] - k_pos[:, None, None, :])
        return -slopes(q.shape[1])[:, None, None] * distance.astype(jnp.float32)
