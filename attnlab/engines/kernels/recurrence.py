"""`recurrent` by kernels: states at the boundaries of chunks, then all chunks at once.

The state that a chunk leaves by itself is a product, and the states before all chunks are a sum
that fades, element by element: XLA does both. A kernel reads the chunks, each by itself, backward
as forward; only their tokens and the states at boundaries are kept for the backward pass.

The first token of a document forgets all: its decay is that of no weight at all, `MASK`. So a
kernel knows no documents. An empty slot is a token of zeros that decays nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from attnlab.core import MASK, Array
from attnlab.engines.kernels import Form, chunks
from attnlab.engines.kernels.operands import Side, row_spec, tile_spec
from attnlab.engines.recurrent import sums_until
from attnlab.engines.undecayed import State, latest_document
from attnlab.products import collected


class Tokens(NamedTuple):
    """``q`` [B H N D], ``k`` [B G N D], ``v`` [B G N E]; log decays [B G N D or E], [B G 1 N] where
    a token has one number, or None. N is whole chunks, D and E are what a product takes."""

    q: Any
    k: Any
    v: Any
    key_decay: Any
    value_decay: Any


def attend(
    form: Form,
    q: Array,
    k: Array,
    v: Array,
    key_decay: Array | None,
    value_decay: Array | None,
    seg: Array,
    state: State,
) -> tuple[Array, State]:
    """``out`` [B N H E] f32 and the state after the last token; arguments as in `recurrent.attend`,
    at least one decay given. Cost: as there."""
    N, D, E = *q.shape[1::2], v.shape[3]
    full, reset = seg >= 0, _begins(seg, state.seg)
    decays: dict[str, Any] = {"key_decay": key_decay, "value_decay": value_decay}
    first = "value_decay" if key_decay is None else "key_decay"
    decays[first] = jnp.where(reset[..., None, None], MASK, decays[first])

    def laid(z: Array, whole: bool = True) -> Array:
        """[B N heads X] -> [B heads N X], or [B heads 1 N]."""
        z = jnp.where(full[..., None, None], z, 0).swapaxes(1, 2)
        z = _filled(z, 2, -N % form.n)
        return _widened(form, z, 3) if whole else z.swapaxes(2, 3)

    fading = (z if z is None else laid(z, z.shape[3] > 1) for z in decays.values())
    tokens = Tokens(laid(q), laid(k), laid(v), *fading)
    memory = _widened(form, _widened(form, state.memory, 2), 3)
    memory, before = jax.checkpoint(partial(_boundaries, form.n))(tokens, memory)
    out: Any = _read(form, tokens, before)
    latest, _ = latest_document(seg, state.seg)
    return out.swapaxes(1, 2)[:, :N, :, :E], State(memory[:, :, :D, :E], latest)


def _begins(seg: Array, before: Array) -> Array:
    """Which tokens are the first of a document, ``before`` [B] the one of the state: bool [B N]."""
    slot = jnp.where(seg >= 0, jnp.arange(seg.shape[1]), -1)
    last = jnp.pad(lax.cummax(slot, 1)[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    own = jnp.take_along_axis(seg, jnp.maximum(last, 0), 1)
    return (seg >= 0) & (seg != jnp.where(last >= 0, own, before[:, None]))


def _filled(z: Array, axis: int, more: int) -> Array:
    widths = [(0, 0)] * z.ndim
    widths[axis] = (0, more)
    return jnp.pad(z, widths)


def _widened(form: Form, z: Array, axis: int) -> Array:
    return _filled(z, axis, form.kernels.padded(z.shape[axis]) - z.shape[axis])


def _boundaries(size: int, tokens: Tokens, memory: Array) -> tuple[Array, Array]:
    """The state after the last chunk [B G D E], and those before each: [B G chunks D E]."""

    def cut(z: Array) -> Array:
        """f32 [B G chunks C X]."""
        return z.astype(jnp.float32).reshape(*z.shape[:2], -1, size, z.shape[3])

    def fading(z: Array | None) -> Array:
        if z is None:
            return jnp.zeros((*tokens.k.shape[:2], tokens.k.shape[2] // size, 1, 1))
        return cut(z if z.shape[2] > 1 else z.swapaxes(2, 3))

    def step(memory: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        own, a, b = chunk
        return a[..., :, None] * memory * b[..., None, :] + own, memory

    a, b = fading(tokens.key_decay), fading(tokens.value_decay)
    k, v = (cut(z) * jnp.exp(sums_until(fades)) for z, fades in ((tokens.k, a), (tokens.v, b)))
    parts = collected(k, v), *(jnp.exp(jnp.sum(z, 3)) for z in (a, b))
    memory, before = lax.scan(step, memory, jax.tree.map(lambda z: jnp.moveaxis(z, 2, 0), parts))
    return memory, jnp.moveaxis(before, 0, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(form, tokens, before):
    """What every token reads [B H N E], f32, from the states ``before`` the chunks
    [B G chunks D E] and from its own chunk."""
    return _forward(form, tokens, before)[0]


def _forward(form, tokens, before):
    (B, H, N, _), (_, G, _, E) = tokens.q.shape, tokens.v.shape

    def read_kernel(tokens, before, out):
        out[...] = chunks.read(_chunk(tokens, before))

    own = Side(None, form.n, lambda c, h, b: (b, h, c))
    shared = Side(None, form.n, lambda c, h, b: (b, lax.div(h, H // G), c))
    (out,) = pl.pallas_call(
        read_kernel,
        out_shape=[jax.ShapeDtypeStruct((B, H, N, E), jnp.float32)],
        grid=(N // form.n, H, B),
        in_specs=_specs(tokens, before, own, shared),
        out_specs=[tile_spec(own, E)],
        interpret=form.interpret,
        compiler_params=form.kernels.EACH_ALONE,
    )(tokens, before)
    return out, (tokens, before)


def _backward(form, residuals, d_out):
    tokens, before = residuals
    (B, H, N, _), (_, G, _, E) = tokens.q.shape, tokens.v.shape

    def pull_kernel(tokens, before, d_out, d_tokens, d_before):
        rest = _chunk(tokens._replace(q=None), before)

        def add(r, total):
            q = _f32(tokens.q, r)
            total = total._replace(q=jnp.zeros_like(q))
            total = chunks.pull(rest._replace(q=q), d_out[r], total)
            d_tokens.q[r] = total.q.astype(d_tokens.q.dtype)
            return total._replace(q=None)

        total = lax.fori_loop(0, H // G, add, jax.tree.map(jnp.zeros_like, rest))
        refs = jax.tree.leaves((d_tokens[1:], d_before))
        for ref, value in zip(refs, jax.tree.leaves(total)):
            ref[...] = value.astype(ref.dtype)

    group = Side(H // G, form.n, lambda c, g, b: (b, g, c))
    specs = _specs(tokens, before, group, group._replace(heads=None))
    return pl.pallas_call(
        pull_kernel,
        out_shape=jax.tree.map(lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype), residuals),
        grid=(N // form.n, G, B),
        in_specs=[*specs, tile_spec(group, E)],
        out_specs=specs,
        interpret=form.interpret,
        compiler_params=form.kernels.EACH_ALONE,
    )(tokens, before, d_out)


_read.defvjp(_forward, _backward)


def _chunk(tokens: Tokens, before: Any) -> chunks.Chunk:
    q, k, v, a, b = jax.tree.map(_f32, tuple(tokens))
    return chunks.Chunk(q, k, v, a, b, before[...])


def _f32(ref: Any, at: Any = ...) -> Array:
    return ref[at].astype(jnp.float32)


def _specs(tokens: Tokens, before: Array, asking: Side, answering: Side) -> tuple[Tokens, Any]:
    """The block of every array that a program sees."""

    def shown(z: Array) -> pl.BlockSpec:
        return row_spec(answering) if z.shape[2] == 1 else tile_spec(answering, z.shape[3])

    def place(*at):
        b, g, c = answering.place(*at)
        return b, g, c, 0, 0

    queries = tile_spec(asking, tokens.q.shape[3])
    state = pl.BlockSpec((None, None, None, *before.shape[3:]), place)
    return Tokens(queries, *jax.tree.map(shown, tokens[1:])), state
