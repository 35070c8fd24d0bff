"""ListOps of the Long Range Arena: the value of a nested list, by a small encoder.

attnlab train --config=configs/listops.py:attention=window --workdir=runs/listops-window

Expressions of 500 to 2,000 tokens, as published; ``size=small`` has shorter and flatter ones, for a
CPU. Beside the accuracy of a run stand what can be had without looking into an inner list:
majority 17.4 %, the root operator 37.1 %, the root operator on its direct digits 48.8 %.

Keys after the colon: attention (``a+b`` alternates over the layers), position, size.
"""

from attnlab.config import base, parse_arg
from attnlab.errors import UserError, did_you_mean


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, attention="softmax", position="rope", size="published")
    config = base(chosen.attention, chosen.position, task="listops")
    sizes = {"published": _published, "small": _small}
    if chosen.size not in sizes:
        raise UserError(f"size={chosen.size}: {did_you_mean(chosen.size, sizes)}")
    sizes[chosen.size](config)
    config.task.batch = 32
    config.model.causal = False
    config.train.eval_every = 500
    config.train.save_every = 500
    return config


def _published(config):
    config.task.length = 2000
    config.model.width = 512
    config.model.layers = 4
    config.model.heads = 8
    config.model.kv_heads = 8
    config.model.mlp_width = 1024
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup = 1000
    config.train.steps = 5000
    config.evaluate.tokens = 2**19


def _small(config):
    config.task.length = 128
    config.task.max_depth = 4
    config.task.max_args = 5
    config.task.min_length = 16
    config.model.width = 128
    config.model.layers = 4
    config.train.steps = 3000
    config.evaluate.tokens = 2**17
