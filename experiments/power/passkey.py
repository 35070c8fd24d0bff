"""Models that look for a passkey anywhere in a row, from short rows to long ones."""

import time
from typing import Any

import jax
from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.answers import score_answers
from attnlab.config import base, model_of
from attnlab.optimizer import make_optimizer
from attnlab.overrides import override
from attnlab.step import init_state, make_step

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
    "train.steps": sum(steps for _, steps in GROWTH),
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
    task: Any = tasks.build(config.task, seed=config.seed)
    model = model_of(config, task.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(model, optimizer, config)
    step = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    losses, done = {}, 0
    for length, steps in GROWTH:
        config.task.length, config.task.batch = length, TOKENS // length
        task = tasks.build(config.task, seed=config.seed)
        for _ in range(steps):
            state, metrics = step(state, task.batch(done))
            done += 1
        losses[str(length)] = round(float(metrics["loss"]), 4)
    found = score_answers(model, state.params, task, config, "test", done, tokens=ROWS * length)
    kept = ("accuracy", "accuracy_95", "asked", "by_depth")
    seconds = round(time.process_time() - begun)
    return {key: found[key] for key in kept} | {"losses": losses, "processor_seconds": seconds}
