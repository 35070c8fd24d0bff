"""Attention over a window, on a sequence that lies on several devices: only the reach is fetched.

A device asks the ones before it for the window − 1 tokens that precede its own, from as many of
them as that takes, and without an order of time those behind it for as many. Sinks are few: each
device shows the first tokens of the document that is open at its end to all, who take those that
the window has not brought.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array, Keys, Queries, Rule
from attnlab.engines import blockwise, report_use, ring, sharded
from attnlab.engines.sharded import SEQUENCE
from attnlab.engines.undecayed import latest_document


def attend(
    queries: Queries, keys: Keys, rule: Rule, tile: int, window: int, sinks: int = 0
) -> tuple[Array, Array]:
    """`blockwise.attend` for a rule that shows keys at a distance below ``window`` and the first
    ``sinks`` of each document, with the tokens split along the mesh axis ``seq`` if there is one.

    Shapes as there. Tokens must be in order, without empty slots inside a document. Taps on whole
    logits are served by `blockwise`, sinks without an order of time by `ring`. Cost on each of P
    devices: its share of the pairs, O(N / P + window + P sinks) memory; it receives window + P
    sinks keys and values.
    """
    N, M = queries.pos.shape[1], keys.pos.shape[1]
    devices = sharded.count(N) if N == M else 1
    if devices == 1 or rule.observed:
        return blockwise.attend(queries, keys, rule, tile)
    if sinks and not rule.causal:
        return ring.attend(queries, keys, rule, tile)
    report_use("neighbours", f"{devices} devices")
    form = partial(_attend, devices, tile, window - 1, sinks)
    return sharded.attend(form, queries, keys._replace(unit=None), rule)


def _attend(
    devices: int, tile: int, reach: int, sinks: int, queries: Queries, keys: Keys, rule: Rule
) -> tuple[Array, Array]:
    length, seen = keys.pos.shape[1], [keys]
    for hop in range(1, devices):
        size = min(length, reach - (hop - 1) * length)
        if size <= 0:
            break
        seen.insert(0, _fetched(_cut(keys, -size, None), hop, devices))
        if not rule.causal:
            seen.append(_fetched(_cut(keys, 0, size), -hop, devices))
    if sinks:
        seen.append(_first(keys, sinks, reach))
    near = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *seen)
    return blockwise.attend(queries, near, rule, tile)


def _cut(keys: Keys, start: int, stop: int | None) -> Keys:
    return jax.tree.map(lambda z: z[:, start:stop], keys)


def _fetched(keys: Keys, hop: int, devices: int) -> Keys:
    """Those of the device ``hop`` places before this one; empty slots where there is none."""
    places = [(i, i + hop) for i in range(devices) if 0 <= i + hop < devices]
    shifted = keys._replace(seg=keys.seg + 1)  # what nobody sends is 0
    found = lax.ppermute(shifted, SEQUENCE, places)
    return found._replace(seg=found.seg - 1)


def _first(keys: Keys, sinks: int, reach: int) -> Keys:
    """The first tokens of the documents that are open at the ends of the devices before this one,
    without those that are within reach of its own tokens."""
    length, me = keys.pos.shape[1], lax.axis_index(SEQUENCE)
    latest, _ = latest_document(keys.seg, jnp.full(keys.seg.shape[0], -1, jnp.int32))
    wanted = (keys.seg == latest[:, None]) & (keys.seg >= 0) & (keys.pos < sinks)
    rank, slots = lax.top_k(jnp.where(wanted, sinks - keys.pos, 0), min(sinks, length))

    def chosen(z: Array) -> Array:
        return jnp.take_along_axis(z, slots.reshape(slots.shape + (1,) * (z.ndim - 2)), 1)

    some = jax.tree.map(chosen, keys)
    some = some._replace(seg=jnp.where(rank > 0, some.seg, -1))
    some, index = lax.all_gather((some, slots + me * length), SEQUENCE, axis=1, tiled=True)
    far = index < me * length - reach
    return some._replace(seg=jnp.where(far, some.seg, -1))
