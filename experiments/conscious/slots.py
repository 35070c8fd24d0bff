"""Rows of named slots, each with a bit, and a model that reads a few of them to answer."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.core import Array, Keys, Mechanism, Queries, Rule

WIDTH, HIDDEN = 32, 64


def draw(key: Array, rows: int, slots: int, agree: Array) -> tuple[Array, Array, Array]:
    """Bits [B n], the two slots that are named [B 2], and the exclusive or of their bits [B]. The
    bits of all other slots are the answer with probability ``agree``."""
    keys = jax.random.split(key, 4)
    first = jax.random.randint(keys[0], (rows, 1), 0, slots)
    other = first + jax.random.randint(keys[1], (rows, 1), 1, slots)
    named = jnp.concatenate([first, other % slots], 1)
    own = jax.random.bernoulli(keys[2], shape=(rows, 2)).astype(jnp.int32)
    answer = own[:, 0] ^ own[:, 1]
    agrees = jax.random.bernoulli(keys[3], agree, (rows, slots))
    bits = jnp.where(agrees, answer[:, None], 1 - answer[:, None])
    return bits.at[jnp.arange(rows)[:, None], named].set(own), named, answer


def init(key: Array, slots: int, tied: Array | bool) -> dict[str, Array]:
    """Names of slots, vectors of the two bits, three projections, and a network of one hidden
    layer that answers. Where ``tied``, keys start projected as queries are: a name then asks for
    its own slot before anything is learnt."""
    shapes = {
        "names": (slots, WIDTH),
        "bits": (2, WIDTH),
        "query": (WIDTH, WIDTH),
        "key": (WIDTH, WIDTH),
        "value": (WIDTH, WIDTH),
        "hidden": (WIDTH, HIDDEN),
        "answer": (HIDDEN, 1),
    }
    keys = jax.random.split(key, len(shapes))
    params = {
        name: jax.random.normal(k, shape) * (1 if name in ("names", "bits") else shape[0] ** -0.5)
        for k, (name, shape) in zip(keys, shapes.items())
    }
    first = jnp.where(tied, params["query"], params["key"])
    return params | {"key": first, "offset": jnp.zeros(HIDDEN)}


def read(
    params: dict[str, Any], mechanism: Mechanism, bits: Array, asked: Array
) -> tuple[Array, Array]:
    """What one head reads of the slots for the queries ``asked`` [B WIDTH]: [B WIDTH], and the
    weights [B n], which are read off values that say which slot they are.

    A slot is its name plus the vector of its bit; both are projected before they are added.
    """
    B, n = bits.shape

    def project(name: str) -> Array:
        names, of_bits = (params[part] @ params[name] for part in ("names", "bits"))
        return names + of_bits[bits]

    marks = jnp.broadcast_to(jnp.eye(n), (B, n, n))
    values = jnp.concatenate([project("value"), marks], -1)
    pos = jnp.broadcast_to(jnp.arange(n), (B, n))
    keys = Keys(project("key")[:, :, None], values[:, :, None], pos, 0 * pos)
    q = (asked @ params["query"])[:, None, None]
    out = mechanism({}, Queries(q, pos[:, :1], 0 * pos[:, :1]), keys, Rule(causal=False)).out
    return out[:, 0, 0, :WIDTH], out[:, 0, 0, WIDTH:]


def answer(params: dict[str, Any], found: Array) -> Array:
    """The logit of the answer [B] from what was read [B WIDTH]."""
    hidden = jax.nn.relu(found @ params["hidden"] + params["offset"])
    return (hidden @ params["answer"])[:, 0]
