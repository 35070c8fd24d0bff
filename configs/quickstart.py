"""The first run: a small model, a few minutes on a laptop, and no network if there is none.

attnlab train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from attnlab.config import base, parse_arg


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, attention="softmax", position="rope")
    config = base(chosen.attention, chosen.position)
    config.task.fallback = "pysource"
    config.task.length = 256
    config.model.width = 128
    config.model.layers = 4
    config.train.steps = 300
    config.train.eval_every = 100
    config.train.save_every = 100
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup = 30
    return config
