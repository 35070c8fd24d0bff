"""Pointer networks: a sequence whose every item is the index of an input.

    u_ij = vᵀ tanh(W₁ e_j + W₂ d_i),   p(C_i = j | C_<i, P) = softmax_j u_i,   j in 0 .. n

e_0 .. e_{n-1} [E] are the states that an encoder gives the n points, and e_n is learned: the end.
d_i is the state of an LSTM after C_0 .. C_{i-1}: it sets out from the encoder, reads a learned "go"
and then the coordinates of the point chosen last. Scores are additive attention over the input; the
dictionary of outputs grows with it, so the same parameters serve any n. An index that may not be
chosen has u = `MASK`: an empty slot; a point chosen before, unless ``outputs.repeats``; and the end
while nothing is chosen or, if ``outputs.complete``, while a point is left.

Cost of a row: O(n E²) once, then O(n E + E²) a step; memory in training O(n m E) for m steps.
Source: Vinyals et al. 2015, arXiv 1506.03134.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from attnlab import lstm
from attnlab.core import MASK, Array, Mechanism
from attnlab.encoders import Encoder
from attnlab.model import Architecture, Extras, Model


class Outputs(Protocol):
    """What sequences may be; a task of `attnlab.tasks.synthetic.points` says it."""

    @property
    def repeats(self) -> bool: ...
    @property
    def complete(self) -> bool: ...
    def steps(self, length: int) -> int: ...


class Inputs(NamedTuple):
    """What every step meets: ``points`` [B n+1 2], of which the last is the end; ``keys`` W₁ e
    [B n+1 E]; ``full`` bool [B n]."""

    points: Array
    keys: Array
    full: Array


class Past(NamedTuple):
    """What a step goes on from: the ``state`` d before it, its input ``x`` [B 2], and which points
    are ``used`` [B n]."""

    state: lstm.State
    x: Array
    used: Array


class Beams(NamedTuple):
    """K sequences of each row: ``past`` of B K rows, Σ log p ``total`` [B K], whether they are
    ``ended`` [B K], and the indices ``chosen`` [B K m], -1 where none is."""

    past: Past
    total: Array
    ended: Array
    chosen: Array


@dataclass(frozen=True)
class PointerNetwork:
    """``encoder`` reads the points, ``outputs`` says what sequences may be. Called as the modules
    of `attnlab.model` are: `init`, `apply`."""

    encoder: Encoder
    outputs: Outputs

    @property
    def architecture(self) -> Architecture:
        return self.encoder.architecture

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        return self.encoder.mechanisms

    def clone(self, **changes: Any) -> "PointerNetwork":
        """The same with another encoder: ``changes`` of its fields."""
        encoder: Any = self.encoder
        return dataclasses.replace(self, encoder=dataclasses.replace(encoder, **changes))

    def init(self, key: Array, points: Array, pos: Array, seg: Array) -> dict[str, Any]:
        """Fresh parameters, under "params"."""
        E = self.architecture.width
        encoder, cell, *draws = jax.random.split(key, 5)
        w1, w2, v = (jax.random.normal(k, s) * E**-0.5 for k, s in zip(draws, _sizes(E)))
        own = {"cell": lstm.init(cell, 2, E), "key_kernel": w1, "query_kernel": w2, "v": v}
        decoder = {**own, "go": jnp.zeros(2), "end": jnp.zeros(E)}
        return {"params": {**self.encoder.init(encoder, points, pos, seg), "decoder": decoder}}

    def apply(
        self,
        variables: Any,
        points: Array,
        pos: Array,
        seg: Array,
        targets: Array,
        **options: Any,
    ) -> tuple[Array, Extras]:
        """log p(C_i = j | C_<i, P) f32 [B m n+1] where C is ``targets`` int [B m] (teacher forced),
        and `Extras`. Row i depends on the targets before i; those below 0 choose nothing.
        ``options`` are those of the encoder."""
        params = variables["params"]
        inputs, past, extras = self._begin(params, points, pos, seg, **options)

        def step(past: Past, target: Array) -> tuple[Past, Array]:
            state, scores = self._score(params["decoder"], inputs, past)
            return _follow(inputs, past, state, target), scores

        _, scores = jax.lax.scan(step, past, targets.T)
        return scores.swapaxes(0, 1), extras

    def decode(
        self, variables: Any, points: Array, pos: Array, seg: Array, beams: int = 1
    ) -> Array:
        """The likeliest sequence that a search with so many ``beams`` finds: int32 [B m], its end
        and then -1. One beam is greedy: the likeliest index at each step."""
        params, (B, n), K = variables["params"], seg.shape, beams
        begun = self._begin(params, points, pos, seg)[:2]
        inputs, past = jax.tree.map(lambda z: jnp.repeat(z, K, 0), begun)
        m = self.outputs.steps(n)
        total = jnp.where(jnp.arange(K) > 0, MASK, 0.0) + jnp.zeros((B, 1))  # at first, one beam
        nothing = jnp.full((B, K, m), -1, jnp.int32)

        def step(kept: Beams, i: Array) -> tuple[Beams, None]:
            state, scores = self._score(params["decoder"], inputs, kept.past)
            return _extend(inputs, kept, state, scores.reshape(B, K, n + 1), i), None

        start = Beams(past, total, jnp.zeros((B, K), bool), nothing)
        return jax.lax.scan(step, start, jnp.arange(m))[0].chosen[:, 0]

    def _begin(
        self, params: Any, points: Array, pos: Array, seg: Array, **options: Any
    ) -> tuple[Inputs, Past, Extras]:
        full = seg >= 0
        points = jnp.where(full[..., None], points, 0)
        states, state, extras = self.encoder.encode(params, points, pos, seg, **options)
        own, B = params["decoder"], len(seg)
        end = jnp.broadcast_to(own["end"], (B, 1, states.shape[-1]))
        keys = jnp.concatenate([states, end], 1) @ own["key_kernel"]
        go = jnp.broadcast_to(own["go"], (B, 2))
        points = jnp.pad(points, ((0, 0), (0, 1), (0, 0)))
        return Inputs(points, keys, full), Past(state, go, jnp.zeros_like(full)), extras

    def _score(self, own: Any, inputs: Inputs, past: Past) -> tuple[lstm.State, Array]:
        """The state d of a step, and log p [B n+1]."""
        state = lstm.advance(own["cell"], past.state, past.x)
        query = state.h @ own["query_kernel"]
        u = jnp.tanh(inputs.keys + query[:, None]) @ own["v"]
        return state, jax.nn.log_softmax(jnp.where(self._allowed(inputs, past), u, MASK))

    def _allowed(self, inputs: Inputs, past: Past) -> Array:
        """Which of the n + 1 may be chosen: bool [B n+1]."""
        full, used = inputs.full, past.used
        points = full if self.outputs.repeats else full & ~used
        left = full & ~used
        end = ~left.any(1) if self.outputs.complete else used.any(1)
        return jnp.concatenate([points, end[:, None]], 1)

    def count_products(self, length: int) -> float:
        """Multiplications of a row outside its encoder."""
        E, n, m = self.architecture.width, length, self.outputs.steps(length)
        return (n + 3) * E**2 + m * (4 * E * (E + 2) + E**2 + (n + 1) * E)


Trainable = Model | PointerNetwork
"""What can be trained."""


def _sizes(width: int) -> tuple[tuple[int, ...], ...]:
    return (width, width), (width, width), (width,)


def _follow(inputs: Inputs, past: Past, state: lstm.State, chosen: Array) -> Past:
    """The past of the next step, after ``chosen`` int [B]; the end and -1 use no point."""
    n = inputs.full.shape[1]
    x = jnp.take_along_axis(inputs.points, chosen[:, None, None] % (n + 1), 1)[:, 0]
    return Past(state, x, past.used | (chosen[:, None] == jnp.arange(n)))


def _extend(inputs: Inputs, kept: Beams, state: lstm.State, scores: Array, i: Array) -> Beams:
    """The best K of all sequences that are one index longer; ``scores`` [B K n+1]. A sequence that
    is ended stays as it is."""
    B, K, choices = scores.shape
    idle = jnp.where(jnp.arange(choices) < choices - 1, MASK, 0.0)
    scores = kept.total[..., None] + jnp.where(kept.ended[..., None], idle, scores)
    total, best = jax.lax.top_k(scores.reshape(B, -1), K)
    parent, choice = best // choices, best % choices
    origin = (parent + K * jnp.arange(B)[:, None]).ravel()
    past, state = jax.tree.map(lambda z: z[origin], (kept.past, state))
    ended = jnp.take_along_axis(kept.ended, parent, 1)
    chosen = jnp.take_along_axis(kept.chosen, parent[..., None], 1)
    chosen = chosen.at[:, :, i].set(jnp.where(ended, -1, choice))
    past = _follow(inputs, past, state, choice.ravel())
    return Beams(past, total, ended | (choice == choices - 1), chosen)
