"""Longformer, Beltagy et al., arXiv 2004.05150: text8 and enwik8, and a small one of a kind.

attnlab train --config=configs/papers/longformer.py:data=text8 --workdir=runs/longformer

    model  layers  width  heads    MLP    dropout  parameters  text8 test  enwik8 test
    small  12      512    8 of 64  2,048  0.2      41 M        1.10        1.00
    large  30      512    8 of 64  2,048  0.4      102 M       not made    0.99

Bits per byte, which are characters in text8; on the development splits the small model has 1.04
and 1.02. Measured over windows of 32,256 that move by 512 tokens, of which the last 512 count, as
``evaluate.length`` and ``evaluate.stride`` say here, at 63 times the cost of windows side by side.

Read in a copy of the paper (section 4.2, tables 2 to 4 and 12): layers, heads, widths, dropout,
AdamW, clipping, weight decay, pre-norm, GELU, learning rate, batch, steps, lengths, figures. MLP
and relative positions are those of Transformer-XL, as the table says. The authors' repository,
allenai/longformer, has no configuration of these models.

What differs here: they train in five phases, of 2,048 to 23,040 tokens, doubling length and windows
and halving the learning rate (2.5e-4 to 1.6e-5); a run here has one length, so all 570,000 steps
are at 23,040 tokens, with one learning rate that falls to the last of theirs. Their windows grow
from the lowest layer (512 in the last phase) to the highest; here all have 512, since the layers of
one mechanism share its options (in their ablation 1.23 with equal windows, 1.21 with growing ones).
No dilation of 2 heads in the upper layers (1.20 there). RMSNorm.

``size=scaled``: 4 layers of width 192, sequences of 2,048 bytes of the King James Bible, windows of
64.
8 minutes of one CPU core (experiments/twins).

Keys after the colon: data (text8, enwik8), model (small, large), size (published, scaled), corpus.
"""

from attnlab.config import base, parse_arg, pick

DATA = {"text8": "text8", "enwik8": "enwik8"}
LAYERS = {"small": 12, "large": 30}
DROPOUT = {"small": 0.2, "large": 0.4}
STEPS = {"small": 570_000, "large": 395_000}


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, data="text8", model="small", size="published", corpus="")
    config = base("window", "transformer_xl")
    config.model.mlp = "gelu"
    config.model.qk_norm = False
    config.model.layers = pick("model", chosen.model, LAYERS)
    config.model.dropout = DROPOUT[chosen.model]
    config.train.steps = STEPS[chosen.model]
    corpus = pick("data", chosen.data, DATA)
    pick("size", chosen.size, {"published": _published, "scaled": _scaled})(config, corpus)
    config.task.corpus = chosen.corpus or config.task.corpus
    return config


def _published(config, corpus):
    config.task.corpus = corpus
    config.task.length = 23_040
    config.task.batch = 16
    config.attention.window = 512
    config.model.width = 512
    config.model.heads = config.model.kv_heads = 8
    config.model.mlp_width = 2048
    config.model.remat = True
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.final_fraction = 1 / 16
    config.optimizer.warmup = 10_000
    config.optimizer.weight_decay = 0.01
    config.optimizer.b2 = 0.999
    config.optimizer.clip = 0.25
    config.train.eval_every = 4000
    config.train.save_every = 4000
    config.evaluate.length = 32_256
    config.evaluate.stride = 512
    config.evaluate.tokens = 2**17


def _scaled(config, corpus):
    config.task.length = 2048
    config.task.batch = 2
    config.attention.window = 64
    config.model.layers = 4
    config.model.dropout = 0.0
    config.model.width = 192
    config.model.heads = config.model.kv_heads = 3
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup = 20
    config.optimizer.final_fraction = 0.05
    config.train.steps = 500
    config.train.eval_every = 100
    config.train.save_every = 100
    config.evaluate.tokens = 2**15
    config.evaluate.stride = 1024
