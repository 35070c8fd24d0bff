"""A small language model of bytes, every row of which begins with the mark between documents."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.analysis.observed import cut
from attnlab.analysis.sinks import measure_sinks
from attnlab.config import base, model_of
from attnlab.optimizer import make_optimizer
from attnlab.overrides import override
from attnlab.step import init_state, make_step

SIZES = {
    "task.corpus": "kjv",
    "task.length": 64,
    "task.batch": 16,
    "model.width": 64,
    "model.layers": 4,
    "model.qk_norm": False,
    "optimizer.learning_rate": 6e-3,
    "optimizer.warmup": 100,
    "train.steps": 1600,
}
LOOKED_AT = (0, 100, 200, 400, 800, 1200, 1600)
"""Steps after which heads are looked into."""
ROWS = 100  # windows of held-out text that are looked at, as many as in the paper


def config_of(normaliser: str, seed: int) -> ConfigDict:
    config = base("softmax", "rope", normaliser=normaliser)
    for path, value in (SIZES | {"seed": seed}).items():
        override(config, path, str(value))
    return config


def begun(batch: dict[str, Any], task: Any) -> dict[str, Any]:
    """The batch with the mark as first token of every row: the same token for all, which is what
    makes most of a sink in the paper."""
    tokens = np.array(batch["tokens"])
    tokens[:, 0] = task.boundary
    return {**batch, "tokens": tokens}


def look(model: Any, params: Any, task: Any) -> dict[str, float]:
    """Means over all heads; sinks in per cent of rows."""
    cutting = cut(task.documents("validation"), task.boundary, SIZES["task.length"], ROWS, ROWS)
    heads = measure_sinks(model, params, [begun(batch, task) for batch in cutting])
    mean = {name: float(np.mean([head[name] for head in heads])) for name in ("sink", "share")}
    most = max(head["share"] for head in heads)
    return {
        "sink": round(100 * mean["sink"], 2),
        "share": round(mean["share"], 4),
        "largest share of a head": round(most, 4),
    }


def curve(normaliser: str, seed: int) -> Iterator[dict[str, Any]]:
    """What is seen after each of `LOOKED_AT` steps, and the loss of the step before, in bits."""
    config = config_of(normaliser, seed)
    task: Any = tasks.build(config.task, seed=config.seed)
    model = model_of(config, task.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(model, optimizer, config)
    step = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    bits = None
    for number in range(config.train.steps + 1):
        if number in LOOKED_AT:
            yield {"step": number} | look(model, state.params, task) | {"bits": bits}
        if number < config.train.steps:
            state, metrics = step(state, begun(task.batch(number), task))
            if number + 1 in LOOKED_AT:
                bits = round(float(metrics["loss"]) / float(np.log(2)), 3)
