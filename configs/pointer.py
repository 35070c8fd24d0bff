"""Pointer networks: a convex hull, a triangulation or a tour, named point by point.

attnlab train --config=configs/pointer.py:task=hull --workdir=runs/hull

Rows of 5 to 10 points, two layers of width 64 that read them without a causal mask, and a decoder
that points at one after the other; five minutes on an idle core. There is no position, so that the
order in which points come means nothing; but for ``delaunay``, whose triangles are named in the
order of indices.

Keys after the colon: task (hull, delaunay, tsp), attention (``a+b`` alternates over the layers),
position, points, width.
"""

from attnlab.config import base, parse_arg


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, task="hull", attention="softmax", position="", points=10, width=64)
    position = chosen.position or ("absolute" if chosen.task == "delaunay" else "none")
    config = base(chosen.attention, position, task=chosen.task)
    config.task.length = chosen.points
    config.task.batch = 128
    config.model.width = chosen.width
    config.model.layers = 2
    config.model.causal = False
    config.optimizer.learning_rate = 2e-3
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.optimizer.b2 = 0.999
    config.optimizer.clip = 2.0
    config.train.steps = 6000
    config.train.eval_every = 500
    config.train.save_every = 500
    config.evaluate.batch = 128
    config.evaluate.tokens = 2**13
    return config
