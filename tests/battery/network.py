"""The tiny Transformer that a case is plugged into."""

from functools import lru_cache, partial

import jax
import numpy as np

from attnlab.model import Architecture, Transformer
from battery.cases import BATCH, LENGTH, Case, shaken, units_of

VOCABULARY = 17


def network_of(case: Case, layers: int = 1) -> Transformer:
    """A model of ``layers`` equal layers; ``dims`` as in `battery.cases`."""
    architecture = Architecture(
        width=32,
        layers=layers,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_width=32,
        causal=case.causal,
    )
    layered = (case.mechanism,) * layers
    marks = bytes(units_of(np.arange(VOCABULARY)).tolist()) if case.mechanism.marked else b""
    return Transformer(architecture, VOCABULARY, layered, case.position, case.normaliser, marks)


def tokens_of(batch: int = BATCH, length: int = LENGTH):
    """Random tokens [B N] of one document per row, with their positions and segments."""
    tokens = np.random.default_rng(4).integers(0, VOCABULARY, (batch, length), np.int32)
    pos = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    return tokens, pos, np.zeros_like(pos)


@lru_cache(maxsize=4)
def parameters_of(network: Transformer):
    """The model's variables, a little off their initial values."""
    start = jax.jit(network.init)(jax.random.key(2), *tokens_of(1, 4))
    return shaken(start)


@partial(jax.jit, static_argnums=0)
def forward(network: Transformer, params, tokens, pos, seg, memory=None):
    """``(logits, Extras)``; draws, where a mechanism draws, are always the same."""
    draws = {"attention": jax.random.key(6)}
    return network.apply(params, tokens, pos, seg, memory, rngs=draws)
