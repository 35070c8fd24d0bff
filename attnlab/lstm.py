"""The LSTM, a recurrence of fixed size, and its pass over a row.

    i, f, g, o = x W + h U + b,   c' = σ(f) c + σ(i) tanh(g),   h' = σ(o) tanh(c')

x [B I], h and c [B E], W [I 4E], U [E 4E], b [4E], all f32. Cost: O(E (E + I)) a token.
Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000 for f, whose bias begins at 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core import Array


class State(NamedTuple):
    """``h``, the output, and ``c``, the cell: f32 [B E]."""

    h: Array
    c: Array


def init(key: Array, inputs: int, width: int) -> dict[str, Array]:
    """Fresh parameters for ``inputs`` I and ``width`` E."""
    above, beside = jax.random.split(key)
    return {
        "input_kernel": jax.random.normal(above, (inputs, 4 * width)) * inputs**-0.5,
        "kernel": jax.random.normal(beside, (width, 4 * width)) * width**-0.5,
        "bias": jnp.zeros(4 * width).at[width : 2 * width].set(1.0),
    }


def advance(params: Any, state: State, x: Array) -> State:
    """The state after one token x [B I]."""
    gates = x @ params["input_kernel"] + state.h @ params["kernel"] + params["bias"]
    i, f, g, o = jnp.split(gates, 4, -1)
    c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return State(jax.nn.sigmoid(o) * jnp.tanh(c), c)


def read(params: Any, x: Array, full: Array) -> tuple[Array, State]:
    """Outputs [B N E] and the last state of a pass over x [B N I] from zero on. Tokens that are not
    ``full`` [B N] leave the state as it is."""
    width = params["kernel"].shape[0]
    zero = jnp.zeros((x.shape[0], width), jnp.float32)

    def step(state: State, token: tuple[Array, Array]) -> tuple[State, Array]:
        x, full = token
        new = advance(params, state, x)
        state = jax.tree.map(lambda a, b: jnp.where(full[:, None], a, b), new, state)
        return state, state.h

    state, out = jax.lax.scan(step, State(zero, zero), (x.swapaxes(0, 1), full.T))
    return out.swapaxes(0, 1), state
