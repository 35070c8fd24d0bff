"""What a kernel does with one tile of queries and one of keys: the equations of `blockwise`.

Functions of values, the same for every device; a device's own module says which tiles meet, where
they lie, and where running sums are kept. One head: q [n D], k [m D], v [m E]. What is one number a
token, `Tokens` too, comes as a column or a row that broadcasts against a tile of logits: [n 1] and
[1 m], or [1 n] and [m 1] in `pull_keys`. Sums are f32 whatever the tiles are.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Rule
from attnlab.engines.tiling import Tokens


class Running(NamedTuple):
    """The online softmax of a tile of queries: ``top``, ``total`` [n 1] and ``out`` [n E], f32."""

    top: Array
    total: Array
    out: Array


class Asked(NamedTuple):
    """What the backward pass knows of a tile of queries: ``q`` [n D], ``d_out`` [n E], ``lse``,
    ``delta`` = rowsum(d_out ∘ out) − d_lse, and its tokens."""

    q: Array
    d_out: Array
    lse: Array
    delta: Array
    tokens: Tokens


class Answered(NamedTuple):
    """A tile of keys: ``k`` [m D], ``v`` [m E] and its tokens."""

    k: Array
    v: Array
    tokens: Tokens


def begin(rows: int, size: int) -> Running:
    """Before the first key. Above `MASK`, so that what is masked weighs exp(-large) = 0."""
    start = jnp.full((rows, 1), MASK / 2, jnp.float32)
    return Running(start, start * 0, jnp.zeros((rows, size), jnp.float32))


def fold(rule: Rule, running: Running, q: Array, asking: Tokens, keys: Answered) -> Running:
    """One more tile of keys."""
    z, _ = _logits(rule, q, asking, keys, across=False)
    top = jnp.maximum(running.top, jnp.max(z, 1, keepdims=True))
    shrink = jnp.exp(running.top - top)
    weight = jnp.exp(z - top)
    part = _times(weight.astype(keys.v.dtype), keys.v)
    total = running.total * shrink + jnp.sum(weight, 1, keepdims=True)
    return Running(top, total, running.out * shrink + part)


def end(running: Running) -> tuple[Array, Array]:
    """``out`` [n E] and ``lse`` [n 1], f32."""
    seen = running.total > 0
    safe = jnp.where(seen, running.total, 1.0)
    lse = jnp.where(seen, running.top + jnp.log(safe), MASK)
    return running.out / safe, lse


def pull_queries(rule: Rule, asked: Asked, keys: Answered) -> Array:
    """What a tile of keys adds to dq [n D]: dz k, f32."""
    z, slope = _logits(rule, asked.q, asked.tokens, keys, across=False)
    p = jnp.exp(z - asked.lse)
    dz = p * (_turned(asked.d_out, keys.v) - asked.delta) * slope
    return _times(dz.astype(keys.k.dtype), keys.k)


def pull_keys(rule: Rule, asked: Asked, keys: Answered) -> tuple[Array, Array]:
    """What a tile of queries adds to dk [m D] and dv [m E]: dzᵀ q and pᵀ d_out, f32.

    Keys are the rows throughout, so that neither product turns a tile of weights.
    """
    z, slope = _logits(rule, asked.q, asked.tokens, keys, across=True)
    p = jnp.exp(z - asked.lse)
    dv = _times(p.astype(asked.d_out.dtype), asked.d_out)
    dz = p * (_turned(keys.v, asked.d_out) - asked.delta) * slope
    return _times(dz.astype(asked.q.dtype), asked.q), dv


def _logits(rule: Rule, q: Array, asking: Tokens, keys: Answered, across: bool):
    """Masked logits and what their cotangent is multiplied by for that of q kᵀ: [n m], or [m n]
    where queries lie ``across``."""
    scale = q.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    z = (_turned(keys.k, q) if across else _turned(q, keys.k)) * scale
    slope: Array | float = scale
    if rule.soft_cap:
        bent = jnp.tanh(z / rule.soft_cap)
        z, slope = bent * rule.soft_cap, scale * (1 - bent * bent)

    there = keys.tokens
    if there.log_count is not None:
        z += there.log_count
    seen = rule.sees(asking.pos, asking.seg, there.pos, there.seg)
    return jnp.where(seen, z, MASK), slope


def _times(a: Array, b: Array) -> Array:
    """a b in f32."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _turned(a: Array, b: Array) -> Array:
    """a bᵀ in f32."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
