"""Token ids of a split as one line, and the line of predictions that documents make of it.

A document of n tokens is read with a boundary on both sides, so it gives n + 1 predictions::

    inputs   boundary  t0  t1 ... t(n-1)
    targets  t0        t1  t2 ... boundary

Every token and the end are predicted exactly once and no target belongs to another document.
"""

from typing import NamedTuple, Protocol

import numpy as np

from attnlab.data.textset import TextSet
from attnlab.data.tokenizers import ByteTokenizer, Tokenizer


class Tokens(Protocol):
    """Token ids of a split without boundaries: document i ends at `ends[i]`."""

    ends: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids ``[start, stop)`` of the line, any integer dtype."""
        ...


def tokenize(text: TextSet, split: str, tokenizer: Tokenizer) -> Tokens:
    """Token ids of a split. For bytes the split itself: nothing is computed or stored."""
    if isinstance(tokenizer, ByteTokenizer):
        return text[split]
    from attnlab.data.bpe import stored_tokens

    return stored_tokens(text, split, tokenizer)


class Predictions(NamedTuple):
    """Neighbouring predictions [L] of a document line: `pos` counts inside the whole document."""

    tokens: np.ndarray
    targets: np.ndarray
    pos: np.ndarray
    document: np.ndarray


class DocumentLine:
    """All predictions of a split in document order, any part readable by its offset."""

    def __init__(self, tokens: Tokens, boundary: int):
        self._tokens = tokens
        self._boundary = boundary
        counts = np.diff(tokens.ends, prepend=0)
        self.ends = np.cumsum(counts + 1)
        self.length = int(self.ends[-1]) if len(counts) else 0

    def read(self, start: int, stop: int) -> Predictions:
        """Predictions ``[start, stop)``; offsets past the end go on at the first document."""
        parts = []
        while start < stop:
            offset = start % self.length
            taken = min(stop - start, self.length - offset)
            parts.append(self._read(offset, offset + taken))
            start += taken
        if len(parts) == 1:
            return parts[0]
        return Predictions(*map(np.concatenate, zip(*parts)))

    def _read(self, start: int, stop: int) -> Predictions:
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop - 1, side="right"))
        out = Predictions(*(np.empty(stop - start, np.int32) for _ in Predictions._fields))
        for number in range(first, last + 1):
            begin = int(self.ends[number - 1]) if number else 0
            left, right = max(start, begin), min(stop, int(self.ends[number]))
            here = slice(left - start, right - start)
            ids = self._document(number, left - begin, right - begin + 1)
            out.tokens[here] = ids[:-1]
            out.targets[here] = ids[1:]
            out.pos[here] = np.arange(left - begin, right - begin)
            out.document[here] = number
        return out

    def _document(self, number: int, start: int, stop: int) -> np.ndarray:
        """Ids ``[start, stop)`` of one document with its two boundaries."""
        origin = int(self._tokens.ends[number - 1]) if number else 0
        count = int(self._tokens.ends[number]) - origin
        ids = np.full(stop - start, self._boundary, np.int32)
        low, high = max(start - 1, 0), min(stop - 1, count)
        ids[low + 1 - start : high + 1 - start] = self._tokens.read(origin + low, origin + high)
        return ids
