"""The statistics of every layer and head of a trained run, by the number of keys in sight."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.analysis.dilution import NAMES, Rows, measure_rows
from attnlab.core import Keys, Mechanism, Queries, Rule
from attnlab.mechanisms.block import Block, Same
from attnlab.mechanisms.fixed import Fixed
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.strided import Comb, Strided
from attnlab.mechanisms.window import Near, Window
from attnlab.model import Transformer

OWN, ALL = "its own", "all visible"
"""Over which keys: those of the mechanism, or, where those are no pattern of positions or the
weights are no softmax, all that the rule allows: what full attention would make of the same queries
and keys, which is not what the layer computes."""

STATISTICS = tuple(name for name in NAMES if name != "signal")
"""The columns that are means; nobody can say which keys matter in a text."""


def own_rule(mechanism: Mechanism, rule: Rule) -> Rule | None:
    """The rule that a mechanism attends by, if that is exact attention behind a pattern."""
    match mechanism:
        case Softmax():
            return rule
        case Window(window, sinks):
            return rule.restrict(Near(window, sinks))
        case Block(block, offset):
            return rule.restrict(Same(block, offset))
        case Strided(stride):
            return rule.restrict(Comb(stride))
        case Fixed():
            return rule.restrict(mechanism.pattern)
    return None


@dataclass(frozen=True)
class Observed(Mechanism):
    """A mechanism that also returns what ``measure`` says of its weights, from queries, keys and
    rule, as ``aux["observed"]``; see `ALL`."""

    inner: Mechanism
    measure: Callable[[Queries, Keys, Rule], Any] = measure_rows

    @property
    def over(self) -> str:
        """Which keys the weights are over: `OWN` or `ALL`."""
        return ALL if own_rule(self.inner, Rule()) is None else OWN

    def init(self, key, dims):
        return self.inner.init(key, dims)

    def initial_state(self, dims, batch, dtype=np.float32):
        return self.inner.initial_state(dims, batch, dtype)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        result = self.inner(params, queries, keys, rule, state, x=x, key=key)
        found = self.measure(queries, keys, own_rule(self.inner, rule) or rule)
        return result._replace(aux={**(result.aux or {}), "observed": found})


def observe(
    model: Transformer, measure: Callable[[Queries, Keys, Rule], Any] = measure_rows
) -> Transformer:
    """The same model, with the same parameters, whose ``aux`` holds what ``measure`` says of every
    layer, by default its `Rows`."""
    observed = (Observed(mechanism, measure) for mechanism in model.mechanisms)
    return replace(model, mechanisms=tuple(observed))


@partial(jax.jit, static_argnums=(0, 3))
def _rows(
    model: Transformer,
    params: Any,
    batch: dict[str, jax.Array],
    sharding: NamedSharding | None,
) -> list[Rows]:
    out: Any = model.apply({"params": params}, batch["tokens"], batch["pos"], batch["seg"])
    rows = [aux["observed"] for aux in out[1].aux]
    if sharding is None:
        return rows
    return jax.lax.with_sharding_constraint(rows, NamedSharding(sharding.mesh, PartitionSpec()))


def measure_layers(
    model: Transformer,
    params: Any,
    batches: Iterable[dict[str, Any]],
    sharding: NamedSharding | None = None,
) -> list[dict[str, Any]]:
    """A row for each layer, head, and number of visible keys in [low, high), doubling: the
    ``queries`` there are, and the mean over them of what `Rows` defines. ``batches`` hold
    ``tokens``, ``pos`` and ``seg`` [B N], whose rows ``sharding`` says are spread over devices.
    Cost: a forward pass, with a second look at every logit.
    """
    seeing = observe(model)
    sums: list[dict[tuple[int, int], np.ndarray]] = [{} for _ in model.mechanisms]
    for batch in batches:
        for found, rows in zip(sums, _rows(seeing, params, batch, sharding)):
            _collect(found, rows)
    keys = [Observed(mechanism).over for mechanism in model.mechanisms]
    return [
        _describe(layer, place, total, keys[layer])
        for layer, found in enumerate(sums)
        for place, total in sorted(found.items())
    ]


def _collect(found: dict[tuple[int, int], np.ndarray], rows: Rows) -> None:
    """Adds up the statistics of a batch by (head, ⌊log2 n⌋)."""
    visible, named = np.asarray(rows.visible), rows.named()
    values = np.stack([np.ones(visible.shape), *(named[name] for name in STATISTICS)])
    values = values.astype(np.float64)
    for head in range(visible.shape[1]):
        size = np.log2(np.maximum(visible[:, head], 1)).astype(int)
        for bucket in np.unique(size[visible[:, head] > 0]):
            at = (size == bucket) & (visible[:, head] > 0)
            total = values[:, :, head][:, at].sum(1)
            found[head, int(bucket)] = found.get((head, int(bucket)), 0.0) + total


def _describe(layer: int, place: tuple[int, int], total: np.ndarray, keys: str) -> dict[str, Any]:
    head, bucket = place
    count, *values = total.tolist()
    return {
        "layer": layer,
        "head": head,
        "keys": keys,
        "low": 2**bucket,
        "high": 2 ** (bucket + 1),
        "queries": int(count),
        **{name: value / count for name, value in zip(STATISTICS, values)},
    }


def cut(documents: Iterable[Any], boundary: int, length: int, windows: int, batch: int) -> Iterator:
    """The first ``windows`` windows of ``length`` tokens of held-out documents, side by side, as
    batches of ``tokens``, ``pos``, ``seg`` [batch length]."""
    from attnlab.windows import side_by_side, stack

    lines = (
        (number, np.concatenate([[boundary], document.tokens, [boundary]]).astype(np.int32))
        for number, document in enumerate(documents)
    )
    for chunk in side_by_side(lines, length, length, batch):
        arrays = stack(chunk[:windows], length, batch, False)
        yield {name: arrays[name] for name in ("tokens", "pos", "seg")}
        windows -= len(chunk)
        if windows <= 0:
            return


def by_head(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """[layers, heads]: a statistic where the most keys are in sight."""
    shape = [1 + max(row[key] for row in rows) for key in ("layer", "head")]
    table = np.full(shape, np.nan)
    for row in rows:  # in ascending order of the keys in sight
        table[row["layer"], row["head"]] = row[name]
    return table


def by_layer(rows: Sequence[dict[str, Any]], name: str) -> dict[int, list[tuple[float, float]]]:
    """Layer -> (mean n, mean over heads of a statistic) for each bucket of n."""
    found: dict[int, dict[int, list[dict]]] = {}
    for row in rows:
        found.setdefault(row["layer"], {}).setdefault(row["low"], []).append(row)
    return {
        layer: [(_mean(heads, "visible"), _mean(heads, name)) for heads in buckets.values()]
        for layer, buckets in found.items()
    }


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))
