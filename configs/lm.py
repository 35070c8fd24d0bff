"""Language modelling: bits per byte on whole held-out books.

attnlab train --config=configs/lm.py:attention=window,position=rope --workdir=runs/window

At its defaults three times the work of configs/laptop.py (`attnlab plan` counts it); no score of
it is recorded.

Keys after the colon: attention (``a+b`` alternates over the layers), position, normaliser, corpus,
length.
"""

from attnlab.config import base, parse_arg


def get_config(arg: str | None = None):
    chosen = parse_arg(
        arg, attention="softmax", position="rope", normaliser="softmax", corpus="kjv", length=512
    )
    config = base(chosen.attention, chosen.position, chosen.normaliser)
    config.task.corpus = chosen.corpus
    config.task.length = chosen.length
    return config
