"""The loss of a language model, without an array of all logits of a batch where these are many."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from attnlab.core import Array
from attnlab.engines import sharded

LOGITS_IN_FLIGHT = 2**22
"""Beyond so many, tokens take turns."""


def cross_entropy(x: Array, table: Array, targets: Array) -> Array:
    """−ln softmax(x tableᵀ)[target] of hidden states ``x`` [B N W], an output ``table`` [V W] and
    ``targets`` int [B N]: f32 [B N] in nats.

    Tokens take turns in pieces of at most `LOGITS_IN_FLIGHT` logits, which the backward pass
    computes once more. Products are in the dtype of ``x``, sums in f32. On a mesh that splits the
    sequence each device reads its own tokens.
    Cost: O(B N V W) time; O(B N + LOGITS_IN_FLIGHT) memory besides x and its gradient.
    """
    table = table.astype(x.dtype)
    if sharded.count(x.shape[1]) == 1:
        return _cross_entropy(x, table, targets)
    tokens = P(sharded.layout(x.shape[0]).rows, sharded.SEQUENCE)
    return sharded.across(_cross_entropy, (tokens, P(), tokens), tokens)(x, table, targets)


def likeliest(x: Array, table: Array) -> Array:
    """argmax of x tableᵀ: [B N W], [V W] -> int32 [B N], in pieces as `cross_entropy`."""
    table = table.astype(x.dtype)

    def piece(_, part):
        return None, jnp.argmax(_logits(part, table), -1).astype(jnp.int32)

    _, found = lax.scan(piece, None, _cut(x, _pieces(x, table)))
    return _joined(found, x.shape[1])


@jax.custom_vjp
def _cross_entropy(x: Array, table: Array, targets: Array) -> Array:
    return _forward(x, table, targets)[0]


def _forward(x: Array, table: Array, targets: Array):
    def piece(_, part):
        z = _logits(part[0], table)
        own = jnp.take_along_axis(z, part[1][..., None], -1)[..., 0]
        lse = jax.nn.logsumexp(z, -1)
        return None, (lse - own, lse)

    count = _pieces(x, table)
    _, found = lax.scan(piece, None, (_cut(x, count), _cut(targets, count)))
    nll, lse = (_joined(z, x.shape[1]) for z in found)
    return nll, (x, table, targets, lse)


def _backward(kept, slope: Array):
    x, table, targets, lse = kept

    def piece(total, part):
        x, target, lse, slope = part
        p = jnp.exp(_logits(x, table) - lse[..., None])
        p -= jax.nn.one_hot(target, table.shape[0], dtype=p.dtype)
        dz = (p * slope[..., None]).astype(x.dtype)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        return total + product("bnv,bnw->vw", dz, x), product("bnv,vw->bnw", dz, table)

    count = _pieces(x, table)
    parts = tuple(_cut(z, count) for z in (x, targets, lse, slope))
    d_table, d_x = lax.scan(piece, jnp.zeros(table.shape, jnp.float32), parts)
    return _joined(d_x, x.shape[1]).astype(x.dtype), d_table.astype(table.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def _logits(x: Array, table: Array) -> Array:
    return jnp.einsum("bnw,vw->bnv", x, table, preferred_element_type=jnp.float32)


def _pieces(x: Array, table: Array) -> int:
    """How many turns the tokens of a row take."""
    B, N = x.shape[:2]
    return min(N, -(-B * N * table.shape[0] // LOGITS_IN_FLIGHT))


def _cut(z: Array, count: int) -> Array:
    """[B N ...] -> [count B n ...], padded at the end."""
    B, N = z.shape[:2]
    size = -(-N // count)
    z = jnp.pad(z, [(0, 0), (0, size * count - N)] + [(0, 0)] * (z.ndim - 2))
    return jnp.moveaxis(z.reshape(B, count, size, *z.shape[2:]), 1, 0)


def _joined(z: Array, length: int) -> Array:
    """[count B n ...] -> [B N ...]."""
    z = jnp.moveaxis(z, 0, 1)
    return z.reshape(z.shape[0], -1, *z.shape[3:])[:, :length]
