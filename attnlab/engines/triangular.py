"""Systems (I + A) U = R with A below the diagonal, of which a memory that corrects itself solves
one for every chunk."""

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array


def solve(A: Array, rhs: Array, transposed: bool = False, alone: bool = True) -> Array:
    """(I + A)⁻¹ R, or (I + A)⁻ᵀ R: f32 [... C C], [... C E] -> [... C E].

    What of ``A`` does not lie below its diagonal is not read. Cost: O(C² E) on one device. Where a
    process has several CPU devices, or a program may solve two systems at once (not ``alone``),
    O(C² (C + E)) on a CPU: jax solves there inside a thread of the pool that all share and waits
    for other threads of it, so that solves which come together wait for ever.
    """
    if jax.default_backend() == "cpu" and (jax.local_device_count() > 1 or not alone):
        return multiplied(A, rhs, transposed)
    return substituted(A, rhs, transposed)


def substituted(A: Array, rhs: Array, transposed: bool = False) -> Array:
    """`solve` by substitution, as LAPACK and its like have it."""
    return lax.linalg.triangular_solve(
        A, rhs, left_side=True, lower=True, unit_diagonal=True, transpose_a=transposed
    )


def multiplied(A: Array, rhs: Array, transposed: bool = False) -> Array:
    """`solve` by the inverse, in products alone."""
    inverse = inverted(A)
    return _product(inverse.swapaxes(-1, -2) if transposed else inverse, rhs)


def inverted(A: Array) -> Array:
    """(I + A)⁻¹ [... C C], from the inverses of blocks along the diagonal, of twice the size at
    every step: that of [[X, 0], [B, Y]] is [[X⁻¹, 0], [−Y⁻¹ B X⁻¹, Y⁻¹]]."""
    *lead, C, _ = A.shape
    full = 1 << (C - 1).bit_length()
    A = jnp.pad(A, [(0, 0)] * len(lead) + [(0, full - C)] * 2)
    inverse, size = jnp.ones((*lead, full, 1, 1), A.dtype), 1
    while size < full:
        pairs = full // (2 * size)
        blocks = A.reshape(*lead, pairs, 2, size, pairs, 2, size)
        each = jnp.arange(pairs)
        below = jnp.moveaxis(blocks, (-6, -3), (0, 1))[each, each]  # [pairs ... 2 size 2 size]
        below = jnp.moveaxis(below[..., 1, :, 0, :], 0, -3)
        first, second = jnp.moveaxis(inverse.reshape(*lead, pairs, 2, size, size), -3, 0)
        below = -_product(second, _product(below, first))
        above = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        inverse = jnp.concatenate([above, jnp.concatenate([below, second], -1)], -2)
        size *= 2
    return inverse.reshape(*lead, full, full)[..., :C, :C]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
