"""Which document trains and which is held out: by document, decided by names alone: by what they
say, or else by their hashes."""

import hashlib
import re
from collections.abc import Iterable, Mapping

from attnlab.errors import DataError

HELD_OUT = 0.05
TOO_LARGE = 2 * HELD_OUT
SPLITS = ("train", "validation", "test")
SAID = {"train": "train", "valid": "validation", "validation": "validation", "test": "test"}
"""Words of a name -> the split that they mean."""


def read_splits(names: Iterable[str]) -> dict[str, str] | None:
    """Document name -> split where every name says one, as ``train/1.txt`` and
    ``wiki.valid.tokens`` do, and every split is said; else None.

    A name is cut at ``/`` and ``.``; one with words of several splits says none.
    """
    found = {}
    for name in names:
        said = {SAID[word] for word in re.split(r"[/.]", name) if word in SAID}
        if len(said) != 1:
            return None
        found[name] = said.pop()
    return found if set(found.values()) == set(SPLITS) else None


def split_documents(sizes: Mapping[str, int]) -> dict[str, str]:
    """Document name -> split, for at least three documents of `sizes` bytes.

    Documents stand in the order of SHA-256 of their names; whole documents fill test until it has
    5 % of the bytes, then validation, and the rest trains. Documents with more than a tenth of all
    bytes go to the end of the order, and each split keeps at least one document.
    """
    if len(sizes) < len(SPLITS):
        raise DataError(f"{len(sizes)} documents cannot be split into {', '.join(SPLITS)}")
    total = sum(sizes.values())
    order = sorted(sizes, key=lambda name: (sizes[name] > TOO_LARGE * total, digest(name)))
    assigned = {}
    for split, kept_back in (("test", 2), ("validation", 1)):
        held = 0
        while order and (held == 0 or (held < HELD_OUT * total and len(order) > kept_back)):
            name = order.pop(0)
            assigned[name] = split
            held += sizes[name]
    return assigned | dict.fromkeys(order, "train")


def split_bytes(size: int) -> dict[str, tuple[int, int]]:
    """Split -> (start, stop) inside a document, 90 : 5 : 5, for a corpus of one or two."""
    held = max(1, int(size * HELD_OUT))
    if size < len(SPLITS):
        raise DataError(f"a document of {size} bytes cannot be split into {', '.join(SPLITS)}")
    return {
        "train": (0, size - 2 * held),
        "validation": (size - 2 * held, size - held),
        "test": (size - held, size),
    }


def digest(name: str) -> bytes:
    """The key that orders documents."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
