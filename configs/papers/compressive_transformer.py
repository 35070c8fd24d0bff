"""Compressive Transformer, Rae et al., arXiv 1911.05507: PG-19, enwik8, WikiText-103, and small.

attnlab train --config=configs/papers/compressive_transformer.py:data=pg19 --workdir=runs/books

    data         layers  width  heads     MLP    segment  memory  compressed  rate  batch  test
    pg19         36      1,024  16 of 64  4,096  512      512     512         2     512    33.6
    enwik8       24      1,024  8 of 128  3,072  768      768     1,152       3     64     0.97
    wikitext103  18      1,024  16 of 64  4,096  512      512     512         4     128    17.6

Bits per byte of enwik8, perplexity per word of the others. Validation perplexity of PG-19: 43.4; of
a Transformer-XL as deep, 45.5, and 36.3 on test. enwik8 was read with 3,072 compressed tokens, more
than in training (0.98 with 2,048, 0.99 with 1,024); WikiText-103 is 17.1 with a memory of 500 and
1,500 compressed tokens. Perplexity of PG-19 is e to the sum of the losses of 32,000 subwords over
the words of the split (3,007,061 and 6,966,499, separated by white space): `word_perplexity`. That
of WikiText-103 counts <eos>: `word_perplexity_eos`.

Read in notes on the paper that quote its sections 5.1 to 5.3, tables 3 to 9: layers, windows,
memories, rates, batch of PG-19 and WikiText-103, widths of enwik8 and WikiText-103, vocabulary,
learning rates, warm-up, decay, clipping, figures. Words of PG-19: its own repository,
google-deepmind/pg19. Taken from the others, for want of a source: width, heads and MLP of PG-19,
the batch of enwik8, no dropout. There is no code of the authors to compare with.

What differs here: evaluation keeps the sizes of training; the convolution that compresses works
head by head ([rate D D], not [rate width width]), on keys and values, which are what the memory
holds; the parameters are updated after every batch, not every fourth after 60,000; subwords are
byte pairs; layers are pre-norm with RMSNorm and GELU; WikiText-103 has 32,768 subwords in place of
adaptive words.

``size=scaled``: byte-level on the King James Bible in the same proportions.
10 minutes of one CPU core (experiments/twins).

Keys after the colon: data, size (published, scaled), corpus.
"""

from typing import NamedTuple

from attnlab.config import base, parse_arg, pick


class Shape(NamedTuple):
    layers: int
    width: int
    heads: int
    mlp_width: int
    segment: int
    memory: int
    compressed: int
    rate: int
    batch: int
    warmup: int
    steps: int


PUBLISHED = {
    "pg19": Shape(36, 1024, 16, 4096, 512, 512, 512, 2, 512, 16_000, 500_000),
    "enwik8": Shape(24, 1024, 8, 3072, 768, 768, 1152, 3, 64, 4_000, 100_000),
    "wikitext103": Shape(18, 1024, 16, 4096, 512, 512, 512, 4, 128, 16_000, 500_000),
}
SCALED = {
    "pg19": Shape(5, 192, 3, 768, 128, 128, 128, 2, 16, 20, 300),
    "enwik8": Shape(4, 192, 3, 576, 96, 96, 144, 3, 16, 20, 300),
    "wikitext103": Shape(4, 192, 3, 768, 128, 128, 128, 4, 16, 20, 300),
}
CORPORA = {"pg19": "tfds:pg19", "enwik8": "enwik8", "wikitext103": "wikitext103"}
TOKENIZERS = {"pg19": "bpe:32000", "enwik8": "bytes", "wikitext103": "bpe:32768"}


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, data="pg19", size="published", corpus="")
    shapes, fill = pick(
        "size", chosen.size, {"published": (PUBLISHED, _published), "scaled": (SCALED, _scaled)}
    )
    shape = pick("data", chosen.data, shapes)
    config = base("compressive", "transformer_xl")
    fill(config, chosen.data)
    config.task.corpus = chosen.corpus or config.task.corpus
    config.task.length = config.attention.segment = shape.segment
    config.attention.memory = shape.memory
    config.attention.compressed = shape.compressed
    config.attention.rate = shape.rate
    config.task.batch = shape.batch
    config.model.layers = shape.layers
    config.model.width = shape.width
    config.model.heads = config.model.kv_heads = shape.heads
    config.model.mlp = "gelu"
    config.model.mlp_width = shape.mlp_width
    config.model.qk_norm = False
    config.optimizer.warmup = shape.warmup
    config.train.steps = shape.steps
    return config


def _published(config, data):
    config.task.corpus = CORPORA[data]
    config.task.tokenizer = TOKENIZERS[data]
    config.optimizer.learning_rate = 3e-4
    config.optimizer.final_fraction = 1e-6 / 3e-4
    config.optimizer.weight_decay = 0.0
    config.optimizer.b2 = 0.999
    config.optimizer.clip = 0.1
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
