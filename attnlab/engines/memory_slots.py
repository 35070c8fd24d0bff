"""A few memory slots per head that segments read and rewrite.

The slots of a segment are an attention of learned queries over the slots before and over the tokens
of the segment before:
    o = softmax over [R_s; segment s] of (w · k) v,   R_{s+1} = R_0 + o (W_k, W_v).
``params`` are a dict: ``key`` [m G D], ``value`` [m G E] (R_0), ``query`` [m H D] (w), ``to_key``
[H E G D], ``to_value`` [H E G E] (W). What a running segment has written is carried as a softmax
that is not yet divided, so that a segment may end anywhere in a call.
Source: Bulatov et al., arXiv 2207.06881.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Dims, Keys, Queries, Rule
from attnlab.engines import report_use

CHUNK = 256
"""Most tokens in a chunk; a segment bounds it too."""


class Slots(NamedTuple):
    """What is read: keys [B m G D] and values [B m G E], f32."""

    k: Array
    v: Array


class Partial(NamedTuple):
    """A softmax of the write queries over the tokens so far: ``top``, ``total`` [B H m] and
    ``out`` [B H m E], f32, not yet divided."""

    top: Array
    total: Array
    out: Array


class Carry(NamedTuple):
    """`State` inside a call: ``seg`` and ``block`` [B] of the last token."""

    slots: Slots
    written: Partial
    seg: Array
    block: Array


def start_of(params: Any, batch: int) -> Slots:
    """R_0, for every row."""
    k, v = (jnp.broadcast_to(params[z], (batch, *params[z].shape)) for z in ("key", "value"))
    return Slots(k, v)


def asked(params: Any, rule: Rule, k: Array) -> Array:
    """Logits of the write queries, [B H m M], for keys [B M G D]."""
    w = jnp.swapaxes(params["query"], 0, 1)
    return rule.product(jnp.broadcast_to(w, (k.shape[0], *w.shape)), jnp.swapaxes(k, 1, 2))


def content(rule: Rule) -> Rule:
    """The same scale, cap and scaling of queries, and no positions."""
    bare = Rule()
    return dataclasses.replace(rule, params={}, position=bare.position, patterns=(), taps=())


def read(
    params, queries: Queries, keys: Keys, rule: Rule, block: Array, carry: Carry, segment: int
) -> tuple[tuple[Array, Array], Carry]:
    """``(out, lse)`` over the slots, a chunk of at most ``segment`` tokens at a time: it holds the
    end of the running segment, the beginning of the next, and documents that begin in it."""
    report_use("recurrent_memory", "XLA")
    B, N, H, _ = queries.q.shape
    size = min(N, segment, CHUNK)

    def tiled(z: Array, fill: int = 0) -> Array:
        pad = [(0, 0), (0, -N % size)] + [(0, 0)] * (z.ndim - 2)
        z = jnp.pad(z, pad, constant_values=fill)
        return jnp.moveaxis(z.reshape(B, -1, size, *z.shape[2:]), 1, 0)

    plain = content(rule)
    q = plain.rotate(queries.cleared().q, queries.pos, "query")
    q, k, v = (tiled(z.astype(jnp.float32)) for z in (q, *keys.cleared()[:2]))
    start = start_of(params, B)
    carry = carry._replace(slots=either(carry.seg >= 0, carry.slots, start))

    @jax.checkpoint
    def step(carry, part):
        return _chunk(params, plain, start, carry, *part)

    carry, (out, lse) = lax.scan(step, carry, (q, k, v, tiled(keys.seg, -1), tiled(block, -1)))
    out = jnp.moveaxis(out, 0, 1).reshape(B, -1, H, out.shape[-1])[:, :N]
    lse = jnp.moveaxis(lse, 0, 2).reshape(B, H, -1)[..., :N]
    return (out.astype(queries.q.dtype), lse), carry


def count_flops(dims: Dims, length: int, segment: int, slots: int) -> float:
    """Operations of `read`. A chunk may meet the slots of two segments and those of a document that
    begins in it: its tokens look at all three, and it writes for the first two."""
    H, G, D, E = dims[1:]
    chunks = -(-length // min(length, segment, CHUNK))
    tokens = length * slots * H * (3 * (D + E) + D + 2 * E)
    rewriting = chunks * slots * H * (slots * (D + E) + E * G * (D + E))
    return 2.0 * (tokens + rewriting)


def _chunk(params, rule: Rule, start: Slots, carry: Carry, q, k, v, seg, block):
    full = block >= 0
    same = full & (seg == carry.seg[:, None])
    going = same & (block == carry.block[:, None])
    moved = same & ~going
    z = asked(params, rule, k)
    second = rewritten(params, rule, carry.slots, more(carry.written, z, v, going))
    choices = carry.slots, second, start
    which = jnp.stack([going, moved, full & ~same], -1)
    read = _look(rule, q, choices, which)

    last = jnp.max(jnp.where(full, jnp.arange(full.shape[1]), 0), 1, keepdims=True)
    seg, last = (jnp.take_along_axis(y, last, 1)[:, 0] for y in (seg, block))
    some = last >= 0
    seg, last = jnp.where(some, seg, carry.seg), jnp.where(some, last, carry.block)
    stays = (seg == carry.seg) & (last == carry.block)
    slots = either(stays, carry.slots, either(seg == carry.seg, second, start))
    none = nothing_written(*carry.written.out.shape)
    written = more(either(stays, carry.written, none), z, v, full & (block == last[:, None]))
    return Carry(slots, written, seg, last), read


def _look(rule: Rule, q: Array, choices: tuple[Slots, ...], which: Array) -> tuple[Array, Array]:
    """Softmax over the slots of the choice that ``which`` [B C choices] makes for each query:
    ``out`` [B C H E], ``lse`` [B H C]."""
    k, v = (jnp.concatenate(z, 1) for z in zip(*choices))
    seen = jnp.repeat(which, k.shape[1] // which.shape[-1], -1)[:, None]
    z = rule.product(jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2))
    z = jnp.where(seen, z, MASK)
    probs = jnp.where(seen, jax.nn.softmax(z, -1), 0)
    lse = jnp.where(jnp.any(seen, -1), jax.nn.logsumexp(z, -1), MASK)
    return jnp.swapaxes(_weigh(probs, v), 1, 2), lse


def _weigh(weight: Array, v: Array) -> Array:
    """[B H n M], [B M G E] -> [B H n E]."""
    B, H, n, M = weight.shape
    weight = weight.reshape(B, v.shape[2], -1, n, M)
    return jnp.einsum("bgrnm,bmge->bgrne", weight, v).reshape(B, H, n, -1)


def nothing_written(batch: int, heads: int, slots: int, value_dim: int) -> Partial:
    zero = jnp.zeros((batch, heads, slots), jnp.float32)
    return Partial(zero + MASK, zero, jnp.zeros((*zero.shape, value_dim), jnp.float32))


def more(written: Partial, z: Array, v: Array, which: Array) -> Partial:
    """``written`` and the tokens ``which`` [B C], with logits z [B H m C] and values [B C G E]."""
    which = which[:, None, None]
    z = jnp.where(which, z, MASK)
    top = lax.stop_gradient(jnp.maximum(written.top, jnp.max(z, -1)))
    shrink = jnp.exp(written.top - top)
    weight = jnp.where(which, jnp.exp(z - top[..., None]), 0)
    total = written.total * shrink + jnp.sum(weight, -1)
    return Partial(top, total, written.out * shrink[..., None] + _weigh(weight, v))


def rewritten(params, rule: Rule, slots: Slots, written: Partial) -> Slots:
    """The slots of the next segment: R_0 + o (W_k, W_v)."""
    B, m = slots.k.shape[:2]
    z = asked(params, rule, slots.k)
    whole = more(written, z, slots.v, jnp.ones((B, m), bool))
    out = whole.out / whole.total[..., None]
    k = params["key"] + jnp.einsum("bhme,hegd->bmgd", out, params["to_key"])
    return Slots(k, params["value"] + jnp.einsum("bhme,hegf->bmgf", out, params["to_value"]))


def either(which: Array, a, b):
    """Rows of pytree ``a`` where ``which`` [B], else of ``b``."""
    return jax.tree.map(lambda x, y: jnp.where(which.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)
