"""Learned keys and values that every query sees, in one softmax with the tokens that it may see.

    out_i = softmax over [P; tokens that the rule shows i] of (q_i · k) v

``params`` are ``{"key": [P G D], "value": [P G E]}``, or ``{}`` for no such slots. They carry no
position: neither rotations nor biases reach them.
Source: Sukhbaatar et al., arXiv 1907.01470; Behrouz et al., 2501.00663.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.core import Array, Dims, Keys, Queries, Rule
from attnlab.engines import blockwise, matching, memory_slots, segments


def init(key: Array, dims: Dims, count: int) -> dict[str, Array]:
    """``count`` slots, of standard deviation 1."""
    if count == 0:
        return {}
    G, D, E = dims.kv_heads, dims.key_dim, dims.value_dim
    for_keys, for_values = jax.random.split(key)
    return {
        "key": jax.random.normal(for_keys, (count, G, D)),
        "value": jax.random.normal(for_values, (count, G, E)),
    }


def attend(
    params: Any, queries: Queries, keys: Keys, rule: Rule, tile: int | None = None
) -> tuple[Array, Array]:
    """``(out, lse)`` as `blockwise.attend`, but for "heads", which are not tapped. The rule must
    have a separable normaliser. Cost: O(N P (D + E)) more time."""
    if rule.observed:
        return attend_densely(params, queries, keys, rule)
    part = segments.part_of(rule)
    attended = blockwise.attend(queries, keys, part, tile)
    if not params:
        return attended
    asking, slots = _met(params, queries)
    return segments.join(attended, blockwise.attend(asking, slots, memory_slots.content(rule)))


def attend_densely(params: Any, queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
    """The same, literally: taps see the slots before the tokens [B H N P+M]."""
    part = dataclasses.replace(rule, taps=())
    met = [(part.logits(queries, keys), part.allowed(queries, keys), keys)]
    if params:
        (asking, slots), content = _met(params, queries), memory_slots.content(rule)
        met.insert(0, (content.logits(asking, slots), content.allowed(asking, slots), slots))
    out, lse, _ = matching.weigh(segments.part_of(rule), *met)
    return out.astype(queries.q.dtype), lse


def count_flops(dims: Dims, length: int, count: int) -> float:
    """Operations of the pairs with ``count`` slots."""
    return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * length * count


def _met(params: Any, queries: Queries) -> tuple[Queries, Keys]:
    """The slots as the first tokens of a document that all queries are of."""
    B = queries.pos.shape[0]
    k, v = (jnp.broadcast_to(params[z], (B, *params[z].shape)) for z in ("key", "value"))
    pos = jnp.zeros(k.shape[:2], jnp.int32)
    return queries._replace(seg=jnp.minimum(queries.seg, 0)), Keys(k, v, pos, pos)
