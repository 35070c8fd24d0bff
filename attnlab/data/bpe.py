"""Byte-pair encoding over raw bytes, through the optional package `tokenizers`.

Byte b is handed to the library as the character U+00b, so text is never decoded as UTF-8 and any
bytes come back exactly. Words, numbers, marks and white space are kept apart before merging; runs
are cut at 32 bytes, so one endless line costs no more than prose.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attnlab.data.places import MANIFEST, announce, publish, storage_errors, verify
from attnlab.data.textset import TextSet
from attnlab.data.tokenizers import Tokenizer, load, save_tokenizer
from attnlab.errors import DataError, UserError

_LETTER = "A-Za-z\u0080-\u00ff"
_SPACE = " \\t\\n\\r\\x0b\\x0c"
PATTERN = (
    f" ?[{_LETTER}]{{1,32}}| ?[0-9]{{1,3}}| ?[^{_LETTER}0-9{_SPACE}]{{1,32}}"
    f"|[{_SPACE}]{{1,32}}(?![^{_SPACE}])|[{_SPACE}]"
)
SMALLEST = 258
PIECES_AT_ONCE = 32


def library() -> Any:
    """The package `tokenizers`. Raises `UserError` that says how to install it."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "task.tokenizer=bpe:SIZE needs the package 'tokenizers': pip install 'attnlab[bpe]'"
        ) from error
    return tokenizers


class BytePairTokenizer:
    """``bpe:SIZE``: SIZE - 1 byte strings and the document boundary, which is id SIZE - 1.

    `model` is the library's own description of the tokenizer (parsed JSON). A corpus too small for
    SIZE tokens leaves the ids between its last token and the boundary unused.
    """

    def __init__(self, name: str, model: dict):
        self.name = name
        self.model = model
        self.vocab_size = parse_size(name)
        self.boundary = self.vocab_size - 1
        self._encoder = library().Tokenizer.from_str(json.dumps(model))
        self._strings = [b""] * self.vocab_size
        for token, number in self._encoder.get_vocab().items():
            if number >= self.boundary:
                raise DataError(f"{name}: token id {number} does not fit below {self.boundary}")
            self._strings[number] = token.encode("latin-1")

    @property
    def digest(self) -> str:
        """Names what this tokenizer made: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.model, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, text: bytes) -> np.ndarray:
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[bytes]) -> list[np.ndarray]:
        """Encode several texts at once, on all cores."""
        found = self._encoder.encode_batch([text.decode("latin-1") for text in texts])
        return [np.asarray(encoding.ids, np.int32) for encoding in found]

    def decode(self, ids: np.ndarray) -> bytes:
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(f"token ids must lie in 0..{self.vocab_size - 1}")
        return b"".join(self._strings[number] for number in ids.tolist())

    def save(self, directory: Path) -> None:
        save_tokenizer(directory, {"name": self.name, "model": self.model})


def parse_size(spec: str) -> int:
    """SIZE of ``bpe:SIZE``. Raises `UserError` when it is no number or too small."""
    size = spec.removeprefix("bpe:")
    if not (size.isascii() and size.isdigit()) or int(size) < SMALLEST:
        raise UserError(f"task.tokenizer={spec!r}: SIZE must be a number from {SMALLEST} up")
    return int(size)


def train(spec: str, pieces: Iterator[bytes]) -> BytePairTokenizer:
    """Learn the merges from pieces of text."""
    tokenizers = library()
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE())
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=parse_size(spec) - 1,
        initial_alphabet=[chr(byte) for byte in range(256)],
        show_progress=False,
    )
    encoder.train_from_iterator((piece.decode("latin-1") for piece in pieces), trainer)
    return BytePairTokenizer(spec, json.loads(encoder.to_str()))


def open_bpe(spec: str, text: TextSet) -> Tokenizer:
    """The tokenizer of this corpus: trained on the train split once, then read back."""
    size = parse_size(spec)
    library()
    directory = text.cache / f"bpe-{size}"

    def fill(temporary: Path) -> dict:
        announce(f"training {spec} on {text['train'].size:,} bytes (once)")
        made = train(spec, (record.tobytes() for record in text["train"].records()))
        made.save(temporary)
        return {"tokenizer": spec}

    if not (directory / MANIFEST).is_file():
        publish(directory, fill)
    verify(directory)
    return load(directory)


class StoredTokens:
    """Token ids in one file, mapped into memory; document i ends at `ends[i]`."""

    def __init__(self, ids: np.ndarray, ends: np.ndarray):
        self.ids, self.ends = ids, ends

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids ``[start, stop)``."""
        return self.ids[start:stop]


def stored_tokens(text: TextSet, split: str, tokenizer: Tokenizer) -> StoredTokens:
    """Token ids of a split, encoded once and kept beside the corpus.

    Raises `DataError` for a damaged file or an id that the tokenizer does not have.
    """
    assert isinstance(tokenizer, BytePairTokenizer)
    directory = text.cache / f"tokens-{tokenizer.digest}-{split}"
    if not (directory / MANIFEST).is_file():
        publish(directory, lambda temporary: encode_split(text, split, tokenizer, temporary))
    verify(directory)
    ends = np.load(directory / "ends.npy", allow_pickle=False)
    ids = np.load(directory / "ids.npy", mmap_mode="r", allow_pickle=False)
    if ids.size and int(ids.max()) >= tokenizer.boundary:
        raise DataError(
            f"{directory / 'ids.npy'} holds token id {int(ids.max())}, but {tokenizer.name} ends "
            f"at {tokenizer.boundary - 1}; remove the directory {directory} and run again"
        )
    return StoredTokens(ids, ends)


def encode_split(text: TextSet, split: str, tokenizer: BytePairTokenizer, directory: Path) -> dict:
    """Write ``ids.npy`` and ``ends.npy`` of a split."""
    announce(f"encoding the {split} split with {tokenizer.name} (once)")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    counts = []
    with storage_errors(directory.parent):
        with (directory / "ids.raw").open("wb") as file:
            for group in grouped(record.tobytes() for record in text[split].records()):
                for ids in tokenizer.encode_all(group):
                    file.write(ids.astype(dtype).tobytes())
                    counts.append(len(ids))
        record_ends = np.cumsum(counts, dtype=np.int64)
        np.save(directory / "ends.npy", record_ends[text[split].last_records], allow_pickle=False)
        total = int(record_ends[-1]) if counts else 0
        with_header(directory / "ids.raw", directory / "ids.npy", dtype, total)
    return {"tokenizer": tokenizer.name, "dtype": str(dtype), "tokens": total}


def with_header(raw: Path, path: Path, dtype: np.dtype, count: int) -> None:
    """Turn a file of numbers, whose count is known only at its end, into an ``.npy`` file."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(count,))
    if count:
        out[:] = np.memmap(raw, dtype=dtype, mode="r")
        out.flush()
    raw.unlink()


def grouped(pieces: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Pieces in lists of `PIECES_AT_ONCE`."""
    group: list[bytes] = []
    for piece in pieces:
        group.append(piece)
        if len(group) == PIECES_AT_ONCE:
            yield group
            group = []
    if group:
        yield group
