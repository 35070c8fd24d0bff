"""Language modelling of text: predict every token of every document and its end, once an epoch.

Config: ``task.corpus`` (a corpus name, ``text:GLOB`` or ``tfds:NAME``), ``task.tokenizer``
(``bytes`` or ``bpe:SIZE``), ``task.packing`` (``packed`` or ``stream``), ``task.fallback`` (a
corpus to use, with an announcement, when the archive is out of reach; empty for none).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from attnlab.data.fetch import FetchError
from attnlab.data.packed import Packed
from attnlab.data.places import announce
from attnlab.data.prefetch import prefetch
from attnlab.data.stream import Stream
from attnlab.data.textset import TextSet
from attnlab.data.tokenizers import Tokenizer, make_tokenizer
from attnlab.data.tokens import DocumentLine, tokenize
from attnlab.errors import UserError, did_you_mean

PACKINGS = {"packed": Packed, "stream": Stream}


class Evaluated(NamedTuple):
    """One held-out document: `tokens` without boundaries, its bytes and white-space words."""

    doc_id: str
    tokens: np.ndarray
    n_bytes: int
    n_words: int


class TextTask:
    """Batches and documents of one corpus under one tokenizer and one packing.

    Batches hold int32 [B, N]: ``tokens``, ``targets``, ``pos``, ``seg``; every slot is full. With
    ``packed``, `pos` and `seg` start anew in every row (so ``pos < N``); with ``stream``, a lane
    reads on from step to step and they belong to the document (so `pos` grows to its length).
    ``boundary`` is the id that stands before and after every document.
    `bytes_per_token` is train bytes over predictions, ends included: bits per byte are nats per
    prediction / ln 2 / bytes_per_token.
    """

    name = "text"

    def __init__(
        self,
        text: TextSet,
        tokenizer: Tokenizer,
        packing: str,
        *,
        seed: int,
        length: int,
        batch: int,
    ):
        if packing not in PACKINGS:
            raise UserError(f"no packing {packing!r}; {did_you_mean(packing, PACKINGS)}")
        for field, value in (("length", length), ("batch", batch)):
            if value < 1:
                raise UserError(f"task.{field}={value} must be at least 1")
        if not 0 <= seed < 1 << 32:
            raise UserError(f"seed={seed} must lie in 0..{(1 << 32) - 1}")
        self.text, self.tokenizer = text, tokenizer
        self.length, self.batch_size = length, batch
        self.vocab_size, self.boundary = tokenizer.vocab_size, tokenizer.boundary
        self._tokens = {name: tokenize(text, name, tokenizer) for name in text.splits}
        line = DocumentLine(self._tokens["train"], self.boundary)
        self.bytes_per_token = text["train"].size / max(line.length, 1)
        self._packing = PACKINGS[packing](line, seed=seed, length=length, batch=batch)

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Rows of the batch of a step: depends on (seed, step, rows) and on nothing else."""
        lanes = range(self.batch_size)[rows if rows is not None else slice(None)]
        columns = zip(*(self._packing.row(step, lane) for lane in lanes))
        return dict(zip(("tokens", "targets", "pos", "seg"), map(np.stack, columns)))

    def batches(
        self, start_step: int = 0, rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches from a step on, read ahead by threads; ``close()`` it to end them."""
        return prefetch(lambda step: self.batch(step, rows), start_step)

    def documents(self, split: str) -> Iterator[Evaluated]:
        """Every document of a split, in order."""
        tokens = self._tokens[self._split(split)]
        start = 0
        for (doc_id, content), end in zip(self.text[split], tokens.ends):
            ids = tokens.read(start, int(end)).astype(np.int32)
            yield Evaluated(doc_id, ids, len(content), len(content.split()))
            start = int(end)

    def split_bytes(self, split: str) -> bytes:
        """All bytes of a split, document after document."""
        text = self.text[self._split(split)]
        return text.read(0, text.size).tobytes()

    def baselines(self, split: str) -> dict[str, dict[str, float]]:
        """General compressors on a split, in bits per byte; see `attnlab.data.compress`."""
        from attnlab.data.compress import baselines

        return baselines(self.text, split)

    def info(self) -> dict:
        """Corpus, licence, SHA-256, and the size of each split in documents, bytes and tokens."""
        splits = {
            name: {
                "documents": len(split.documents),
                "bytes": split.size,
                "tokens": int(self._tokens[name].ends[-1]) if split.documents else 0,
            }
            for name, split in self.text.splits.items()
        }
        return {**self.text.about, "tokenizer": self.tokenizer.name, "splits": splits}

    def _split(self, name: str) -> str:
        if name not in self.text.splits:
            raise UserError(f"no split {name!r}; {did_you_mean(name, self.text.splits)}")
        return name


def build(config: Mapping, *, seed: int, length: int, batch: int) -> TextTask:
    """The text task of a config. Raises `UserError` for a wrong name, `DataError` without data."""
    text = open_text(config["corpus"], config.get("fallback") or "")
    tokenizer = make_tokenizer(config.get("tokenizer", "bytes"), text)
    packing = config.get("packing", "packed")
    return TextTask(text, tokenizer, packing, seed=seed, length=length, batch=batch)


def open_text(corpus: str, fallback: str = "") -> TextSet:
    """A corpus by its name in a config, or its fallback, announced, when it cannot be had."""
    from attnlab.data.corpora import find_source
    from attnlab.data.prepared import open_corpus

    if corpus.startswith("tfds:"):
        from attnlab.data.catalogue import open_tfds

        return open_tfds(corpus)
    source = find_source(corpus)
    if not fallback or fallback == corpus:
        return open_corpus(source)
    substitute = find_source(fallback)
    try:
        return open_corpus(source)
    except FetchError as error:
        note = f"FALLING BACK to {fallback!r}: the numbers will not be those of {corpus!r}"
        announce(f"{error}")
        announce(note)
        text = open_corpus(substitute)
        return replace(text, about={**text.about, "notes": [*text.about["notes"], note]})
