"""The first run: a small byte-level model of the King James Bible, a few minutes on two CPU cores.

attnlab train --config=configs/quickstart.py --workdir=runs/quickstart

4.5 minutes on 2 CPU cores; 1.95 bits per byte on the held-out books, where gzip -9 needs 2.57
(2.53 after the training text) and bzip2 -9 needs 2.02 (1.91).
"""

from attnlab.config import base, parse_arg


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, attention="softmax", position="rope", normaliser="softmax")
    config = base(chosen.attention, chosen.position, chosen.normaliser)
    config.task.fallback = "pysource"
    config.task.length = 256
    config.model.width = 192
    config.model.layers = 4
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup = 20
    config.optimizer.final_fraction = 0.05
    config.train.steps = 180
    config.train.eval_every = 45
    config.train.save_every = 45
    config.evaluate.tokens = 32768
    config.sample.prompt = "In the beginning "
    config.sample.tokens = 400
    config.sample.temperature = 0.8
    return config
