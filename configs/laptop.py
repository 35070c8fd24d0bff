"""Half an hour on two CPU cores: a 5 M-parameter byte-level model of the King James Bible.

attnlab train --config=configs/laptop.py --workdir=runs/laptop

An hour of processor time, so half an hour on 2 idle cores; 1.61 bits per byte on the held-out
books, where bzip2 -9 needs 2.02 (1.91 after the training text) and xz -9e 2.26 (1.87).
"""

from attnlab.config import base, parse_arg


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, attention="softmax", position="rope", normaliser="softmax")
    config = base(chosen.attention, chosen.position, chosen.normaliser)
    config.task.batch = 8
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup = 40
    config.optimizer.final_fraction = 0.02
    config.train.steps = 700
    config.train.eval_every = 100
    config.train.save_every = 50
    config.evaluate.tokens = 65536
    config.sample.prompt = "In the beginning "
    config.sample.tokens = 600
    config.sample.temperature = 0.8
    return config
