"""Prepare a corpus once, then open it: a sealed directory keyed by what it was made from.

Layout under the data directory: ``prepared/NAME-KEY/`` holds the ArrayRecord shards that TFDS
wrote, ``index.json`` and the manifest; ``derived/NAME-KEY/`` what is computed from them.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attnlab.data.corpora import Source
from attnlab.data.places import MANIFEST, announce, data_dir, publish, storage_errors, verify
from attnlab.data.readers import Document
from attnlab.data.splits import SPLITS, read_splits, split_bytes, split_documents
from attnlab.data.textset import CACHE_BYTES, Index, TextSet, TextSplit, record_reader
from attnlab.errors import DataError

LAYOUT = 3


def prepared_name(source: Source) -> str:
    """Directory name: readable, and different whenever the documents or this layout differ."""
    key = hashlib.sha256(f"{LAYOUT} {source.fingerprint()}".encode()).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', source.name)[-40:].strip('-')}-{key}"


def open_corpus(source: Source) -> TextSet:
    """Open the prepared corpus, preparing it first when it is not there.

    Raises `DataError` for an empty corpus, an archive out of reach, or a damaged file.
    """
    name = prepared_name(source)
    directory = data_dir() / "prepared" / name

    def fill(temporary: Path) -> dict:
        said = prepare(source, temporary)
        if prepared_name(source) != name:
            raise changed(source.name)
        return said

    if not (directory / MANIFEST).is_file():
        publish(directory, fill)
    about = verify(directory)
    return open_directory(directory, about, data_dir() / "derived" / name)


def open_directory(directory: Path, about: dict, cache: Path) -> TextSet:
    """The splits of a prepared directory whose files are already verified."""
    index = json.loads((directory / "index.json").read_bytes())
    return TextSet(open_splits(directory / about["shards"], index), about, cache)


def open_splits(shards: Path, index: dict) -> dict[str, TextSplit]:
    """The splits that TFDS wrote, with what the index says about them."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(shards)
    splits = {}
    for split in SPLITS:
        entry = Index(**{field: tuple(values) for field, values in index[split].items()})
        reader = record_reader(builder.as_data_source(split), "text")
        splits[split] = TextSplit(entry, reader, CACHE_BYTES)
    return splits


def prepare(source: Source, directory: Path) -> dict:
    """Write shards and index of a source into an empty directory; what the manifest should say.

    The shards are read back and compared before they are trusted: a writer may lose the error of a
    full disk.
    """
    from attnlab.data import builder

    announce(f"preparing {source.name} (once)")
    began = time.monotonic()
    sizes, content_hash = measure(source)
    generators, notes = assign(source, sizes)
    progress = Progress(source.name, sum(sizes.values()))
    recorded = {s: Recorded(make, progress, builder.pieces) for s, make in generators.items()}
    with storage_errors(directory.parent):
        shards = builder.write(recorded, directory)
        index = {split: vars(made.index()) for split, made in recorded.items()}
        (directory / "index.json").write_text(json.dumps(index))
    if progress.done != progress.total:
        raise changed(source.name)
    for name, split in open_splits(shards, index).items():
        if sha256_of(split.records()) != recorded[name].digest.hexdigest():
            raise DataError(
                f"{shards} does not read back as written; check the disk and its free space"
            )
    seconds = time.monotonic() - began
    announce(
        f"prepared {source.name}: {len(sizes)} documents, {progress.done:,} bytes, {seconds:.1f} s"
    )
    return {
        "corpus": source.name,
        "licence": source.licence,
        "description": source.description,
        "sha256": content_hash,
        "shards": shards.relative_to(directory).as_posix(),
        "notes": notes,
    }


def changed(name: str) -> DataError:
    """The error for documents that were not the same from the first reading to the last."""
    return DataError(f"{name} changed while it was being prepared; run again")


def sha256_of(parts: Iterable[np.ndarray]) -> str:
    """SHA-256 of arrays of bytes, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()


def measure(source: Source) -> tuple[dict[str, int], str]:
    """Bytes of every document that is not empty, and the SHA-256 of all bytes in order."""
    sizes: dict[str, int] = {}
    digest = hashlib.sha256()
    empty = []
    for name, content in source.documents():
        if name in sizes:
            raise DataError(f"{source.name} has two documents named {name!r}")
        if content:
            sizes[name] = len(content)
        else:
            empty.append(name)
        digest.update(content)
    if empty:
        listed = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        announce(f"{source.name}: left out {len(empty)} empty documents ({listed})")
    if not sizes:
        raise DataError(
            f"{source.name} is empty: {len(empty)} documents, 0 bytes; choose other text"
        )
    return sizes, digest.hexdigest()


def assign(source: Source, sizes: dict[str, int]) -> tuple[dict[str, Callable], list[str]]:
    """Split -> function that yields its documents, and the remarks worth repeating in reports."""

    def whole(placed: dict[str, str]) -> dict[str, Callable[[], Iterator[Document]]]:
        def documents(split: str) -> Iterator[Document]:
            return ((n, c) for n, c in source.documents() if placed.get(n) == split)

        return {split: partial(documents, split) for split in SPLITS}

    def part(split: str) -> Callable[[], Iterator[Document]]:
        return lambda: (
            (f"{name}#{split}", content[slice(*split_bytes(len(content))[split])])
            for name, content in source.documents()
            if content
        )

    if said := read_splits(sizes):
        note = f"{source.name}: every document is in the split that its name says"
        announce(note)
        return whole(said), [note]
    if len(sizes) >= len(SPLITS):
        return whole(split_documents(sizes)), []
    for size in sizes.values():
        split_bytes(size)
    note = (
        f"{source.name} has {len(sizes)} document(s): split by bytes inside each, "
        "first 90 % train, then 5 % validation, last 5 % test"
    )
    announce(note)
    return {split: part(split) for split in SPLITS}, [note]


class Recorded:
    """The documents of a split, noted as they pass by on their way to the shards."""

    def __init__(self, make: Callable, progress: "Progress", pieces: Callable):
        self._make, self._progress, self._pieces = make, progress, pieces
        self._documents: list[str] = []
        self._records: list[int] = []
        self._sizes: list[int] = []
        self.digest = hashlib.sha256()

    def __call__(self) -> Iterator[Document]:
        for name, content in self._make():
            sizes = [len(piece) for piece in self._pieces(content)]
            self._documents.append(name)
            self._records.append(len(sizes))
            self._sizes.extend(sizes)
            self.digest.update(content)
            self._progress.add(len(content))
            yield name, content
        if not self._documents:
            raise changed(self._progress.name)

    def index(self) -> Index:
        """What has passed by."""
        return Index(tuple(self._documents), tuple(self._records), tuple(self._sizes))


class Progress:
    """A line every few seconds while bytes go by; plain lines, so that logs stay readable."""

    def __init__(self, name: str, total: int, every: float = 2.0):
        self.name, self.total, self.every = name, total, every
        self.done = 0
        self._last = time.monotonic()

    def add(self, count: int) -> None:
        """Count bytes; print when it is time."""
        self.done += count
        if time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            share = 100 * self.done // max(self.total, 1)
            announce(f"preparing {self.name}: {self.done:,} of {self.total:,} bytes ({share} %)")
