"""How the attention of every layer and head spreads while a run learns, as scalars of its metrics.

``train.dilution_every`` asks for them. They are means over the queries that have the most keys in
sight (the last bucket of `measure_layers`) in one batch of held-out windows, always the same.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from attnlab.analysis.observed import by_head, cut, measure_layers
from attnlab.errors import DataError
from attnlab.model import Transformer
from attnlab.sharding import put, spread

LOGGED = ("entropy", "support", "evenness", "participation", "largest", "leading", "sink")
KEY = "dilution/{name}/layer{layer}_head{head}"
FORM = re.compile(r"dilution/(\w+)/layer(\d+)_head(\d+)")


def measure_spread(
    model: Transformer, params: Any, task: Any, config: ConfigDict, sharding: NamedSharding
) -> dict[str, float]:
    """`KEY` -> mean, for every one of `LOGGED`, layer and head. Every process must call.

    Cost: a forward pass of ``evaluate.batch`` windows of the training length, with a second look at
    every logit. Raises `DataError` for an empty validation split.
    """
    batch, share = spread(config.evaluate.batch, sharding)
    documents = task.documents("validation")
    rows = measure_layers(
        model,
        params,
        (
            put({name: z[share] for name, z in arrays.items()}, sharding)
            for arrays in cut(documents, task.boundary, config.task.length, batch, batch)
        ),
        sharding,
    )
    if not rows:
        raise DataError("nothing to look at: the validation split is empty")
    return {
        KEY.format(name=name, layer=layer, head=head): float(value)
        for name in LOGGED
        for (layer, head), value in np.ndenumerate(by_head(rows, name))
    }


def history(metrics: Iterable[Mapping[str, Any]], name: str) -> dict[int, dict[int, list[float]]]:
    """Layer -> step -> the values of its heads, of one of `LOGGED` in rows of metrics.jsonl."""
    found: dict[int, dict[int, list[float]]] = {}
    for row in metrics:
        for key, value in row.items():
            match = FORM.fullmatch(key)
            if match and match[1] == name:
                found.setdefault(int(match[2]), {}).setdefault(row["step"], []).append(value)
    return found
