"""What reads the points of a pointer network: a Transformer of any mechanism, or an LSTM.

``encode(params, points, pos, seg)`` takes points [B N 2] with ``pos``, ``seg`` [B N] as in
`attnlab.core` and returns one state for each [B N E], the state from which a decoder sets out, and
`Extras`; E is ``architecture.width``. What stands in empty slots has no effect on the others.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from attnlab import lstm
from attnlab.core import Array, Mechanism, Normaliser, Position
from attnlab.model import Architecture, Extras, RealBackbone


class Encoder(Protocol):
    """Frozen and hashable: a static argument of jit."""

    @property
    def architecture(self) -> Architecture: ...
    @property
    def mechanisms(self) -> tuple[Mechanism, ...]: ...
    def init(self, key: Array, points: Array, pos: Array, seg: Array) -> dict[str, Any]: ...
    def encode(
        self, params: Any, points: Array, pos: Array, seg: Array, **options: Any
    ) -> tuple[Array, lstm.State, Extras]: ...


@dataclass(frozen=True)
class TransformerEncoder:
    """The network of `attnlab.model` without a causal mask, whose tokens are the points. With m the
    mean over them, the decoder sets out from c = m U, h = tanh(m W).

    Without positions it does not know the order of the points: permuting them permutes the states.
    Source: the set of Vinyals et al., arXiv 1511.06391, read by the Transformer of 1706.03762.
    """

    architecture: Architecture
    mechanisms: tuple[Mechanism, ...]
    position: Position
    normaliser: Normaliser

    @property
    def backbone(self) -> RealBackbone:
        a = dataclasses.replace(self.architecture, causal=False)
        return RealBackbone(a, 0, self.mechanisms, self.position, self.normaliser)

    def init(self, key: Array, points: Array, pos: Array, seg: Array) -> dict[str, Any]:
        layers, start = jax.random.split(key)
        width = self.architecture.width
        return {
            "backbone": self.backbone.init(layers, points, pos, seg)["params"],
            "start_kernel": jax.random.normal(start, (width, 2 * width)) * width**-0.5,
        }

    def encode(
        self, params: Any, points: Array, pos: Array, seg: Array, **options: Any
    ) -> tuple[Array, lstm.State, Extras]:
        layers = {"params": params["backbone"]}
        out: Any = self.backbone.apply(layers, points, pos, seg, **options)
        x, extras = out
        x, full = x.astype(jnp.float32), (seg >= 0)[..., None]
        mean = jnp.sum(jnp.where(full, x, 0), 1) / jnp.maximum(jnp.sum(full, 1), 1)
        h, c = jnp.split(mean @ params["start_kernel"], 2, -1)
        return x, lstm.State(jnp.tanh(h), c), extras


@dataclass(frozen=True)
class LstmEncoder:
    """The encoder of the paper: one LSTM over (x, y), whose last state the decoder goes on from.
    Of the ``architecture`` only the width counts."""

    architecture: Architecture
    mechanisms: tuple[Mechanism, ...] = ()

    def init(self, key: Array, points: Array, pos: Array, seg: Array) -> dict[str, Any]:
        return {"backbone": lstm.init(key, points.shape[-1], self.architecture.width)}

    def encode(
        self, params: Any, points: Array, pos: Array, seg: Array, **options: Any
    ) -> tuple[Array, lstm.State, Extras]:
        """``options`` (training, draws, taps) change nothing."""
        states, last = lstm.read(params["backbone"], points, seg >= 0)
        return states, last, Extras((), ())
