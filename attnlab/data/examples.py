"""Labelled byte strings on disk, texts or images: arrays that are mapped and never read whole.

For each split three files: ``SPLIT-content.npy`` uint8, all strings one after the other,
``SPLIT-ends.npy`` int64 [n], where each ends, ``SPLIT-labels.npy`` int32 [n].
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnlab.data.splits import SPLITS

MODES: dict[str, Any] = {"content": "r", "ends": None, "labels": None}
"""What is mapped; a map costs a file handle, so the rest is read."""


class Example(NamedTuple):
    """A string and the number of its class; ``split`` where its source has said so itself."""

    content: bytes
    label: int
    split: str = "train"


class Examples:
    """The strings of one split, those of several directories one after the other, or the first
    ``most`` of them."""

    def __init__(self, directories: Sequence[Path], split: str, most: int | None = None):
        self._content, self._ends, labels = (
            [np.load(d / f"{split}-{name}.npy", mode, allow_pickle=False) for d in directories]
            for name, mode in MODES.items()
        )
        self._first = np.cumsum([0, *map(len, labels)])
        self.labels = np.concatenate(labels)[:most]
        self.longest = max(
            (int(np.diff(e, prepend=0).max()) for e in self._ends if len(e)), default=0
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        """The bytes of one string, uint8."""
        part = int(np.searchsorted(self._first, number, side="right")) - 1
        ends, place = self._ends[part], number - self._first[part]
        start = ends[place - 1] if place else 0
        return self._content[part][start : ends[place]]


@dataclass(frozen=True)
class LabelledSet:
    """The splits of a set, the names of its ``classes`` by their number, and what a report should
    say about it."""

    splits: dict[str, Examples]
    classes: tuple[str, ...]
    about: dict


def open_examples(directories: Sequence[Path]) -> dict[str, Examples]:
    """The splits of directories that `write_examples` wrote."""
    return {split: Examples(directories, split) for split in SPLITS}


def write_examples(directory: Path, examples: Iterable[Example]) -> dict[str, int]:
    """Writes a set; how many strings each split has. Of equal strings the first is kept, so that no
    two splits share one, and within a split they stand in the order of their SHA-256.

    Held-out splits that no example names are taken out of train, see `split_of`. All strings are in
    memory at once.
    """
    kept: dict[bytes, Example] = {}
    named = set()
    for example in examples:
        kept.setdefault(hashlib.sha256(example.content).digest(), example)
        named.add(example.split)
    missing = [split for split in SPLITS if split not in named]
    places = {digest: split_of(digest, kept[digest].split, missing) for digest in sorted(kept)}
    counts = {}
    for split in SPLITS:
        chosen = [kept[digest] for digest, place in places.items() if place == split]
        arrays = {
            "content": np.frombuffer(b"".join(e.content for e in chosen), np.uint8),
            "ends": np.cumsum([len(e.content) for e in chosen], dtype=np.int64),
            "labels": np.array([e.label for e in chosen], np.int32),
        }
        for name, array in arrays.items():
            np.save(directory / f"{split}-{name}.npy", array, allow_pickle=False)
        counts[split] = len(chosen)
    return counts


def split_of(digest: bytes, split: str, missing: Collection[str]) -> str:
    """The split of a string with that SHA-256: its own, but of those in train every tenth goes to
    test and every tenth to validation, where the set has none."""
    if split != "train":
        return split
    tenth = {0: "test", 1: "validation"}.get(int.from_bytes(digest[:8], "big") % 10, "train")
    return tenth if tenth in missing else "train"
