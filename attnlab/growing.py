"""Training in rows that grow: to look something up is learnt in minutes from short rows, where long
ones from the start teach nothing for hours."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.config import model_of
from attnlab.model import Transformer
from attnlab.optimizer import make_optimizer
from attnlab.step import init_state, make_step


class Grown(NamedTuple):
    """The trained model, and ``curve``: (step, tokens of a row, nats of that batch), every hundred
    steps and at the end of each length."""

    model: Transformer
    params: Any
    curve: list[tuple[int, int, float]]


def train_growing(config: ConfigDict, growth: Sequence[tuple[int, int]], tokens: int) -> Grown:
    """Trains on batches of ``tokens``, in rows as long as each (length, steps) of ``growth`` says,
    one after the other: `attnlab.step` with ``config``, whose task is left at the longest.

    The schedule of the optimizer is that of all steps. Rows stand alone: nothing of a batch is
    carried into the next. Raises `UserError` where the task has no rows of a length.
    """
    config.train.steps = sum(steps for _, steps in growth)
    config.task.length, config.task.batch = growth[0][0], tokens // growth[0][0]
    task: Any = tasks.build(config.task, seed=config.seed)
    model: Any = model_of(config, task.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(model, optimizer, config)
    step = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    curve, done = [], 0
    for length, steps in growth:
        config.task.length, config.task.batch = length, tokens // length
        task = tasks.build(config.task, seed=config.seed)
        for until in range(steps - 1, -1, -1):
            state, metrics = step(state, task.batch(done))
            done += 1
            if done % 100 == 0 or not until:
                curve.append((done, length, round(float(metrics["loss"]), 4)))
                print("  step {}, {} tokens: {}".format(*curve[-1]), flush=True)
    return Grown(model, state.params, curve)
