"""What routed heads find where windows do not reach: a passkey, asked for at the end of a row."""

import time
from typing import Any

from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.answers import score_answers
from attnlab.config import base
from attnlab.growing import train_growing
from attnlab.overrides import override

GROWTH = ((16, 100), (32, 100), (64, 200), (128, 600))
TOKENS, ROWS = 4096, 1024  # of a batch; of the test
SEEN = 16
"""Tokens that any head sees: a window, or a cluster of eight. Two layers of windows reach 31."""


def shrunk(twin: ConfigDict) -> ConfigDict:
    """Two layers of ``twin``, an eighth as long, that learn `needle`."""
    config = ConfigDict({**twin.to_dict(), "task": base(task="needle").task.to_dict()})
    fields = {"model.layers": 2, "position.max_distance": 2 * SEEN}
    if config.attention.name == "window":
        fields |= {"attention.window": SEEN}
    else:
        fields |= {"attention.window.window": SEEN, "attention.routing.length": SEEN}
    for path, value in fields.items():
        override(config, path, str(value))
    return config


def find(twin: ConfigDict) -> dict[str, Any]:
    """How often the passkey is named, by where it stands, and the loss on the way."""
    begun, config = time.process_time(), shrunk(twin)
    model, params, curve = train_growing(config, GROWTH, TOKENS)
    task: Any = tasks.build(config.task, seed=config.seed)
    rows = ROWS * config.task.length
    found = score_answers(model, params, task, config, "test", config.train.steps, tokens=rows)
    kept = ("accuracy", "accuracy_95", "asked", "by_depth")
    seconds = round(time.process_time() - begun)
    return {key: found[key] for key in kept} | {"curve": curve, "processor_seconds": seconds}
