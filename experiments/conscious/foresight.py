"""A conscious state of few slots that learns to be told from others by what comes later."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import objective
import optax
import slots

from attnlab.core import Array, Mechanism
from attnlab.mechanisms.conscious import Conscious

NUMBER, SAID, BATCH, RATE = 12, 32, 64, 3e-3
STATE: Mechanism = Conscious(2, "straight_through")


def draw(key: Array, rows: int, lasts: Array) -> tuple[Array, Array]:
    """Bits now and later [B n]: each of them lasts with probability ``lasts`` and is otherwise
    drawn anew."""
    keys = jax.random.split(key)
    now, fresh = jax.random.bernoulli(keys[0], shape=(2, rows, NUMBER)).astype(jnp.int32)
    return now, jnp.where(jax.random.bernoulli(keys[1], lasts, (rows, NUMBER)), now, fresh)


def init(key: Array, favour: Array) -> dict[str, Array]:
    """The parameters of `slots`, a controller that asks by all bits, and the two halves of the
    verifier. ``favour`` is the logit by which the first slot is asked for whatever the bits are."""
    keys = jax.random.split(key, 4)
    params = slots.init(keys[0], NUMBER, False)
    first = params["query"] @ params["key"].T @ params["names"][0]
    always = favour * slots.WIDTH**0.5 * first / (first @ first)
    return params | {
        "controller": jax.random.normal(keys[1], (NUMBER, slots.WIDTH)) * NUMBER**-0.5,
        "always": always,
        "says": 0.03 * jax.random.normal(keys[2], (slots.WIDTH, SAID)),
        "hears": 0.03 * jax.random.normal(keys[3], (NUMBER, SAID)),
    }


def terms(params: dict[str, Any], now: Array, later: Array) -> tuple[Array, Array, Array]:
    """What the state of now says [B SAID], what is heard of the later one [B SAID], and the
    weights of the slots [B n]."""
    asked = (2.0 * now - 1) @ params["controller"] + params["always"]
    found, weights = slots.read(params, STATE, now, asked)
    return found @ params["says"], (2.0 * later - 1) @ params["hears"], weights


@partial(jax.jit, static_argnums=0)
def learn(
    steps: int, diversity: Array, lasts: Array, favour: Array, seed: Array
) -> dict[str, Array]:
    """InfoNCE and the entropy of the mean selection on fresh rows, at the start and after ``steps``
    of Adam on agreement − ``diversity`` · entropy; there is no other task."""
    optimizer = optax.adam(RATE)
    start, data, test = jax.random.split(jax.random.key(seed), 3)
    first = init(start, favour)

    def loss(params, step):
        found = terms(params, *draw(jax.random.fold_in(data, step), BATCH, lasts))
        return objective.loss(jnp.zeros(()), *found, (1.0, diversity))

    def update(carry, step):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, step), state)
        return (optax.apply_updates(params, updates), state), None

    trained = jax.lax.scan(update, (first, optimizer.init(first)), jnp.arange(steps))[0][0]

    def scored(params, prefix: str) -> dict[str, Array]:
        def one(key):
            said, heard, weights = terms(params, *draw(key, BATCH, lasts))
            return objective.agreement(said, heard), weights

        agreements, weights = jax.lax.map(one, jax.random.split(test, 32))
        entropy = objective.diversity(weights.reshape(-1, NUMBER))
        return {f"agreement {prefix}": jnp.mean(agreements), f"entropy {prefix}": entropy}

    return scored(first, "before") | scored(trained, "after")
