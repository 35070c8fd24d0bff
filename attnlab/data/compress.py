"""What general compressors make of the held-out text: the floor a language model should beat.

Two readings, both in bits per byte of the held-out split::

    alone        8 |compress(held)| / |held|
    after train  8 (|compress(train + held)| - |compress(train)|) / |held|

The second is the fair one beside a trained model, as far as the compressor can look back: gzip
sees 32 KiB, bzip2 900 kB, and xz is given a window over the whole text.
"""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable

from attnlab.data.places import announce, read_json, storage_errors, write_whole
from attnlab.data.textset import TextSet
from attnlab.errors import DataError

LARGEST_WINDOW = 1 << 30


def xz(text: bytes) -> int:
    """Size after ``xz -9e``, looking back over all of the text (memory: 11 times the text)."""
    window = min(max(1 << len(text).bit_length(), 1 << 20), LARGEST_WINDOW)
    preset = 9 | lzma.PRESET_EXTREME
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": window}]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters))


COMPRESSORS: dict[str, Callable[[bytes], int]] = {
    "gzip -9": lambda text: len(gzip.compress(text, 9, mtime=0)),
    "bzip2 -9": lambda text: len(bz2.compress(text, 9)),
    "xz -9e": xz,
}


def baselines(text: TextSet, split: str = "test") -> dict[str, dict[str, float]]:
    """Compressor -> ``{"alone": bits per byte, "after_train": bits per byte}``; computed once.

    About 2 s per MB of corpus the first time. Raises `DataError` for an empty split.
    """
    path = text.cache / f"compress-{split}.json"
    kept = read_json(path)
    if kept is not None:
        return kept
    train, held = (text[name].read(0, text[name].size).tobytes() for name in ("train", split))
    if not held:
        raise DataError(f"the {split} split is empty, so there is nothing to compress")
    announce(f"compressing {len(train) + len(held):,} bytes with {', '.join(COMPRESSORS)} (once)")
    found = {}
    for name, size in COMPRESSORS.items():
        growth = size(train + held) - size(train)
        found[name] = {
            "alone": 8 * size(held) / len(held),
            "after_train": 8 * growth / len(held),
        }
    with storage_errors(path.parent):
        write_whole(path, json.dumps(found).encode())
    return found
