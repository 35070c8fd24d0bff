"""Reformer, Kitaev et al., arXiv 2001.04451: enwik8 in sequences of 65,536 bytes, and a small one.

attnlab train --config=configs/papers/reformer.py --workdir=runs/reformer

12 layers of width 1,024, 8 heads of 128, MLP 4,096, dropout 0.2; layers 3, 7 and 11 hash, in 2
rounds of 512 buckets sorted into chunks of 256, the others see their chunk of 128 and the one
before. Published: 1.05 bits per byte of the test split, 12 layers; how long that was trained and
how the text was cut is not in the sources below. 8 sequences a step here, one a device there.

Read in the authors' repository, google/trax (trax/configs/reformer_enwik8.gin): all sizes, order of
the layers, Adam with b2 0.98, the schedule, whose peak is 1024^-0.5 2000^-0.5 = 7.0e-4, and 100,000
steps. The figure stands in table 2 of Longformer; that it is of 12 layers is recalled.

What differs here: in a round a token sees the 256 newest earlier ones of its bucket, which later
tokens cannot change, where the chunks of the authors move with them; keys met in both rounds count
once; positions are sinusoids, theirs learned on two axes (128 x 512); windows of 256 in place of
chunks; layers are recomputed (`model.remat`), not reversible, and MLPs not cut into pieces;
RMSNorm, GELU (ReLU there); a cosine in place of an inverse root; no dropout on attention.

``size=scaled``: byte-level on the King James Bible, sequences of 2,048 with 64 buckets and 64 keys
of each, in 2 rounds.
4 minutes of one CPU core (experiments/twins).

Keys after the colon: size (published, scaled), corpus.
"""

from attnlab.config import base, parse_arg, pick


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, size="published", corpus="")
    config = base("window+window+lsh+window", "absolute")
    config.attention.lsh.rounds = 2
    config.model.mlp = "gelu"
    config.model.qk_norm = False
    pick("size", chosen.size, {"published": _published, "scaled": _scaled})(config)
    config.task.corpus = chosen.corpus or config.task.corpus
    return config


def _published(config):
    config.task.corpus = "enwik8"
    config.task.length = 65_536
    config.task.batch = 8
    config.attention.window.window = 256
    config.attention.lsh.buckets = 512
    config.attention.lsh.length = 256
    config.model.layers = 12
    config.model.width = 1024
    config.model.heads = config.model.kv_heads = 8
    config.model.mlp_width = 4096
    config.model.dropout = 0.2
    config.model.remat = True
    config.optimizer.learning_rate = 7e-4
    config.optimizer.warmup = 2000
    config.optimizer.weight_decay = 0.0
    config.optimizer.b2 = 0.98
    config.optimizer.clip = 0.0
    config.train.steps = 100_000
    config.train.eval_every = 2000
    config.train.save_every = 2000
    config.evaluate.tokens = 2**19


def _scaled(config):
    config.task.length = 2048
    config.task.batch = 2
    config.attention.window.window = 64
    config.attention.lsh.buckets = 64
    config.attention.lsh.length = 64
    config.model.layers = 4
    config.model.width = 192
    config.model.heads = config.model.kv_heads = 3
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup = 20
    config.optimizer.final_fraction = 0.05
    config.train.steps = 400
    config.train.eval_every = 100
    config.train.save_every = 100
    config.evaluate.tokens = 2**15
