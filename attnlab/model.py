"""The small Transformer that every mechanism is plugged into; the only file that imports Linen.

    x = embed(tokens) √width;  per layer  x += attention(norm x),  x += mlp(norm x);  logits =
    norm(x) embedᵀ

pre-norm RMSNorm, no biases, f32 parameters, computation in ``dtype``, f32 logits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import (
    Array,
    Dims,
    Exponential,
    Keys,
    Mechanism,
    Normaliser,
    Position,
    Queries,
    Rule,
)
from attnlab.products import projected

ACTIVATIONS = {"swiglu": nn.silu, "gelu": nn.gelu}


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of the network around the mechanism; its fields are `config.model`."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    mlp: str = "swiglu"
    mlp_width: int = 704
    dropout: float = 0.0
    qk_norm: bool = False
    tied: bool = True
    remat: bool = False
    dtype: str = "float32"
    causal: bool = True
    kernels: str = "xla"

    @property
    def dims(self) -> Dims:
        return Dims(self.width, self.heads, self.kv_heads, self.head_dim, self.head_dim)


class Memory(NamedTuple):
    """What one layer remembers between calls: all ``keys`` with the number of slots in use, the
    mechanism's own compact ``state``, or both."""

    keys: Keys | None
    used: Array
    state: Any


class Extras(NamedTuple):
    """What a pass yields besides its output: one `Memory` and one ``aux`` dict per layer."""

    memory: tuple[Memory | None, ...]
    aux: tuple[dict[str, Any], ...]


def initial_memory(
    architecture: Architecture, mechanisms: tuple[Mechanism, ...], batch: int, length: int
) -> tuple[Memory, ...]:
    """Empty memories for ``length`` tokens in all; a compact state has its own fixed size."""
    dims, dtype = architecture.dims, jnp.dtype(architecture.dtype)
    memories = []
    for mechanism in mechanisms:
        state = mechanism.initial_state(dims, batch, dtype)
        whole = state == () or mechanism.recalls
        keys = Keys.empty(dims, batch, length, dtype) if whole else None
        if keys is not None and mechanism.marked:
            keys = keys._replace(unit=jnp.zeros_like(keys.pos))
        state = jax.tree.map(jnp.copy, state)  # one array twice could not be donated
        memories.append(Memory(keys, jnp.zeros((), jnp.int32), state))
    return tuple(memories)


def _dense(features: int, scale: float, dtype: str, name: str) -> nn.Dense:
    init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
    return nn.Dense(
        features, use_bias=False, kernel_init=init, dtype=dtype, dot_general=_product, name=name
    )


def _product(x: Array, kernel: Array, *_, **__) -> Array:
    """What `nn.Dense` asks of `lax.dot_general`."""
    return projected(x, kernel)


class Attention(nn.Module):
    """One layer's projections, cache and mechanism: x [B N width] -> ([B N width], memory, aux)."""

    architecture: Architecture
    mechanism: Mechanism
    position: Position
    normaliser: Normaliser

    @nn.compact
    def __call__(self, x, embedded, pos, seg, unit, position_params, memory, taps):
        a, B, N = self.architecture, *x.shape[:2]

        def project(name: str, heads: int, source: Array | None) -> Array:
            if source is None:
                return jnp.zeros((B, N, heads, a.head_dim), a.dtype)
            z = _dense(heads * a.head_dim, 1.0, a.dtype, name)(source).reshape(B, N, heads, -1)
            normed = a.qk_norm and name != "value"
            return nn.RMSNorm(dtype=a.dtype, name=f"{name}_norm")(z) if normed else z

        source = self.mechanism.source(x, embedded, pos)
        queries = Queries(project("query", a.heads, source), pos, seg)
        k, v = project("key", a.kv_heads, source), project("value", a.kv_heads, x)
        keys = Keys(k, v, pos, seg)
        if self.mechanism.marked:
            keys = keys._replace(unit=unit)
        if position_params is None:
            position_params = self.param("position", self.position.init, a.dims)
        weighing = self.param("normaliser", self.normaliser.init, a.dims)
        rule = Rule(
            position_params,
            self.position,
            a.causal,
            taps=taps,
            normaliser=self.normaliser,
            normaliser_params=weighing,
            kernels=a.kernels,
        )
        params = self.param("mechanism", self.mechanism.init, a.dims)
        state = () if memory is None else memory.state
        if memory is not None and memory.keys is not None:
            keys = _written(memory.keys, keys, memory.used)
        draw = self.make_rng("attention") if self.has_rng("attention") else None
        result = self.mechanism(params, queries, keys, rule, state, x=x, key=draw)
        if memory is not None:
            kept = None if memory.keys is None else keys
            memory = Memory(kept, memory.used + N, result.state)
        out = _dense(a.width, 0.5 / a.layers, a.dtype, "out")(result.out.reshape(B, N, -1))
        return out, memory, result.aux


def _written(buffer: Keys, new: Keys, start: Array) -> Keys:
    """``buffer`` with ``new`` tokens in the slots from ``start`` on."""

    def write(old: Array, z: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, z.astype(old.dtype), start, 1)

    return jax.tree.map(write, buffer, new)


class Mlp(nn.Module):
    """SwiGLU: (silu(x W) ∘ x U) V, or GELU: gelu(x W) V."""

    architecture: Architecture

    @nn.compact
    def __call__(self, x):
        a = self.architecture
        factors = [_dense(a.mlp_width, 1.0, a.dtype, "gate")(x)]
        if a.mlp == "swiglu":
            factors.append(_dense(a.mlp_width, 1.0, a.dtype, "up")(x))
        # For the backward pass the factors are kept: less memory, in the same time.
        z = jax.checkpoint(partial(_gated, ACTIVATIONS[a.mlp]))(*factors)
        return _dense(a.width, 0.5 / a.layers, a.dtype, "down")(z)


def _gated(activation: Callable, gate: Array, *up: Array) -> Array:
    return math.prod(up, start=activation(gate))


class Block(nn.Module):
    """One layer: attention and, unless ``mlp`` is "none", MLP, each normalised before and added
    after."""

    architecture: Architecture
    mechanism: Mechanism
    position: Position
    normaliser: Normaliser
    train: bool
    taps: tuple

    @nn.compact
    def __call__(self, x, embedded, pos, seg, unit, position_params, memory):
        a = self.architecture
        drop = nn.Dropout(a.dropout, deterministic=not self.train)
        attention = Attention(a, self.mechanism, self.position, self.normaliser, name="attention")
        norm = nn.RMSNorm(dtype=a.dtype, name="attention_norm")
        tokens = norm(x), norm(embedded), pos, seg, unit
        z, memory, aux = attention(*tokens, position_params, memory, self.taps)
        x += drop(z)
        if a.mlp == "none":
            return x, memory, aux
        x += drop(Mlp(a, name="mlp")(nn.RMSNorm(dtype=a.dtype, name="mlp_norm")(x)))
        return x, memory, aux


class Backbone(nn.Module):
    """Tokens [B N] to hidden states [B N width]; ``mechanisms`` has one entry per layer, and
    ``marks`` one byte per token id, its ``unit`` (see `Mechanism.marked`), or none: all 0."""

    architecture: Architecture
    vocab_size: int
    mechanisms: tuple[Mechanism, ...]
    position: Position
    normaliser: Normaliser = Exponential()
    marks: bytes = b""

    def setup(self):
        a = self.architecture
        self.embedding = self.read_in()
        if self.position.shared:
            self.position_params = self.param("position", self.position.init, a.dims)
        self.norm = nn.RMSNorm(dtype=a.dtype)

    @nn.nowrap
    def read_in(self) -> nn.Module:
        """What makes vectors [B N width] of tokens."""
        a = self.architecture
        init = nn.initializers.normal(a.width**-0.5)
        return nn.Embed(self.vocab_size, a.width, embedding_init=init, dtype=a.dtype)

    @nn.nowrap
    def units(self, tokens: Array) -> Array:
        """The ``unit`` of every token [B N]."""
        table = np.frombuffer(self.marks or bytes(self.vocab_size), np.uint8)
        return jnp.asarray(table, jnp.int32)[tokens]

    @nn.compact
    def __call__(self, tokens, pos, seg, memory=None, *, train=False, taps=()):
        a = self.architecture
        shared = self.position_params if self.position.shared else None
        x = self.embedding(tokens) * jnp.asarray(a.width**0.5, a.dtype)
        x = self.position.embed(shared or {}, x, pos)
        x = nn.Dropout(a.dropout, deterministic=not train)(x)
        memory = memory or (None,) * len(self.mechanisms)
        unit = None
        if any(mechanism.marked for mechanism in self.mechanisms):
            unit = self.units(tokens)
        block, after, aux = nn.remat(Block) if a.remat else Block, [], []
        embedded = x
        for i, (mechanism, past) in enumerate(zip(self.mechanisms, memory)):
            layer = block(
                a, mechanism, self.position, self.normaliser, train, taps, name=f"layer_{i}"
            )
            x, past, extra = layer(x, embedded, pos, seg, unit, shared, past)
            after.append(past)
            aux.append(extra)
        return self.norm(x), Extras(tuple(after), tuple(aux))


class Transformer(nn.Module):
    """A language model: tokens [B N] to f32 logits [B N vocab_size] of the next token.

    ``pos`` and ``seg`` [B N] as in `attnlab.core`; ``memory`` from `initial_memory` to continue a
    sequence; ``marks`` as for `Backbone`. Returns ``(logits, Extras)``.
    """

    architecture: Architecture
    vocab_size: int
    mechanisms: tuple[Mechanism, ...]
    position: Position
    normaliser: Normaliser = Exponential()
    marks: bytes = b""

    def setup(self):
        a = self.architecture
        self.backbone = Backbone(
            a, self.vocab_size, self.mechanisms, self.position, self.normaliser, self.marks
        )
        if not a.tied:
            self.head = _dense(self.vocab_size, 1.0, a.dtype, "head")

    def hidden(self, tokens, pos, seg, memory=None, *, train=False, taps=()):
        """What the logits are made of, [B N width], and `Extras`."""
        return self.backbone(tokens, pos, seg, memory, train=train, taps=taps)

    def table(self, params) -> Array:
        """The output projection [vocab_size width] among ``params``."""
        if self.architecture.tied:
            return params["backbone"]["embedding"]["embedding"]
        return params["head"]["kernel"].T

    def __call__(self, tokens, pos, seg, memory=None, *, train=False, taps=()):
        x, extras = self.hidden(tokens, pos, seg, memory, train=train, taps=taps)
        logits = self.backbone.embedding.attend(x) if self.architecture.tied else self.head(x)
        return logits.astype(jnp.float32), extras


class Classifier(nn.Module):
    """A bidirectional encoder: tokens [B N] to f32 logits [B classes], from the mean of the hidden
    states over the tokens with ``seg`` >= 0. Returns ``(logits, Extras)``."""

    architecture: Architecture
    vocab_size: int
    mechanisms: tuple[Mechanism, ...]
    position: Position
    classes: int
    normaliser: Normaliser = Exponential()

    @nn.compact
    def __call__(self, tokens, pos, seg, *, train=False, taps=()):
        a = dataclasses.replace(self.architecture, causal=False)
        backbone = Backbone(
            a, self.vocab_size, self.mechanisms, self.position, self.normaliser, name="backbone"
        )
        x, extras = backbone(tokens, pos, seg, train=train, taps=taps)
        return nn.Dense(self.classes, name="head")(self.features(x, seg)), extras

    def features(self, x, seg):
        """What the head reads: f32 [B F]."""
        return _mean(x, seg >= 0)


class PairClassifier(Classifier):
    """An encoder of two texts in one row, segments 0 and 1, which do not see each other: of their
    means a and b, relu([a, b, a b, a - b] W + c), of the width of the MLPs, goes to the head.

    Source: the two towers of Tay et al., arXiv 2011.04006, with one hidden layer.
    """

    def features(self, x, seg):
        a, b = (_mean(x, seg == i) for i in (0, 1))
        both = jnp.concatenate([a, b, a * b, a - b], -1)
        return nn.relu(nn.Dense(self.architecture.mlp_width, name="pair")(both))


def _mean(x: Array, chosen: Array) -> Array:
    """Over the tokens [B N] that are chosen, of x [B N width]: f32 [B width], 0 where there is
    none."""
    chosen = chosen[..., None]
    total = jnp.sum(jnp.where(chosen, x, 0).astype(jnp.float32), 1)
    return total / jnp.maximum(jnp.sum(chosen, 1), 1)


class RealBackbone(Backbone):
    """One whose tokens are vectors [B N F], read by a linear map. Its bias keeps a length in sight
    of the norms that follow; without it they would see directions alone."""

    @nn.nowrap
    def read_in(self) -> nn.Module:
        a = self.architecture
        return nn.Dense(
            a.width,
            kernel_init=nn.initializers.variance_scaling(1 / a.width, "fan_in", "normal"),
            bias_init=nn.initializers.normal(a.width**-0.5),
            dtype=a.dtype,
        )

    @nn.nowrap
    def units(self, tokens: Array) -> Array:
        return jnp.zeros(tokens.shape[:2], jnp.int32)


class Regressor(nn.Module):
    """Real numbers in and out: tokens [B N features] to f32 predictions [B N], each read by a
    linear map off the hidden state of its token. Returns ``(predictions, Extras)``; ``pos``,
    ``seg`` and ``memory`` as for `Transformer`."""

    architecture: Architecture
    features: int
    mechanisms: tuple[Mechanism, ...]
    position: Position
    normaliser: Normaliser = Exponential()

    @nn.compact
    def __call__(self, tokens, pos, seg, memory=None, *, train=False, taps=()):
        backbone = RealBackbone(
            self.architecture, 0, self.mechanisms, self.position, self.normaliser, name="backbone"
        )
        x, extras = backbone(tokens, pos, seg, memory, train=train, taps=taps)
        return nn.Dense(1, name="head")(x.astype(jnp.float32))[..., 0], extras


Model = Transformer | Classifier | Regressor
"""What can be trained."""
