"""Weights for tests to look at: queries and keys in two documents, and rules of every kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.analysis.margins import build
from attnlab.core import Dims, Keys, Position, Queries, Rule, normalisers
from attnlab.engines import dense
from attnlab.mechanisms.window import Near
from attnlab.positions.alibi import Alibi

DIMS = Dims(8, 4, 2, 8, 5)


@jax.jit
def densely(queries, keys, rule):
    return dense.attend(queries, keys, rule)[2]


def tokens(N: int, M: int, B: int = 2, H: int = 4, G: int = 2) -> tuple[Queries, Keys]:
    """Queries the last N of M tokens in two documents, with one slot empty and full of NaN."""
    draw = np.random.default_rng(N * 100 + M)
    q = 2 * draw.standard_normal((B, N, H, 8)).astype(np.float32)
    k, v = (draw.standard_normal((B, M, G, size)).astype(np.float32) for size in (8, 5))
    pos = np.tile(np.arange(M, dtype=np.int32), (B, 1))
    seg = np.where(pos < M // 3, 0, 1)
    pos = np.where(seg == 1, pos - M // 3, pos)
    seg[0, 0] = -1
    k[0, 0] = np.nan
    arrays = jax.tree.map(jnp.asarray, (q, pos[:, M - N :], seg[:, M - N :], k, v, pos, seg))
    return Queries(*arrays[:3]), Keys(*arrays[3:])


class Counting(Position):
    """A position module that looks at whole rows: every key pays for the keys after it."""

    biased = True
    whole = True

    def row_bias(self, params, z, seen, q, q_pos, k_pos):
        return 0.3 * jnp.cumsum(jnp.where(seen, jax.nn.sigmoid(z), 0.0), -1)


RULES = {
    **{name: Rule(normaliser=build(name, 16)) for name in normalisers.names()},
    "both directions": Rule(causal=False),
    "soft cap": Rule(soft_cap=2.0),
    "alibi": Rule(Alibi().init(jax.random.key(0), DIMS), Alibi()),
    "window": Rule(patterns=(Near(5, 1),)),
    "whole position": Rule(position=Counting()),
}


def rule_of(name: str) -> Rule:
    """One of `RULES`, with the parameters of its normaliser."""
    rule = RULES[name]
    params = rule.normaliser.init(jax.random.key(0), DIMS)
    return dataclasses.replace(rule, normaliser_params=params)
