"""Long Range Arena: expressions, texts, pairs of texts and images, each labelled by an encoder.

attnlab train --config=configs/lra.py:task=pathfinder,attention=window --workdir=runs/pathfinder

``size=published`` has the lengths, widths and steps of the paper's code, where image and Pathfinder
differ from mechanism to mechanism: taken is one of its sizes. ``size=small`` is for a CPU.

What a guess is worth: listops (2,000 tokens) 17.4 % by the likeliest value, 37.1 % knowing the
root operator, 48.8 % its own digits too. text_classification (4,000 bytes; the paper's code reads
1,000) 23 % of topics of news, 50 % with ``source=tfds:imdb_reviews``, the published text. retrieval
(two of 4,000) and pathfinder (1,024 pixels; ``--config.task.length=16384`` is Path-X) 50 %. image
10 %, of digits (784 pixels) or of ``source=tfds:cifar10``, the published images (1,024).

Keys after the colon: task, attention (``a+b`` alternates over the layers), position, size, source.
"""

from attnlab.config import base, parse_arg
from attnlab.errors import UserError, did_you_mean

PUBLISHED = {
    "listops": {
        "task.length": 2000,
        "task.batch": 32,
        "model.width": 512,
        "model.layers": 4,
        "model.heads": 8,
        "model.mlp_width": 1024,
        "optimizer.learning_rate": 5e-4,
        "optimizer.warmup": 1000,
        "train.steps": 5000,
    },
    "text_classification": {
        "task.length": 4000,
        "task.batch": 32,
        "model.width": 256,
        "model.layers": 4,
        "model.heads": 4,
        "model.mlp_width": 1024,
        "optimizer.learning_rate": 5e-4,
        "optimizer.warmup": 8000,
        "train.steps": 20_000,
    },
    "retrieval": {
        "task.length": 8000,
        "task.batch": 32,
        "model.width": 128,
        "model.layers": 4,
        "model.heads": 4,
        "model.mlp_width": 512,
        "optimizer.learning_rate": 5e-4,
        "optimizer.warmup": 1000,
        "train.steps": 5000,
    },
    "image": {
        "task.length": 784,
        "task.batch": 256,
        "model.width": 128,
        "model.layers": 1,
        "model.heads": 8,
        "model.head_dim": 8,
        "model.mlp_width": 128,
        "model.dropout": 0.3,
        "optimizer.learning_rate": 5e-4,
        "optimizer.warmup": 175,
        "optimizer.weight_decay": 0.0,
        "train.steps": 35_000,
    },
    "pathfinder": {
        "task.length": 1024,
        "task.batch": 512,
        "model.width": 32,
        "model.layers": 4,
        "model.heads": 4,
        "model.head_dim": 4,
        "model.mlp_width": 32,
        "model.dropout": 0.2,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup": 312,
        "optimizer.weight_decay": 0.0,
        "train.steps": 62_400,
    },
}
SMALL = {
    "listops": {
        "task.length": 128,
        "task.batch": 32,
        "task.max_depth": 4,
        "task.max_args": 5,
        "task.min_length": 16,
        "model.width": 128,
        "model.layers": 4,
        "optimizer.learning_rate": 1e-3,
        "train.steps": 3000,
    },
    "text_classification": {"task.length": 512, "train.steps": 600},
    "retrieval": {"task.length": 1024, "train.steps": 600},
    "image": {"task.length": 784, "model.layers": 1, "train.steps": 800},
    "pathfinder": {"task.length": 1024, "task.pool": 16_000, "train.steps": 3000},
}
"""Where nothing else is said, two layers of width 32, batches of 16 and a rate of 3e-3."""


def get_config(arg: str | None = None):
    chosen = parse_arg(
        arg, task="listops", attention="softmax", position="rope", size="published", source=""
    )
    for name, known in (("size", ("published", "small")), ("task", PUBLISHED)):
        if chosen[name] not in known:
            raise UserError(f"{name}={chosen[name]}: {did_you_mean(chosen[name], known)}")
    config = base(chosen.attention, chosen.position, task=chosen.task)
    config.model.causal = False
    config.train.eval_every = 500
    config.train.save_every = 500
    config.evaluate.tokens = 2**19
    sizes = PUBLISHED if chosen.size == "published" else SMALL
    if chosen.size == "small":
        config.task.batch = 16
        config.model.width = 32
        config.model.layers = 2
        config.optimizer.learning_rate = 3e-3
        config.evaluate.tokens = 2**17
    config.update_from_flattened_dict(sizes[chosen.task])
    config.model.kv_heads = config.model.heads
    if chosen.source:
        if "source" not in config.task:
            raise UserError(f"source={chosen.source}: task {chosen.task} is made up and has none")
        config.task.source = chosen.source
    return config
