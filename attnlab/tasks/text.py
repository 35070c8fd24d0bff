"""Language modelling of text: predict every token of every document and its end, once an epoch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

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
from attnlab.registry import register
from attnlab.tasks import Recipe, check_sizes

PACKINGS = {"packed": Packed, "stream": Stream}


class Evaluated(NamedTuple):
    """One held-out document: `tokens` without boundaries, its bytes, white-space words and line
    ends."""

    doc_id: str
    tokens: np.ndarray
    n_bytes: int
    n_words: int
    n_lines: int = 0


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
        check_sizes(seed, length, batch)
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
            words, lines = len(content.split()), content.count(b"\n")
            yield Evaluated(doc_id, ids, len(content), words, lines)
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


@register
@dataclass(frozen=True)
class Text(Recipe):
    """``corpus``: a name of `attnlab list corpora`, ``text:GLOB`` or ``tfds:NAME``; ``tokenizer``:
    ``bytes`` or ``bpe:SIZE``; ``packing``: ``packed``, or ``stream``, which is chosen where the
    attention carries its memory; ``fallback``: a corpus to use, with a notice, when the first
    cannot be fetched."""

    kind = "text"
    corpus: str = "kjv"
    tokenizer: str = "bytes"
    packing: Literal["packed", "stream"] = "packed"
    fallback: str = ""

    def build(self, *, seed: int, length: int, batch: int) -> TextTask:
        """Raises `UserError` for a wrong name, `DataError` without data."""
        text = open_text(self.corpus, self.fallback)
        tokenizer = make_tokenizer(self.tokenizer, text)
        return TextTask(text, tokenizer, self.packing, seed=seed, length=length, batch=batch)


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
