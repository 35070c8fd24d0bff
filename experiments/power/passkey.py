"""Models that look for a passkey anywhere in a row, from short rows to long ones."""

import time
from typing import Any

from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.answers import score_answers
from attnlab.config import base
from attnlab.growing import train_growing
from attnlab.overrides import override

GROWTH = ((16, 200), (32, 100), (64, 100), (128, 200))
"""Tokens of a row and steps with rows of so many: with 128 from the start nothing was learnt in 440
steps."""
TOKENS = 4096  # a batch
ROWS = 1024  # of the test
SIZES = {
    "model.width": 64,
    "model.layers": 6,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.tied": False,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup": 50,
}


def config_of(name: str, options: dict[str, int]) -> ConfigDict:
    config = base(name, "rope", task="needle")
    fields = {f"attention.{field}": value for field, value in options.items()}
    for path, value in (SIZES | fields).items():
        override(config, path, str(value))
    return config


def find(name: str, options: dict[str, int]) -> dict[str, Any]:
    """How often the passkey of a longest row is named, by where it stands, and the mean loss of the
    last batch of each length, in nats an answer."""
    begun, config = time.process_time(), config_of(name, options)
    model, params, curve = train_growing(config, GROWTH, TOKENS)
    task: Any = tasks.build(config.task, seed=config.seed)
    rows = ROWS * config.task.length
    found = score_answers(model, params, task, config, "test", config.train.steps, tokens=rows)
    kept = ("accuracy", "accuracy_95", "asked", "by_depth")
    losses = {str(length): loss for _, length, loss in curve}
    seconds = round(time.process_time() - begun)
    return {key: found[key] for key in kept} | {"losses": losses, "processor_seconds": seconds}
