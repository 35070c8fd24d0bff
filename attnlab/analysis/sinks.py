"""Attention sinks: keys to which most queries give weight, whatever they ask for.

    α_k = mean over the queries i that see key k of p_ik,    Sink_k = mean over rows of [α_k > ε]

Of weights whose rows do not sum to one, shares s_ik = p_ik / Σ_j p_ij are looked at as well. Equal
weights have α_1 = (1 + 1/2 + ... + 1/T) / T in a causal row of T tokens, which is 0.074 at T = 64:
α depends on T. Source: Gu et al., arXiv 2410.10781, who take T = 64 and ε = 0.3.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.analysis.observed import Observed, observe
from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines.tiling import cut
from attnlab.model import Transformer

EPSILON = 0.3
LOGITS_IN_FLIGHT = 2**22
"""Logits of one tile of queries."""


class Importance(NamedTuple):
    """α of every key, f32 [B H M], 0 where no query sees it: ``weight`` of the weights themselves,
    ``share`` of rows divided by their sums; ``pos``, ``seg`` [B M] are those of the keys, which a
    rule that looks at whole rows has ordered."""

    weight: Array
    share: Array
    pos: Array
    seg: Array


@partial(jax.jit, static_argnames=("tile",))
def importance(queries: Queries, keys: Keys, rule: Rule, *, tile: int | None = None) -> Importance:
    """The `Importance` of ``keys`` under the weights that ``rule`` gives ``queries``.

    Values and taps play no part. ``tile`` bounds the queries that are met at once (chosen by shape
    when None). Cost: O(N M D) time, O(N + tile M) memory.
    """
    queries, keys = queries.cleared(), keys.cleared()
    if rule.position.whole:
        keys, _ = keys.ordered()
    B, N, H, _ = queries.q.shape
    M = keys.k.shape[1]
    size = min(N, tile or max(1, LOGITS_IN_FLIGHT // (B * H * M)))
    k = rule.rotate(keys.k, keys.pos, "key").swapaxes(1, 2)
    q = cut(rule.rotate(queries.q, queries.pos, "query"), size, 0).swapaxes(2, 3)
    asking = q, cut(queries.pos, size, 0), cut(queries.seg, size, -1)

    def step(sums: tuple[Array, ...], asking: tuple[Array, ...]) -> tuple[Any, None]:
        q, pos, seg = asking
        seen = rule.visible(pos, seg, keys.pos, keys.seg)[:, None]
        z = jnp.where(seen, rule.rows(q, k, seen, pos, keys.pos), MASK)
        p = rule.weights(z, seen)
        total = jnp.sum(p, -1, keepdims=True)
        found = p, p / jnp.where(total > 0, total, 1.0), seen
        return tuple(a + jnp.sum(b, 2) for a, b in zip(sums, found)), None

    zero = jnp.zeros((B, H, M))
    (weight, share, count), _ = lax.scan(step, (zero, zero, zero[:, :1]), asking)
    count = jnp.maximum(count, 1)
    return Importance(weight / count, share / count, keys.pos, keys.seg)


def measure_sinks(
    model: Transformer,
    params: Any,
    batches: Iterable[dict[str, Any]],
    epsilon: float = EPSILON,
    position: int = 0,
) -> list[dict[str, Any]]:
    """A row for each layer and head: over how many rows of text, the mean α of the key at
    ``position`` of a document, ``weight`` and ``share``, and the share of rows whose α is above
    ``epsilon``: ``sink`` by shares, ``sink_by_weight``. ``batches`` hold ``tokens``, ``pos`` and
    ``seg`` [B N]. Cost: a forward pass, with a second look at every logit.
    """
    seeing = observe(model, importance)
    found: list[list[Importance]] = [[] for _ in model.mechanisms]
    for batch in batches:
        for own, each in zip(found, _importances(seeing, params, batch)):
            own.append(jax.device_get(each))
    return [
        {"layer": layer, "keys": Observed(model.mechanisms[layer]).over} | row
        for layer, own in enumerate(found)
        for row in _describe(own, epsilon, position)
    ]


@partial(jax.jit, static_argnums=0)
def _importances(model: Transformer, params: Any, batch: dict[str, Array]) -> list[Importance]:
    out: Any = model.apply({"params": params}, batch["tokens"], batch["pos"], batch["seg"])
    return [aux["observed"] for aux in out[1].aux]


def _describe(found: list[Importance], epsilon: float, position: int) -> list[dict[str, Any]]:
    """A row for each head, over all keys at ``position``."""
    here = [np.asarray((z.pos == position) & (z.seg >= 0)) for z in found]
    weight, share = (
        np.concatenate([np.moveaxis(np.asarray(z[i]), 1, -1)[at] for z, at in zip(found, here)])
        for i in (0, 1)
    )
    return [
        {
            "head": head,
            "rows": len(share),
            "weight": float(weight[:, head].mean()),
            "share": float(share[:, head].mean()),
            "sink": float((share[:, head] > epsilon).mean()),
            "sink_by_weight": float((weight[:, head] > epsilon).mean()),
        }
        for head in range(share.shape[1])
    ]
