"""In-context linear regression: how near a small model comes to least squares, example by example.

attnlab train --config=configs/regression.py:attention=softmax --workdir=runs/regression

Maps of 5 numbers, 41 examples a row, each y with noise of deviation 0.1. What the last one can be
predicted with from the 40 before it: 1.01 by 0, 0.0115 by ridge, which nothing beats.

Keys after the colon: attention (``a+b`` alternates over the layers), position, examples, width.
"""

from attnlab.config import base, parse_arg


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, attention="softmax", position="absolute", examples=41, width=64)
    config = base(chosen.attention, chosen.position, task="regression")
    config.task.length = 2 * chosen.examples
    config.task.batch = 64
    config.model.width = chosen.width
    config.model.layers = 4
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.0
    config.train.steps = 2000
    config.train.eval_every = 200
    config.train.save_every = 500
    config.evaluate.tokens = 2**15
    config.evaluate.batch = 64
    return config
