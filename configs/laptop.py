"""The model of `configs/lm.py` at a length where mechanisms differ, in an hour or so on two cores.

attnlab train --config=configs/laptop.py:attention=window --workdir=runs/laptop-window
"""

from attnlab.config import base, parse_arg


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, attention="softmax", position="rope", length=2048)
    config = base(chosen.attention, chosen.position)
    config.task.length = chosen.length
    config.task.batch = 4
    config.evaluate.batch = 4
    return config
