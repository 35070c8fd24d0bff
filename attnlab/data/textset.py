"""A prepared text set: its splits, their documents, and the bytes of any part of them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CACHE_BYTES = 512 << 20
RECORD_OVERHEAD = 200


@dataclass(frozen=True)
class Index:
    """What a split holds, without opening it: document names and the bytes of every record.

    `records[i]` is the number of records of document i; `sizes` the bytes of each record.
    """

    documents: tuple[str, ...]
    records: tuple[int, ...]
    sizes: tuple[int, ...]


class TextSplit:
    """Documents of one split as one line of bytes, read record by record through a bounded cache.

    `ends[i]` is where document i ends in that line. The cache keeps the records read last, at
    most `cache_bytes` of them (and always the newest), so a large corpus is never wholly decoded.
    """

    def __init__(
        self, index: Index, read_record: Callable[[int], bytes], cache_bytes: int = CACHE_BYTES
    ):
        self.documents = index.documents
        self.record_ends = np.cumsum(index.sizes, dtype=np.int64)
        last = np.cumsum(index.records, dtype=np.int64) - 1
        self.ends = self.record_ends[last] if len(last) else self.record_ends
        self.last_records = last
        self._read_record = read_record
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._room = cache_bytes
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of all documents."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def record(self, number: int) -> np.ndarray:
        """Bytes of one record as uint8, from the cache or the disk. Safe to call from threads."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
        content = np.frombuffer(self._read_record(number), np.uint8)
        with self._lock:
            if number not in self._cache:
                self._cache[number] = content
                self._room -= content.size + RECORD_OVERHEAD
                while self._room < 0 and len(self._cache) > 1:
                    oldest = self._cache.popitem(last=False)[1]
                    self._room += oldest.size + RECORD_OVERHEAD
        return content

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes ``[start, stop)`` of the line of documents, uint8."""
        parts = []
        number = int(np.searchsorted(self.record_ends, start, side="right"))
        while start < stop:
            end = int(self.record_ends[number])
            record = self.record(number)
            begin = end - record.size
            parts.append(record[start - begin : stop - begin])
            start, number = min(end, stop), number + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint8)

    def records(self) -> Iterator[np.ndarray]:
        """Every record in order, past the cache: for one walk over all of the text."""
        for number in range(len(self.record_ends)):
            yield np.frombuffer(self._read_record(number), np.uint8)

    def document(self, number: int) -> bytes:
        """All bytes of one document."""
        start = int(self.ends[number - 1]) if number else 0
        return self.read(start, int(self.ends[number])).tobytes()

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for number, name in enumerate(self.documents):
            yield name, self.document(number)


@dataclass(frozen=True)
class TextSet:
    """The splits of one corpus, where they lie, and what is known about them.

    `about` holds name, licence, description, sha256 and what was announced at preparation.
    `cache` is a directory for what is derived from the set.
    """

    splits: dict[str, TextSplit]
    about: dict
    cache: Path

    def __getitem__(self, split: str) -> TextSplit:
        return self.splits[split]


def record_reader(source: Sequence, feature: str) -> Callable[[int], bytes]:
    """Read one record of a TFDS data source as bytes, whatever type the feature decodes to."""

    def read(number: int) -> bytes:
        text = source[number][feature]
        if isinstance(text, str):
            return text.encode()
        return bytes(text) if isinstance(text, bytes) else text.tobytes()

    return read
