"""One head that has something to do at few tokens, and nothing at the others.

A row is `FIRST`, then letters drawn uniformly and triggers; where a trigger stands, the head has to
put out the vector of the token before, elsewhere 0. The vectors of letters are random and fixed,
that of `FIRST` is learned, or fixed as well: then there is no vector that adds nothing.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from attnlab.analysis.sinks import EPSILON
from attnlab.core import Array, Dims, Keys, Mechanism, Queries, Rule, normalisers
from attnlab.mechanisms.key_bias import KeyBias
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.rope import Rope

FIRST, TRIGGER, LETTERS = 0, 1, 14
TRIGGERS = 0.2
"""The share of tokens that are triggers."""
LENGTH, DIM, BATCH = 32, 32, 64
STEPS, RATE = 2000, 1e-2
LOOKED_AT = (0, 50, 100, 200, 400, 700, 1000, 1500, 2000)


def draw(key: Array, vectors: Array) -> tuple[Array, Array]:
    """Tokens [B N] and what is asked for [B N D]."""
    which, letter = jax.random.split(key)
    tokens = 2 + jax.random.randint(letter, (BATCH, LENGTH), 0, LETTERS)
    tokens = jnp.where(jax.random.uniform(which, tokens.shape) < TRIGGERS, TRIGGER, tokens)
    tokens = tokens.at[:, 0].set(FIRST).at[:, 1].set(2)  # nobody asks for the vector of FIRST
    before = jnp.roll(vectors[tokens], 1, 1)
    return tokens, jnp.where((tokens == TRIGGER)[..., None], before, 0.0)


def init(key: Array, head: Mechanism) -> tuple[dict[str, Any], Array]:
    """Parameters, and the fixed vectors of all tokens [.. D], of length about 1."""
    keys = jax.random.split(key, 4)
    vectors = jax.random.normal(keys[0], (2 + LETTERS, DIM)) / DIM**0.5
    params = {
        "first": jax.random.normal(keys[1], (DIM,)) / DIM**0.5,
        "query": jax.random.normal(keys[2], (2 + LETTERS, DIM)),
        "key": jax.random.normal(keys[3], (2 + LETTERS, DIM)),
        "head": head.init(keys[0], Dims(DIM, 1, 1, DIM, DIM)),
    }
    return params, vectors


def tokens_of(params: dict[str, Any], vectors: Array, tokens: Array) -> tuple[Queries, Keys]:
    """One head, whose queries and keys are looked up by token."""
    pos = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    values = vectors.at[FIRST].set(params["first"]) if "first" in params else vectors
    q, k, v = (z[tokens][:, :, None] for z in (params["query"], params["key"], values))
    return Queries(q, pos, 0 * pos), Keys(k, v, pos, 0 * pos)


def loss(params, vectors, tokens, wanted, head: Mechanism, rule: Rule) -> Array:
    """Squared error over that of putting out 0."""
    out = head(params["head"], *tokens_of(params, vectors, tokens), rule).out[:, :, 0]
    return jnp.sum((out - wanted) ** 2) / jnp.sum(wanted**2)


def describe(params, vectors, tokens, wanted, head: Mechanism, rule: Rule) -> dict[str, float]:
    """What the head does with its first token, over rows that it has not learnt from: α of
    `attnlab.analysis.sinks`, since every query sees that token, and what a query spends."""
    found = head.reference(params["head"], *tokens_of(params, vectors, tokens), rule)
    probs = found.aux["probs"][:, 0]
    spent = jnp.sum(probs, -1)
    weight, share = (jnp.mean(p, -1) for p in (probs[..., 0], probs[..., 0] / spent))
    values = {
        "loss": loss(params, vectors, tokens, wanted, head, rule),
        "share": jnp.mean(share),
        "weight": jnp.mean(weight),
        "sink": 100 * jnp.mean(share > EPSILON),
        "sink_by_weight": 100 * jnp.mean(weight > EPSILON),
        "spent": jnp.mean(spent),
        "length of the first vector": jnp.linalg.norm(params.get("first", vectors[FIRST])),
    }
    return {name: round(float(value), 4) for name, value in values.items()}


def curve(name: str, seed: int, fixed: bool = False) -> Iterator[dict[str, Any]]:
    """What is seen after each of `LOOKED_AT` steps with a normaliser, or with ``key_bias``;
    ``fixed``: the vector of `FIRST` is, at length 1."""
    bias = name == "key_bias"
    head: Mechanism = KeyBias() if bias else Softmax()
    rule = Rule(position=Rope(), normaliser=normalisers.get("softmax" if bias else name)())
    key = jax.random.key(seed)
    params, vectors = init(key, head)
    if fixed:
        first = params.pop("first")
        vectors = vectors.at[FIRST].set(first / jnp.linalg.norm(first))
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, number):
        batch = draw(jax.random.fold_in(key, number), vectors)
        slope = jax.grad(loss)(params, vectors, *batch, head, rule)
        change, state = optimizer.update(slope, state)
        return optax.apply_updates(params, change), state

    held_out = draw(jax.random.fold_in(key, 10**6), vectors)
    for number in range(STEPS + 1):
        if number in LOOKED_AT:
            yield {"step": number} | describe(params, vectors, *held_out, head, rule)
        params, state = step(params, state, number)
