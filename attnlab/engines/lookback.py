"""Convolutions over rows, one row of cells for each token, that look back and never ahead.

    out[i, t] = Σ_(a, b < 3) kernel[a, b] · z[i − 2 a, t + 2 b − 2]

over the rows of the tokens at positions i, i − 2 and i − 4 of the same document and the cells
t − 2, t and t + 2 of each, 0 where there is none: 3 x 3 taps, dilated by 2.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp

from attnlab.core import Array

TAPS, STEP = 3, 2
REACH = (TAPS - 1) * STEP
"""How many tokens it looks back."""


class Past(NamedTuple):
    """The rows before a call: ``z`` [B 4 T C] f32 of the last slots, with their ``pos`` and ``seg``
    [B 4] int32 (``seg`` < 0: none)."""

    z: Array
    pos: Array
    seg: Array


def initial_past(batch: int, cells: int, channels: int) -> Past:
    """No rows."""
    pos = jnp.zeros((batch, REACH), jnp.int32)
    return Past(jnp.zeros((batch, REACH, cells, channels)), pos, pos - 1)


def convolve(kernel: Array, z: Array, pos: Array, seg: Array, past: Past) -> tuple[Array, Past]:
    """``kernel`` [3 3 C C'] over the rows ``z`` [B N T C] of tokens at ``pos``, ``seg`` [B N] that
    follow ``past``: [B N T C'], and the last rows. Tokens of a document lie side by side. Cost:
    O(N T C C') time, O(N T (C + C')) memory."""
    z, N = jnp.concatenate([past.z, z], 1), pos.shape[1]
    whole_pos, whole_seg = (jnp.concatenate(y, 1) for y in ((past.pos, pos), (past.seg, seg)))

    def back(steps: int) -> Array:
        here = slice(REACH - steps, REACH - steps + N)
        same = (whole_seg[:, here] == seg) & (whole_pos[:, here] == pos - steps) & (seg >= 0)
        return jnp.where(same[..., None, None], z[:, here], 0)

    return _sum(kernel, back), Past(z[:, -REACH:], whole_pos[:, -REACH:], whole_seg[:, -REACH:])


def convolve_densely(kernel: Array, z: Array, pos: Array, seg: Array) -> Array:
    """`convolve` without a past, every row looked up among all: O(N²) time and memory."""

    def back(steps: int) -> Array:
        same = (pos[:, :, None] - steps == pos[:, None]) & (seg[:, :, None] == seg[:, None])
        same &= (seg >= 0)[:, None]
        return jnp.einsum("bnm,bmtc->bntc", same.astype(z.dtype), z)

    return _sum(kernel, back)


def count_flops(length: int, cells: int, channels: int) -> float:
    """Operations of `convolve` from as many channels to as many."""
    return 2.0 * length * cells * (TAPS * channels) ** 2


def _sum(kernel: Array, back: Callable[[int], Array]) -> Array:
    """The sum over taps, ``back(n)`` being the rows n tokens before."""

    def tap(a: int, b: int) -> Array:
        row = back(STEP * a)
        near = jnp.pad(row, [(0, 0), (0, 0), (STEP, STEP), (0, 0)])
        return near[:, :, STEP * b : STEP * b + row.shape[2]] @ kernel[a, b]

    return reduce(jnp.add, (tap(a, b) for a in range(TAPS) for b in range(TAPS)))
