"""Tasks of recall: what a small model can look up, copy, follow or count, at any length.

attnlab train --config=configs/recall.py:task=mqar,attention=linear --workdir=runs/mqar-linear

Two layers of width 64 with one head, minutes on a CPU: where softmax learns `mqar`, a state of
fixed size holds so many pairs and no more. Options of a task stand in its own section
(``--config.task.pairs=16``), `attnlab list mqar` shows them.

Keys after the colon: task, attention (``a+b`` alternates over the layers), position, length, width.
"""

from attnlab.config import base, parse_arg


def get_config(arg: str | None = None):
    chosen = parse_arg(
        arg, task="mqar", attention="softmax", position="absolute", length=64, width=64
    )
    config = base(chosen.attention, chosen.position, task=chosen.task)
    config.task.length = chosen.length
    config.task.batch = 64
    config.model.width = chosen.width
    config.model.layers = 2
    config.model.heads = 1
    config.model.kv_heads = 1
    config.model.tied = False  # one table for both takes several times as many steps
    config.optimizer.learning_rate = 3e-3
    config.train.steps = 1500
    config.train.eval_every = 100
    config.train.save_every = 500
    config.evaluate.tokens = 2**15
    config.evaluate.batch = 64
    return config
