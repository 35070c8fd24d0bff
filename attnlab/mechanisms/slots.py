"""Attention with bounded memory: tokens are written to slots, and queries attend to the slots."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Cost, Dims, Mechanism, Result, Rule
from attnlab.engines import recurrent, running
from attnlab.errors import UserError
from attnlab.mechanisms.linear import rotated
from attnlab.refusals import refuse_bias, refuse_bidirectional, refuse_every_normaliser, refuse_taps
from attnlab.registry import register


class State(NamedTuple):
    """The slots' keys [B G D m] and values [B G m E], as sums still to be divided by ``totals``
    [B G 1 m], all three scaled down by the exponential of ``top``."""

    top: running.Top
    keys: recurrent.State
    totals: recurrent.State
    values: recurrent.State


@register
@dataclass(frozen=True)
class Slots(Mechanism):
    """Attention to a bounded number of slots, each a running mean of keys and of values.

        s_t = W x_t,  K̃_t = Σ_j e^(s_j) k_jᵀ / Σ_j e^(s_j),  Ṽ_t likewise (j <= t, slot by slot),
        out_t = softmax(K̃_t q_t / √D) Ṽ_t

    W [width G m] is learned: a token writes to the ``slots`` by what it is, whatever is asked. A
    log weight of -1e30 or less is no write, and a slot without any is not seen.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N m (D + E)) time in chunks of ``chunk`` tokens, O(N m) memory; the decoding state is
    m (D + E + 2) numbers for each kv head. Raises `UserError` for slots < 1 or chunk < 1 and, when
    called, without an order of time, for biased positions and for taps on logits.
    Source: Peng et al., arXiv 2110.02488.
    """

    slots: int = 64
    chunk: int = 64

    cost = Cost(time=1, memory=1, state=0)

    def __post_init__(self):
        if self.slots < 1 or self.chunk < 1:
            raise UserError(
                f"slots: slots={self.slots}, chunk={self.chunk}; use slots >= 1 and chunk >= 1"
            )

    def init(self, key: Array, dims: Dims):
        shape = (dims.width, dims.kv_heads, self.slots)
        return {"write": 0.02 * jax.random.normal(key, shape)}

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        heads, m = dims.kv_heads, self.slots
        return State(
            running.initial_top(batch, heads, m),
            recurrent.initial_state(batch, heads, dims.key_dim, m),
            recurrent.initial_state(batch, heads, 1, m),
            recurrent.initial_state(batch, heads, m, dims.value_dim),
        )

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_unordered("slots", rule)
        q, k = rotated(queries, keys, rule)
        seg, chunk, repeats = keys.seg, self.chunk, q.shape[2] // k.shape[2]
        top, past_keys, past_totals, past_values = state or ((), (), (), ())
        write, decay, _, top = running.rescale(_log_write(params, x), seg, top)

        def attend(q, k, v, past, **decays):
            options = {"chunk": chunk, "kernels": rule.kernels, **decays}
            return recurrent.attend(q, k, v, seg, past, **options)

        one = jnp.ones((*write.shape[:3], 1))
        total, totals = attend(one, one, write, past_totals, value_decay=decay)
        z, slot_keys = attend(q, k, write, past_keys, value_decay=decay)
        total = jnp.repeat(total, repeats, 2)
        written = total > 0
        total = jnp.where(written, total, 1)
        p = probabilities(z / total * scale_of(rule, q), written)
        out, values = attend(p / total, write, keys.cleared().v, past_values, key_decay=decay)
        out = rule.tap("heads", out.astype(queries.q.dtype))
        return Result(out, State(top, slot_keys, totals, values) if state else state)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_unordered("slots", rule)
        q, k = rotated(queries, keys, rule)
        seen = rule.allowed(queries, keys)[:, :, :, None, None]
        log_write = jnp.where(seen, _log_write(params, x)[:, None], MASK)  # [B N M G m]
        share = jnp.where(log_write > MASK, jax.nn.softmax(log_write, 2), 0)
        k, v = (jnp.einsum("bnjgm,bjgd->bngmd", share, z) for z in (k, keys.cleared().v))
        k, v, written = (jnp.repeat(z, q.shape[2] // k.shape[2], 2) for z in (k, v, share.sum(2)))
        z = jnp.einsum("bnhd,bnhmd->bnhm", q, k) * scale_of(rule, q)
        out = jnp.einsum("bnhm,bnhme->bnhe", probabilities(z, written > 0), v)
        return Result(rule.tap("heads", out.astype(queries.q.dtype)), state)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        totals = Dims(dims.width, dims.kv_heads, dims.kv_heads, 1, self.slots)
        counted = recurrent.count_flops(totals, length, self.chunk, along_axis=True)
        return counted + count_flops(dims, length, self.slots, self.chunk)

    @classmethod
    def examples(cls):
        return (cls(slots=3, chunk=8),)


def refuse_unordered(name: str, rule: Rule) -> None:
    """Raises `UserError` for what memories of slots cannot host."""
    refuse_every_normaliser(name, rule)
    refuse_bias(name, rule)
    refuse_taps(name, rule)
    refuse_bidirectional(name, rule, "slots are written in the order of time")


def scale_of(rule: Rule, q: Array) -> float:
    return q.shape[-1] ** -0.5 if rule.scale is None else rule.scale


def probabilities(z: Array, written: Array) -> Array:
    """softmax over the last axis where ``written``, 0 elsewhere and where nothing is."""
    z = jnp.where(written, z, MASK)
    return jnp.where(written, jax.nn.softmax(z, -1), 0)


def count_flops(dims: Dims, length: int, slots: int, chunk: int) -> float:
    """Operations of writing and of two reads of the slots."""
    gates = 2.0 * length * dims.width * dims.kv_heads * slots
    return gates + sum(
        recurrent.count_flops(each, length, chunk, along_axis=True)
        for each in (dims._replace(value_dim=slots), dims._replace(key_dim=slots))
    )


def _log_write(params, x: Array | None) -> Array:
    """s [B N G m], f32."""
    assert x is not None, "slots read the block's input"
    return jnp.einsum("bnw,wgm->bngm", x.astype(jnp.float32), params["write"])
