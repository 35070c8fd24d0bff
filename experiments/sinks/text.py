"""Small language models, every row of which begins with the mark between documents."""

from collections.abc import Iterator
from typing import Any, NamedTuple

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


class Kind(NamedTuple):
    """What is trained, and the steps after which its heads are looked into."""

    sizes: dict[str, Any]
    looked_at: tuple[int, ...]


KINDS = {
    "bytes": Kind(
        {
            "task.corpus": "kjv",
            "task.length": 64,
            "task.batch": 16,
            "model.width": 64,
            "model.layers": 4,
            "model.qk_norm": False,
            "optimizer.learning_rate": 6e-3,
            "optimizer.warmup": 100,
            "train.steps": 1600,
        },
        (0, 100, 200, 400, 800, 1200, 1600),
    ),
    "subwords": Kind(
        {
            "task.corpus": "pysource",
            "task.tokenizer": "bpe:4096",
            "task.length": 256,
            "task.batch": 16,
            "model.width": 192,
            "model.layers": 6,
            "model.heads": 3,
            "model.kv_heads": 3,
            "model.qk_norm": False,
            "optimizer.learning_rate": 3e-3,
            "optimizer.warmup": 100,
            "optimizer.weight_decay": 0.5,
            "train.steps": 3000,
        },
        tuple(range(0, 3001, 100)),
    ),
}
LENGTH, ROWS = 64, 100  # of held-out text that is looked at, as much as in the paper


def config_of(kind: str, normaliser: str, seed: int) -> ConfigDict:
    config = base("softmax", "rope", normaliser=normaliser)
    for path, value in (KINDS[kind].sizes | {"seed": seed}).items():
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
    cutting = cut(task.documents("validation"), task.boundary, LENGTH, ROWS, ROWS)
    heads = measure_sinks(model, params, [begun(batch, task) for batch in cutting])
    names = "sink", "sink_by_weight", "share", "weight"
    mean = {name: float(np.mean([head[name] for head in heads])) for name in names}
    return {
        "sink": round(100 * mean["sink"], 2),
        "sink_by_weight": round(100 * mean["sink_by_weight"], 2),
        "share": round(mean["share"], 4),
        "weight": round(mean["weight"], 4),
        "largest share of a head": round(max(head["share"] for head in heads), 4),
        "largest weight of a head": round(max(head["weight"] for head in heads), 4),
    }


def curve(normaliser: str, seed: int, kind: str) -> Iterator[dict[str, Any]]:
    """What is seen in the heads of a model while it learns, and the loss of the step before, in
    bits."""
    config, looked_at = config_of(kind, normaliser, seed), KINDS[kind].looked_at
    task: Any = tasks.build(config.task, seed=config.seed)
    model = model_of(config, task.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(model, optimizer, config)
    step = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    bits = None
    for number in range(config.train.steps + 1):
        if number in looked_at:
            yield {"step": number} | look(model, state.params, task) | {"bits": bits}
        if number < config.train.steps:
            state, metrics = step(state, begun(task.batch(number), task))
            if number + 1 in looked_at:
                bits = round(float(metrics["loss"]) / float(np.log(2)), 3)
