"""Facts first, questions about them far later: what one layer of each mechanism recalls.

160 tokens are facts, each a key and its value, all keys different; 32 are blank, so that no window
of 32 reaches a fact from a question; 64 are questions, each with one of the keys, drawn anew. One
layer of attention, then the value: 16 of them, so that guessing is right in 6.3 %.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab.core import Exponential, Mechanism, mechanisms, positions
from attnlab.model import Architecture, Attention
from attnlab.statistics import KEY

FACTS, BLANKS, QUESTIONS, VALUES = 160, 32, 64, 16
LENGTH = FACTS + BLANKS + QUESTIONS
STEPS, BATCH, RATE, TESTED = 500, 16, 3e-3, 128
SIZES = Architecture(width=64, layers=1, heads=2, kv_heads=2, head_dim=32)

MECHANISMS: dict[str, tuple[str, dict[str, float]]] = {
    "softmax": ("softmax", {}),
    "window, 32": ("window", {"window": 32}),
    "strided, 16": ("strided", {"stride": 16}),
    "lsh, 1 round": ("lsh", {"rounds": 1, "buckets": 16, "length": 32}),
    "lsh, 4 rounds": ("lsh", {"rounds": 4, "buckets": 16, "length": 32}),
    "routing, 8 of 32": ("routing", {"clusters": 8, "length": 32}),
    "routing, 8 of 64": ("routing", {"clusters": 8, "length": 64}),
    "block_topk": ("block_topk", {"block": 16, "chosen": 4}),
    "knn_memory": (
        "knn_memory",
        {"segment": 32, "memory": 256, "neighbours": 8, "gate": 2.0},
    ),
    "favor": ("favor", {"features": 64}),
    "linear": ("linear", {}),
    "long_short": ("long_short", {"segment": 16, "rank": 1, "window": 32}),
    "segment": ("segment", {"segment": 16}),
    "hierarchical": ("hierarchical", {"block": 16}),
    "infini": ("infini", {"segment": 32}),
}


class Batch(NamedTuple):
    """``keys`` and ``values`` [B LENGTH]; a value of `VALUES` is a question, one more a blank.
    ``answers`` [B QUESTIONS]."""

    keys: jax.Array
    values: jax.Array
    answers: jax.Array


def draw(key: jax.Array, batch: int) -> Batch:
    ordered, valued, asked = jax.random.split(key, 3)
    every = jnp.broadcast_to(jnp.arange(FACTS), (batch, FACTS))
    facts = jax.random.permutation(ordered, every, axis=1, independent=True)
    values = jax.random.randint(valued, (batch, FACTS), 0, VALUES)
    places = jax.random.randint(asked, (batch, QUESTIONS), 0, FACTS)
    blank = jnp.zeros((batch, BLANKS), jnp.int32)
    return Batch(
        jnp.concatenate([facts, blank + FACTS, jnp.take_along_axis(facts, places, 1)], 1),
        jnp.concatenate([values, blank + VALUES + 1, places * 0 + VALUES], 1),
        jnp.take_along_axis(values, places, 1),
    )


class Recall(nn.Module):
    """A `Batch` to logits of the values of its questions, and what the mechanism returns beside."""

    mechanism: Mechanism

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[jax.Array, Any]:
        embed = partial(nn.Embed, features=SIZES.width, embedding_init=nn.initializers.normal(1.0))
        x = embed(FACTS + 1, name="keys")(batch.keys)
        x += embed(VALUES + 2, name="values")(batch.values)
        x = nn.RMSNorm()(x)
        pos = jnp.broadcast_to(jnp.arange(LENGTH), batch.keys.shape)
        nowhere = positions.get("none")()
        attention = Attention(SIZES, self.mechanism, nowhere, Exponential(), name="attention")
        out, _, aux = attention(x, pos, pos * 0, None, None, None, ())
        return nn.Dense(VALUES)(nn.RMSNorm()(out[:, -QUESTIONS:])), aux or {}


Draw = Callable[[jax.Array, int], Batch]


@partial(jax.jit, static_argnums=(0, 1))
def measure(model: Recall, draw: Draw, key: jax.Array) -> jax.Array:
    """The share of answers that are right after `STEPS` steps of Adam on what ``draw`` asks."""
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS, 0.1))
    start, batches, tested = jax.random.split(key, 3)
    params = model.init(start, draw(start, BATCH))["params"]

    def loss(params, batch, key):
        logits, aux = model.apply({"params": params}, batch, rngs={"attention": key})
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.answers).mean()
        return nll + aux.get("loss", 0.0), aux.get(KEY)

    def step(carry, key):
        params, state = carry
        content, draws = jax.random.split(key)
        grads, statistics = jax.grad(loss, has_aux=True)(params, draw(content, BATCH), draws)
        updates, state = optimizer.update(grads, state)
        return (measured(optax.apply_updates(params, updates), statistics), state), None

    keys = jax.random.split(batches, STEPS)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    batch = draw(tested, TESTED)
    logits, _ = model.apply({"params": params}, batch)
    return jnp.mean(jnp.argmax(logits, -1) == batch.answers)


def measured(params: Any, statistics: Any) -> Any:
    """The parameters with what the mechanism measured in place of what it measured before."""
    if statistics is None:
        return params
    inner = {**params["attention"]["mechanism"], KEY: statistics}
    return {**params, "attention": {**params["attention"], "mechanism": inner}}


def measure_all(
    labels: Sequence[str] = tuple(MECHANISMS), draw: Draw = draw, seed: int = 0
) -> Iterator[tuple[str, float]]:
    """The share of answers that are right, mechanism by mechanism."""
    for label in labels:
        name, options = MECHANISMS[label]
        model = Recall(mechanisms.get(name)(**options))
        yield label, round(float(np.asarray(measure(model, draw, jax.random.key(seed)))), 4)
