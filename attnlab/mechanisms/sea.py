"""SEA: linear attention estimates where softmax attention looks, and the best keys are attended."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import cells, dense, listed, lookback, matching, recurrent, undecayed
from attnlab.engines.segments import part_of, take
from attnlab.errors import UserError
from attnlab.mechanisms.linear import elu_plus_one, rotated
from attnlab.refusals import key_of, refuse_bidirectional, refuse_taps
from attnlab.registry import register


class State(NamedTuple):
    """What the past left: the sums of the estimate, those of the mean value, and the rows that
    the two convolutions look back at."""

    sums: undecayed.State
    mean: undecayed.State
    first: lookback.Past
    second: lookback.Past


class Estimate(NamedTuple):
    """``score`` [B H N T] of every cell, and ``hidden`` [B N H C'], which gates are read off."""

    score: Array
    hidden: Array


@register
@dataclass(frozen=True)
class Sea(Mechanism):
    """Softmax attention over the keys that a small network on top of linear attention points at.

        c_i = Σ_j φ(q_i)·φ(k_j) [P_j, v_j] / Σ_j φ(q_i)·φ(k_j),   φ = elu + 1
        h = gelu(norm([c, v, P] W)),  S = relu(conv(relu(conv(h U)))) R,  a row of T = ``cells``
        out_i = g₂ g₁ softmax over K_i of {q_i·k_j / √D} v_j + (1 − g₂) mean of v up to i

    Cell m of query i holds the positions from ⌊m L / T⌋ up, L = i + 1; K_i are ``kept`` keys at
    most, those of the cells of the highest S, for each head (`attnlab.engines.cells`). P are waves
    of positions, relative to i in c; the convolutions mix all heads and look back over rows, never
    ahead (`attnlab.engines.lookback`); g = sigmoid(h V). A query that keeps all it sees gives plain
    softmax. No gradient passes the choice: S learns from ``aux["loss"]``, ``weight`` times the
    cross-entropy of the kept keys' weights under softmax over K_i of S, which ranks what is kept.
    What is never kept it can learn from dense attention alone: see `estimate`. The paper has
    random features for φ, a table of positions for P, budgets that heads share, and a teacher for
    S. Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E].
    Cost: O(N (T + kept (D + E))) time, O(N (T + kept)) memory; decoding keeps all keys and values,
    sums and the last 4 rows. Tokens of a document must lie side by side. Raises `UserError` for
    sizes < 1 or weight < 0 and, when called, without an order of time, for positions that look at
    whole rows, and for taps on logits while decoding. Source: Lee et al., arXiv 2310.01777.
    """

    cells: int = 64
    kept: int = 64
    channels: int = 1  # of the convolutions, for each head
    chunk: int = 64
    weight: float = 0.1

    cost = Cost(time=1, memory=1, state=1)
    recalls = True
    isotropic = False

    def __post_init__(self):
        if min(self.cells, self.kept, self.channels, self.chunk) < 1 or self.weight < 0:
            raise UserError(f"sea: {self}; use cells, kept, channels, chunk >= 1 and weight >= 0")

    @property
    def relative(self) -> bool:
        return False

    def init(self, key: Array, dims: Dims):
        D, E, H, C = dims.key_dim, dims.value_dim, dims.heads, dims.heads * self.channels
        shapes = {
            "encode": (2 * _read_dim(D, E), 2 * D),
            "decode": (2 * D, self.channels * self.cells),
            "first": (lookback.TAPS, lookback.TAPS, C, C),
            "second": (lookback.TAPS, lookback.TAPS, C, C),
            "score": (C, H),
            "gate": (2 * D, 2),
        }
        params = {
            name: math.prod(shape[:-1]) ** -0.5 * jax.random.normal(k, shape)
            for k, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items())
        }
        offsets = {"decode": jnp.zeros(self.channels * self.cells), "gate": jnp.full(2, 2.0)}
        return params | {"offsets": offsets}

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32) -> State:
        G, D, E = dims.kv_heads, dims.key_dim, dims.value_dim
        past = lookback.initial_past(batch, self.cells, dims.heads * self.channels)
        return State(
            undecayed.initial_state(batch, G, D, _read_dim(D, E) + 1),
            undecayed.initial_state(batch, G, 1, E + 1),
            past,
            past,
        )

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        if rule.observed and not state:
            return self.reference(params, queries, keys, rule)
        _refuse(rule)
        refuse_taps("sea", rule)
        queries, keys = queries.cleared(), jax.tree.map(jnp.asarray, keys.cleared())
        slot, own = _own(queries, keys)
        before = state or self.initial_state(_dims_of(queries, own), len(slot))
        estimate, sums, *rows = self._estimate(params, queries, own, rule, before)
        best = cells.best(estimate.score, queries.pos, self.kept)
        at = _slots(best.pos, slot, queries.pos, keys.pos)
        out, probs, seen = listed.attend(queries, keys, rule, at)
        ones = jnp.ones((*own.v.shape[:3], 1))
        mean, after = undecayed.attend(
            ones, ones, own.v, own.seg, before.mean, chunk=self.chunk, mean=True
        )
        loss = self.loss(probs, best.score, seen, queries.seg)
        out = self._mix(params, queries, estimate, out, mean, rule)
        return Result(out, State(sums, after, *rows) if state else state, {"loss": loss})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        _refuse(rule)
        queries, keys = queries.cleared(), keys.cleared()
        seen, H = rule.allowed(queries, keys), queries.q.shape[2]
        q, k = rotated(queries, keys, rule)
        weight = jnp.einsum("bnhd,bmhd->bhnm", elu_plus_one(q), elu_plus_one(_to_heads(k, H)))
        weight = jnp.where(seen[:, None], weight, 0)
        weight /= jnp.maximum(jnp.sum(weight, -1, keepdims=True), 1e-30)
        found = jnp.einsum("bhnm,bmhe->bnhe", weight, _to_heads(_read(keys, q.shape[-1]), H))

        def convolve(kernel: Array, z: Array):
            return lookback.convolve_densely(kernel, z, queries.pos, queries.seg), ()

        estimate = self._decode(params, queries, keys, found, convolve, convolve)[0]
        score, kept = cells.spread(estimate.score, queries.pos, keys.pos, self.kept)
        out, _, probs = dense.attend(queries, keys, part_of(rule), kept)
        count = jnp.maximum(jnp.sum(seen, -1, keepdims=True), 1)
        mean = jnp.einsum("bnm,bmge->bnge", seen / count, keys.v.astype(jnp.float32))
        own = kept & seen[:, None]
        weight, score, own = (jnp.moveaxis(z, 1, 2) for z in (probs, score, own))
        loss = self.loss(weight, score, own, queries.seg)
        out = self._mix(params, queries, estimate, out, mean, rule)
        return Result(out, state, {"probs": probs, "loss": loss})

    def estimate(self, params, queries: Queries, keys: Keys, rule: Rule) -> Estimate:
        """What the network points at, for a loss that compares it with dense attention. Arguments
        as in a call without a past, keys those of the queries' own tokens."""
        _refuse(rule)
        queries, keys = queries.cleared(), keys.cleared()
        before = self.initial_state(_dims_of(queries, keys), len(queries.pos))
        return self._estimate(params, queries, keys, rule, before)[0]

    def _estimate(self, params, queries: Queries, own: Keys, rule: Rule, before: State):
        """`Estimate`, the sums after the last token, and the rows that come next."""
        q, k = rotated(queries, own, rule)
        options: Any = {"chunk": self.chunk, "mean": True, "features": elu_plus_one}
        read = _read(own, q.shape[-1])
        found, sums = undecayed.attend(q, k, read, own.seg, before.sums, **options)
        convolve = partial(lookback.convolve, pos=queries.pos, seg=queries.seg)
        first, second = (partial(convolve, past=past) for past in before[2:])
        estimate, *rows = self._decode(params, queries, own, found, first, second)
        return estimate, sums, *rows

    def _decode(
        self, params, queries: Queries, own: Keys, found: Array, first: Callable, second: Callable
    ):
        """`Estimate` from what was ``found`` [B N H 2F+E], by two convolutions of (kernel, rows),
        and what these return besides."""
        B, N, H, D = queries.q.shape
        here = _wave(queries.pos, D)[:, :, None]
        (s, c), (sine, cosine, value) = _split(here, D)[:2], _split(found, D)
        v = _to_heads(own.v.astype(jnp.float32), H)
        parts = [sine * c - cosine * s, cosine * c + sine * s, value, v]
        parts += [jnp.broadcast_to(here, (*v.shape[:3], here.shape[-1]))]
        hidden = jnp.concatenate(parts, -1) @ params["encode"]
        hidden -= jnp.mean(hidden, -1, keepdims=True)
        hidden *= jax.lax.rsqrt(jnp.mean(hidden * hidden, -1, keepdims=True) + 1e-6)
        hidden = jax.nn.gelu(hidden)
        rows = hidden @ params["decode"] + params["offsets"]["decode"]
        rows = rows.reshape(B, N, H * self.channels, self.cells).swapaxes(2, 3)
        rows, after = first(params["first"], rows)
        rows, then = second(params["second"], jax.nn.relu(rows))
        score = jnp.einsum("bntc,ch->bhnt", jax.nn.relu(rows), params["score"])
        return Estimate(score, hidden), after, then

    def _mix(self, params, queries: Queries, estimate: Estimate, out, mean, rule: Rule) -> Array:
        """The gated output [B N H E] of ``out`` and the ``mean`` [B N G E] of values."""
        gate = jax.nn.sigmoid(estimate.hidden @ params["gate"] + params["offsets"]["gate"])
        inner, outer = gate[..., :1], gate[..., 1:]
        out, mean = out.astype(jnp.float32), _to_heads(mean, queries.q.shape[2])
        mixed = outer * inner * out + (1 - outer) * mean
        whole = cells.complete(queries.pos, self.cells, self.kept)[..., None, None]
        return rule.tap("heads", jnp.where(whole, out, mixed).astype(queries.q.dtype))

    def loss(self, probs: Array, score: Array, seen: Array, seg: Array) -> Array:
        """``weight`` times the mean over tokens and heads of −Σ p ln softmax(score) over the keys
        ``seen``: weights p, scores of the keys' cells and bool, all [B N H W]; ``seg`` [B N]."""
        z = jax.nn.log_softmax(jnp.where(seen, score, MASK), -1)
        cross = jnp.einsum("bnhw,bnhw->bn", jax.lax.stop_gradient(probs), jnp.where(seen, z, 0))
        full = seg >= 0
        count = jnp.maximum(jnp.sum(full), 1) * probs.shape[2]
        return -self.weight * jnp.sum(jnp.where(full, cross, 0)) / count

    def limit(self, length: int):
        return dataclasses.replace(self, cells=length, kept=length)

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        H, D, E, T = dims.heads, dims.key_dim, dims.value_dim, self.cells
        read, C = _read_dim(D, E), H * self.channels
        sums = recurrent.count_flops(dims._replace(value_dim=read + 1), length, self.chunk)
        one = Dims(0, dims.kv_heads, dims.kv_heads, 1, E + 1)
        sums += recurrent.count_flops(one, length, self.chunk)
        network = H * 2 * D * (2 * read + self.channels * T + 2) + T * C * H
        rows = 2 * lookback.count_flops(length, T, C)
        return sums + rows + 2.0 * length * (network + H * self.kept * (D + E))

    @classmethod
    def examples(cls):
        return (cls(cells=4, kept=5, chunk=8), cls(cells=16, kept=6, channels=2, chunk=8))


def _refuse(rule: Rule) -> None:
    refuse_bidirectional("sea", rule, "its estimate is a sum over what came before")
    if rule.position.whole:
        raise UserError(
            "attention sea meets the keys it keeps in no order, so position "
            f"{key_of(rule.position)} has no row to look at; use rope, alibi or none"
        )


def _dims_of(queries: Queries, keys: Keys) -> Dims:
    return Dims(0, queries.q.shape[2], keys.k.shape[2], keys.k.shape[3], keys.v.shape[3])


def _own(queries: Queries, keys: Keys) -> tuple[Array, Keys]:
    """The slots of the queries' own tokens among the keys, -1 for none, and those tokens."""
    B, N = queries.pos.shape
    if keys.pos.shape[1] == N:
        return jnp.broadcast_to(jnp.arange(N), (B, N)), keys
    slot = matching.locate(queries.pos, queries.seg, keys.pos, keys.seg)
    own = take(keys, jnp.maximum(slot, 0))
    return slot, own._replace(seg=jnp.where(slot < 0, -1, own.seg)).cleared()


def _slots(wanted: Array, slot: Array, pos: Array, among: Array) -> Array:
    """The slots of keys at the ``wanted`` positions [B N H W] of the documents of queries at
    ``pos`` in the slots ``slot`` [B N], -1 for none; ``among`` [B M] the positions of keys."""
    at = wanted + (slot - pos)[..., None, None]
    there = (wanted >= 0) & (slot >= 0)[..., None, None] & (at >= 0) & (at < among.shape[1])
    at = jnp.where(there, at, 0)
    found = among[jnp.arange(len(slot))[:, None, None, None], at]
    return jnp.where(there & (found == wanted), at, -1)


def _to_heads(z: Array, heads: int) -> Array:
    return jnp.repeat(z, heads // z.shape[2], 2)


def _waves(dim: int) -> int:
    """How many frequencies P has."""
    return max(1, dim // 2)


def _read_dim(key_dim: int, value_dim: int) -> int:
    """Numbers in [P, v]."""
    return 2 * _waves(key_dim) + value_dim


def _split(z: Array, dim: int) -> tuple[Array, Array, Array]:
    """Sines, cosines and the rest of [... 2F+E]."""
    F = _waves(dim)
    return z[..., :F], z[..., F : 2 * F], z[..., 2 * F :]


def _wave(pos: Array, dim: int) -> Array:
    """P, sin and cos of ``pos`` [B N] at every frequency: f32 [B N 2F]."""
    F = _waves(dim)
    phase = pos[..., None] * 10000.0 ** (-jnp.arange(F) / F)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1)


def _read(keys: Keys, dim: int) -> Array:
    """[P, v] of every token, f32 [B M G 2F+E]."""
    v = keys.v.astype(jnp.float32)
    wave = _wave(keys.pos, dim)[:, :, None]
    return jnp.concatenate([jnp.broadcast_to(wave, (*v.shape[:3], wave.shape[-1])), v], -1)
