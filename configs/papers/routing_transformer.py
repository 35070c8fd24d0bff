"""Routing Transformer, Roy et al., arXiv 2003.05997: PG-19, WikiText-103, enwik8, and small.

attnlab train --config=configs/papers/routing_transformer.py:data=pg19 --workdir=runs/routed-books

    data         length  layers  width  MLP    local + routing heads    clusters   test
    pg19         8,192   22      1,032  4,096  8 + 0, last layer 6 + 2  16 of 512  33.2 a word
    wikitext103  4,096   14      1,024  3,072  8 + 8                    8 of 512   15.8 a word
    enwik8       8,192   12      1,024  3,072  4 + 4                    16 of 512  0.99 bits a byte

With local heads alone, 24 layers have 39.3 on PG-19 and 14 layers 19.8 on WikiText-103; the
Transformer-XL that they are compared with has 36.3 and 18.3. Perplexity of PG-19 is per white-space
word (`word_perplexity`), that of WikiText-103 counts <eos> (`word_perplexity_eos`).

Read in the authors' repository, google-research/routing_transformer (sparse_transformer.py,
README.md): lengths, layers, widths, heads, clusters, windows, dropout, optimiser. 33.2 and 15.8:
abstract; 0.99: table 3 of Longformer, which gives it 223 M parameters. The figures of local heads
are recalled. A step has one sequence a core there, of a number of cores that is not in it; 32 here.

What differs here: a token sees the 512 newest earlier ones of its cluster, which later tokens
cannot change, where the authors give each cluster its 512 best of the whole sequence, later ones
included; the window is 512 tokens, theirs the own block of 256 and the one before; relative
positions are a bias per head in buckets up to 512 (`t5`), theirs vectors; SwiGLU in place of GEGLU;
AdamW with a cosine in place of Adafactor with an inverse root; no dropout inside MLP and attention
(0.4 on WikiText-103); WikiText-103 in 32,768 subwords with embeddings as wide as the model (256).

``size=scaled``: byte-level on the King James Bible, 1,024 bytes in 8 clusters of 128.
7 minutes of one CPU core (experiments/twins).

Keys after the colon: data, size (published, scaled), corpus.
"""

from typing import NamedTuple

from attnlab.config import base, parse_arg, pick

BOTH = "heads:window:routing"


class Shape(NamedTuple):
    attention: str
    sizes: tuple[int, int]  # local and routing heads
    layers: int
    width: int
    mlp_width: int
    length: int
    clusters: int
    members: int  # of a cluster; also the window
    dropout: float


def last_of(layers: int) -> str:
    """Routing in the last of so many layers."""
    return "+".join(["window"] * (layers - 1) + [BOTH])


PUBLISHED = {
    "pg19": Shape(last_of(22), (6, 2), 22, 1032, 4096, 8192, 16, 512, 0.0),
    "wikitext103": Shape(BOTH, (8, 8), 14, 1024, 3072, 4096, 8, 512, 0.4),
    "enwik8": Shape(BOTH, (4, 4), 12, 1024, 3072, 8192, 16, 512, 0.0),
}
SCALED = {
    "pg19": Shape(last_of(4), (3, 1), 4, 192, 512, 1024, 8, 128, 0.0),
    "wikitext103": Shape(BOTH, (2, 2), 4, 192, 512, 1024, 8, 128, 0.0),
    "enwik8": Shape(BOTH, (2, 2), 4, 192, 512, 1024, 8, 128, 0.0),
}
CORPORA = {"pg19": "tfds:pg19", "wikitext103": "wikitext103", "enwik8": "enwik8"}
TOKENIZERS = {"pg19": "bpe:32768", "wikitext103": "bpe:32768", "enwik8": "bytes"}


def get_config(arg: str | None = None):
    chosen = parse_arg(arg, data="pg19", size="published", corpus="")
    shapes, fill = pick(
        "size", chosen.size, {"published": (PUBLISHED, _published), "scaled": (SCALED, _scaled)}
    )
    shape = pick("data", chosen.data, shapes)
    config = base(shape.attention, "t5")
    fill(config, chosen.data)
    config.task.corpus = chosen.corpus or config.task.corpus
    config.task.length = shape.length
    heads = config.attention.heads if "+" in shape.attention else config.attention
    heads.sizes = shape.sizes
    config.attention.window.window = shape.members
    config.attention.routing.clusters = shape.clusters
    config.attention.routing.length = shape.members
    config.position.max_distance = shape.members
    config.model.layers = shape.layers
    config.model.width = shape.width
    config.model.heads = config.model.kv_heads = sum(shape.sizes)
    config.model.mlp_width = shape.mlp_width
    config.model.dropout = shape.dropout
    config.model.qk_norm = False
    return config


def _published(config, data):
    config.task.corpus = CORPORA[data]
    config.task.tokenizer = TOKENIZERS[data]
    config.task.batch = 32
    config.model.remat = True
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup = 10_000
    config.optimizer.weight_decay = 2e-5 if data == "wikitext103" else 0.0
    config.optimizer.clip = 0.0
    config.train.steps = 200_000
    config.train.eval_every = 4000
    config.train.save_every = 4000
    config.evaluate.tokens = 2**18


def _scaled(config, data):
    config.task.batch = 4
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup = 20
    config.optimizer.final_fraction = 0.05
    config.train.steps = 500
    config.train.eval_every = 100
    config.train.save_every = 100
    config.evaluate.tokens = 2**15
