"""Recurrences over a sequence that lies on several devices: states are passed, tokens stay.

A recurrence is linear in its state: through the tokens of a device, S becomes T S + U, where U is
the state that its tokens leave by themselves. All devices exchange these (T, U), each folds those
before its own into the state that its first token meets, and then reads its tokens as on one
device. A state is that of one document: T is 0 where another one has begun.
Source: Blelloch, 1990 (CMU-CS-90-190), with one scan step a device; of attention, Sun et al.,
arXiv 2404.02882.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from attnlab.core import Array
from attnlab.engines import report_use, sharded
from attnlab.engines.sharded import SEQUENCE

State = tuple[Array, Array]
"""Memory [B G D E] and the document [B] it is of, < 0 for none."""


def attend(
    engine: Callable[[Any, Array, State], tuple[Array, Any]],
    summarise: Callable[[Any, Array], tuple[State, Any]],
    move: Callable[[Any, Array], Array],
    tokens: Any,
    seg: Array,
    heads: tuple[int, int],
) -> tuple[Array, State]:
    """``engine`` (tokens, seg, state) -> (out, state after), from no state, with the tokens split
    along the mesh axis ``seq``.

    ``tokens`` are arrays [B N heads ...], ``heads`` the two numbers of heads among them.
    ``summarise`` (tokens, seg) -> (U, T) of what a device holds, and ``move`` (T, S) is T S.
    Returns ``out`` [B N H E] and the state after the last token. Cost on each of P devices: that
    of ``summarise`` and ``engine`` for its own tokens; it receives P states.
    """
    report_use("passing", f"{sharded.count(seg.shape[1])} devices")
    at = sharded.layout(seg.shape[0], *heads)

    def own(tokens: Any, seg: Array) -> tuple[Array, State]:
        states, factors = lax.all_gather(summarise(tokens, seg), SEQUENCE)
        befores, after = _folded(states, factors, move)
        me = lax.axis_index(SEQUENCE)
        before = jax.tree.map(lambda z: lax.dynamic_index_in_dim(z, me, 0, False), befores)
        return engine(tokens, seg, before)[0], after

    after = P(at.rows, at.heads), P(at.rows)
    specs = at.of_tokens(tokens), P(at.rows, SEQUENCE)
    spread = sharded.across(own, specs, (P(at.rows, SEQUENCE, at.heads), after))
    return spread(tokens, seg)


def _folded(states: State, factors: Any, move: Callable) -> tuple[State, State]:
    """The states before the tokens of each device, stacked, and the one after the last."""

    def step(before: State, part: tuple[State, Any]) -> tuple[State, State]:
        (memory, seg), ((added, latest), factor) = before, part
        empty = latest < 0
        same = ((latest == seg) | empty)[:, None, None, None]
        memory = jnp.where(same, move(factor, memory), 0) + added
        return (memory, jnp.where(empty, seg, latest)), before

    memory, seg = states
    nothing = jnp.zeros_like(memory[0]), jnp.full_like(seg[0], -1)
    after, before = lax.scan(step, nothing, (states, factors))
    return before, after
