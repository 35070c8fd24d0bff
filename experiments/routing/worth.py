"""What a fourth head is worth beside three that look nearby, by what it sees, in a small model."""

import copy
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from attnlab.config import base
from attnlab.overrides import override


class Fourth(NamedTuple):
    """The options of `routing`, or another mechanism; what the others see, steps and seeds."""

    options: dict[str, int]
    mechanism: str = "routing"
    window: int = 16
    steps: int = 1000
    seeds: tuple[int, ...] = (0, 1)


CLUSTERS = {"clusters": 8, "length": 64}
FOURTH = {
    "window": Fourth({}, "window"),
    "softmax": Fourth({}, "softmax"),
    "one cluster of 512": Fourth({"clusters": 1, "length": 512}),
    "8 clusters of 64": Fourth(CLUSTERS),
    "32 clusters of 16": Fourth({"clusters": 32, "length": 16}),
    "window of 64, 3000 steps": Fourth({}, "window", 64, 3000, (0,)),
    "8 clusters of 64, windows of 64, 3000 steps": Fourth(CLUSTERS, "routing", 64, 3000, (0,)),
}
"""By what the fourth head of both layers is."""
SIZES = {
    "model.layers": 2,
    "model.width": 128,
    "model.mlp_width": 336,
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.qk_norm": False,
    "position.max_distance": 512,
    "task.corpus": "sympy",
    "task.tokenizer": "bpe:1024",
    "task.length": 512,
    "task.batch": 8,
    "train.eval_every": 250,
}


def config_of(name: str, twin: ConfigDict) -> ConfigDict:
    """Of a model that learns as ``twin`` does."""
    chosen = FOURTH[name]
    alone = chosen.mechanism == "window"
    config = base("window" if alone else f"heads:window:{chosen.mechanism}", "t5")
    for part in ("task", "optimizer", "train", "evaluate", "sample"):
        config[part] = copy.deepcopy(twin[part])
    fields: dict[str, Any] = {f"attention.routing.{key}": n for key, n in chosen.options.items()}
    fields["attention.window" if alone else "attention.window.window"] = chosen.window
    if not alone:
        config.attention.sizes = (3, 1)
    for path, value in (SIZES | fields | {"train.steps": chosen.steps}).items():
        override(config, path, str(value))
    return config
