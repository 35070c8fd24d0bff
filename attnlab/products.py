"""The matrix products of attention and of a layer, and their gradients, in the order that is fast.

XLA on CPU multiplies pᵀ x, with p [n m] wide and x [n E] narrow, at a third to a half of the rate
of (xᵀ p)ᵀ: in tiles of 512 with E = 64 at 34 against 100 GFLOP/s, in tiles of 256 at 52 against 87.
Two of the five products of a backward pass are such. Best is a product that sums along the last
axis of its left side, a copy of the narrower of the two: of 4,096 rows, p 128 and x 256 wide, 196
GFLOP/s against 131; where p is wide, as fast as without the copy.

The gradient of a layer's kernel [a b] as jax derives it is (dyᵀ x)ᵀ, for which XLA copies the wide
dy transposed, with all that makes it: the SwiGLU of 8,192 tokens, 256 by 704, takes 1.5 times as
long with its gradients as with xᵀ dy.
"""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
LARGE = 256
"""Rows from which on that outweighs the copy it takes."""


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def scores(q: Array, k: Array) -> Array:
    """q kᵀ: [... n D], [... m D] -> f32 [... n m]."""
    return _product("...nd,...md->...nm", q, k)


@jax.custom_vjp
def mixed(p: Array, v: Array) -> Array:
    """p v: [... n m], [... m E] -> f32 [... n E]."""
    return _product("...nm,...me->...ne", p, v)


@jax.custom_vjp
def collected(p: Array, x: Array) -> Array:
    """pᵀ x: [... n m], [... n E] -> f32 [... m E]."""
    if p.shape[-2] < LARGE:
        return _product("...nm,...ne->...me", p, x)
    if p.shape[-1] < x.shape[-1]:
        return mixed(_turned(p), x)
    return _turned(mixed(_turned(x), p))


def _turned(z: Array) -> Array:
    """zᵀ, of which XLA without the barrier would make none."""
    return lax.optimization_barrier(z.swapaxes(-1, -2))


@jax.custom_vjp
def projected(x: Array, kernel: Array) -> Array:
    """x W: [... a], [a b] -> [... b], in the dtype of the two."""
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _projected_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    dx = lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())))
    if jax.sharding.get_abstract_mesh().shape.get("seq", 1) > 1:
        # Rows and tokens made one axis could not stay split along both.
        both = tuple(range(x.ndim - 1))
        return dx, lax.dot_general(x, dy, ((both, both), ((), ())))
    # Without the barrier XLA would compute x and dy anew, transposed.
    x, dy = lax.optimization_barrier([z.reshape(-1, z.shape[-1]) for z in (x, dy)])
    return dx, lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


def _scores_backward(kept: tuple[Array, Array], dz: Array) -> tuple[Array, Array]:
    q, k = kept
    dz = dz.astype(k.dtype)
    return mixed(dz, k).astype(q.dtype), collected(dz, q).astype(k.dtype)


def _mixed_backward(kept: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    p, v = kept
    d_out = d_out.astype(v.dtype)
    return scores(d_out, v).astype(p.dtype), collected(p, d_out).astype(v.dtype)


def _collected_backward(kept: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    p, x = kept
    d_out = d_out.astype(x.dtype)
    return scores(x, d_out).astype(p.dtype), mixed(p, d_out).astype(x.dtype)


scores.defvjp(lambda q, k: (scores(q, k), (q, k)), _scores_backward)
mixed.defvjp(lambda p, v: (mixed(p, v), (p, v)), _mixed_backward)
collected.defvjp(lambda p, x: (collected(p, x), (p, x)), _collected_backward)
projected.defvjp(lambda x, kernel: (projected(x, kernel), (x, kernel)), _projected_backward)
