"""Tokenizers: bytes in, token ids out, and exactly the same bytes back."""

import json
from pathlib import Path
from typing import Protocol

import numpy as np

from attnlab.data.places import write_whole
from attnlab.data.textset import TextSet
from attnlab.errors import AttnlabError, DataError, UserError

FILE = "tokenizer.json"

ENDS = {b" \t\r": 1, b".!?": 2, b"\n": 3, b"\"')]": 0}
"""The level of the unit that a byte ends; what closes a quotation belongs to the mark before it."""


class Tokenizer(Protocol):
    """`boundary` stands before the first and after the last token of a document."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def boundary(self) -> int: ...
    def encode(self, text: bytes) -> np.ndarray:
        """Token ids, without boundaries."""
        ...

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes of the ids; boundaries vanish. Raises `ValueError` for an id out of range."""
        ...

    def save(self, directory: Path) -> None:
        """Write ``tokenizer.json``, from which `load` makes an equal tokenizer."""
        ...


class ByteTokenizer:
    """Ids 0..255 are the bytes, 256 is the document boundary."""

    name = "bytes"
    vocab_size = 257
    boundary = 256

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> bytes:
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() > self.boundary):
            raise ValueError(f"token ids must lie in 0..{self.boundary}")
        return ids[ids != self.boundary].astype(np.uint8).tobytes()

    def save(self, directory: Path) -> None:
        save_tokenizer(directory, {"name": self.name})


def save_tokenizer(directory: Path, record: dict) -> None:
    """Write ``tokenizer.json`` whole."""
    write_whole(directory / FILE, json.dumps(record).encode())


def load(directory: Path) -> Tokenizer:
    """The tokenizer saved in a directory. Raises `DataError` when there is none to read."""
    path = directory / FILE
    try:
        record = json.loads(path.read_bytes())
        if record["name"] == ByteTokenizer.name:
            return ByteTokenizer()
        from attnlab.data.bpe import BytePairTokenizer

        return BytePairTokenizer(record["name"], record["model"])
    except AttnlabError:
        raise
    except Exception as error:  # the library raises bare exceptions for a description it rejects
        raise DataError(f"no readable tokenizer at {path}; train again to write one") from error


def make_tokenizer(spec: str, text: TextSet) -> Tokenizer:
    """``bytes``, or ``bpe:SIZE`` trained on the train split once and then kept beside the corpus.

    Raises `UserError` for another name or a size that is no size.
    """
    if spec == ByteTokenizer.name:
        return ByteTokenizer()
    size_of(spec)
    from attnlab.data.bpe import open_bpe

    return open_bpe(spec, text)


def size_of(spec: str) -> int:
    """How many ids a tokenizer has, which is known without its corpus.

    Raises `UserError` as `make_tokenizer`.
    """
    if spec == ByteTokenizer.name:
        return ByteTokenizer.vocab_size
    if spec.startswith("bpe:"):
        from attnlab.data.bpe import parse_size

        return parse_size(spec)
    raise UserError(f"no tokenizer {spec!r}; known: bytes, bpe:SIZE such as bpe:4096")


def marks_of(tokenizer: Tokenizer) -> bytes:
    """What each token id says about units of text, see `attnlab.core.Mechanism.marked`.

    White space ends a word, ``.``, ``!`` and ``?`` a sentence, a line feed or the boundary a
    paragraph, wherever they stand; white space in front of other bytes begins a word.
    """
    level = {byte: end for group, end in ENDS.items() for byte in group}
    marks = bytearray()
    for number in range(tokenizer.vocab_size):
        content = tokenizer.decode(np.asarray([number]))
        body = content.rstrip(bytes(level))
        ends = max((level[byte] for byte in content[len(body) :]), default=0)
        begins = int(body != b"" and level.get(body[0]) == 1)
        marks.append(3 if number == tokenizer.boundary else 4 * begins + ends)
    return bytes(marks)
