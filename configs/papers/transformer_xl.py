"""Transformer-XL, Dai et al., arXiv 1901.02860: enwik8 and WikiText-103, and a small one of a kind.

attnlab train --config=configs/papers/transformer_xl.py:data=enwik8,model=base --workdir=runs/xl

    data, model         layers  width  heads      MLP    segment = memory  batch  test
    enwik8, base        12      512    8 of 64    2,048  512               22     1.06 bits a byte
    enwik8, large       24      1,024  8 of 128   3,072  768               64     0.99
    wikitext103, base   16      410    10 of 41   2,100  150               60     24.0 a word
    wikitext103, large  18      1,024  16 of 64   4,096  384               128    18.3

41 M, 277 M, 151 M and 257 M parameters, most of the last two in embeddings. The figures are of the
test split, read with more memory than in training: 2,100, 3,800, 640 and 1,600 tokens, in segments
of 80, 128, 64 and 128, distances clipped at 820, 1,000, 400 and 1,000. Perplexity counts every
token of the file and one <eos> a line: `word_perplexity_eos` of ``test.json``.

Read in the authors' repository, kimiyoung/transformer-xl (pytorch/run_enwik8_base.sh,
run_wt103_base.sh, run_wt103_large.sh, tf/scripts/enwik8_tpu.sh, tf/sota/*.sh): all sizes, dropout,
warm-up, steps, learning rate, and how it is evaluated. Figures and parameters: tables 1 and 2 of
the paper. The clipping of gradients is recalled.

What differs here: the memory is as long in evaluation as in training, and distances are not
clipped; layers are pre-norm with RMSNorm and GELU in place of post-norm LayerNorm and ReLU; no
dropout on attention weights (0.15 and 0.2 in the large ones); the memory holds keys and values, so
that no gradient reaches their projections through it. WikiText-103 is read in 32,768 subwords, all
of one embedding size, in place of 267,735 words with adaptive embeddings and softmax.

``size=scaled``: a third of the depth, three eighths of the width, byte-level on the King James
Bible.
18 minutes of one CPU core (experiments/twins).

Keys after the colon: data, model, size (published, scaled), corpus.
"""

from typing import NamedTuple

from attnlab.config import base, parse_arg, pick


class Shape(NamedTuple):
    layers: int
    width: int
    heads: int
    head_dim: int
    mlp_width: int
    segment: int  # and the memory before it
    batch: int
    dropout: float
    warmup: int
    steps: int


PUBLISHED = {
    "enwik8": {
        "base": Shape(12, 512, 8, 64, 2048, 512, 22, 0.1, 0, 400_000),
        "large": Shape(24, 1024, 8, 128, 3072, 768, 64, 0.15, 4_000, 400_000),
    },
    "wikitext103": {
        "base": Shape(16, 410, 10, 41, 2100, 150, 60, 0.1, 0, 200_000),
        "large": Shape(18, 1024, 16, 64, 4096, 384, 128, 0.2, 16_000, 4_000_000),
    },
}
SCALED = Shape(4, 192, 3, 64, 768, 256, 16, 0.0, 20, 400)
TOKENIZERS = {"enwik8": "bytes", "wikitext103": "bpe:32768"}


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, data="enwik8", model="base", size="published", corpus="")
    shape = pick("model", chosen.model, pick("data", chosen.data, PUBLISHED))
    config = base("transformer_xl", "transformer_xl")
    pick("size", chosen.size, {"published": _published, "scaled": _scaled})(config, chosen.data)
    shape = shape if chosen.size == "published" else SCALED
    config.task.corpus = chosen.corpus or config.task.corpus
    config.task.length = config.attention.segment = config.attention.memory = shape.segment
    config.task.batch = shape.batch
    config.model.layers = shape.layers
    config.model.width = shape.width
    config.model.heads = config.model.kv_heads = shape.heads
    config.model.head_dim = shape.head_dim
    config.model.mlp = "gelu"
    config.model.mlp_width = shape.mlp_width
    config.model.dropout = shape.dropout
    config.model.qk_norm = False
    config.optimizer.warmup = shape.warmup
    config.train.steps = shape.steps
    return config


def _published(config, data):
    config.task.corpus = data
    config.task.tokenizer = TOKENIZERS[data]
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.optimizer.b2 = 0.999
    config.optimizer.clip = 0.25
    config.train.eval_every = 4000
    config.train.save_every = 4000
    config.evaluate.tokens = 2**18


def _scaled(config, data):
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.final_fraction = 0.05
    config.train.eval_every = 100
    config.train.save_every = 100
    config.evaluate.tokens = 2**15
