"""Text sets that TFDS has already prepared, read without TensorFlow.

A set is ``tfds:NAME[/CONFIG][:VERSION]``; ``tfds:DIRECTORY`` names a prepared directory itself, and
``#FEATURE`` at the end picks the text feature where a set has several. Preparing most sets of the
TFDS catalogue needs TensorFlow, so that is done once in another environment; reading the
ArrayRecord files it leaves does not.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnlab.data.places import announce, data_dir, read_json, storage_errors, write_whole
from attnlab.data.prepared import Progress
from attnlab.data.splits import HELD_OUT, SPLITS
from attnlab.data.textset import Index, TextSet, TextSplit, record_reader
from attnlab.errors import DataError, MissingError, UserError

TEXT_NAMES = ("text", "book_text", "document", "article", "content")
NAME_FEATURES = ("doc_id", "book_id", "id", "title")


def open_tfds(spec: str) -> TextSet:
    """Open a prepared set; its records are scanned once and the index is kept.

    Raises `DataError` when it is not prepared here, not in ArrayRecord, or empty; `UserError` when
    the text feature is not clear.
    """
    named, _, feature = spec.removeprefix("tfds:").partition("#")
    directory, builder = open_builder(named)
    feature = text_feature(builder.info.features, feature, named)
    key = fingerprint_of(directory, feature)
    name = re.sub(r"[^A-Za-z0-9]+", "-", named).strip("-")[-40:]
    cache = data_dir() / "derived" / f"tfds-{name}-{key[:16]}"
    sources = {s: builder.as_data_source(s) for s in SPLITS if s in builder.info.splits}
    if "train" not in sources:
        raise DataError(f"{spec} has no train split, only {sorted(builder.info.splits)}")
    index = scan(spec, sources, feature, cache / "index.json")
    places, notes = place(spec, index)
    splits = {s: open_split(index[home], kept, sources[home], feature) for s, home, kept in places}
    about = {
        "corpus": spec,
        "licence": builder.info.redistribution_info.license or "see the set's own page",
        "description": " ".join((builder.info.description or "").split())[:200],
        "sha256": index["sha256"],
        "notes": notes,
    }
    return TextSet(splits, about, cache)


def open_builder(named: str) -> tuple[Path, Any]:
    """The directory of a prepared set and the TFDS builder that reads it."""
    import tensorflow_datasets as tfds

    directory = find_directory(named)
    builder: Any = tfds.builder_from_directory(directory)
    if str(getattr(builder.info.file_format, "value", "")) != "array_record":
        raise DataError(f"{directory} is not in ArrayRecord format; {how_to_prepare(named)}")
    return directory, builder


def fingerprint_of(directory: Path, feature: str) -> str:
    """SHA-256 of what is read: names, sizes and times of the files, and the feature."""
    key = hashlib.sha256(f"{directory}#{feature}".encode())
    for path in sorted(directory.iterdir()):
        key.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns} ".encode())
    return key.hexdigest()


def find_directory(named: str) -> Path:
    """The directory with ``dataset_info.json``: as given, or the highest version in TFDS's home."""
    home = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    name, _, version = named.partition(":")
    for start in (Path(named).expanduser(), home / name / version):
        if not start.is_dir():
            continue
        found = [p.parent for p in start.glob("dataset_info.json")]
        found = found or [p.parent for p in start.glob("*/dataset_info.json")]
        if found:
            return max(found, key=version_key).absolute()
        configs = sorted({p.parent.parent.name for p in start.glob("*/*/dataset_info.json")})
        if configs:
            listed = " or ".join(f"tfds:{name}/{config}" for config in configs)
            raise UserError(f"tfds:{name} has configs; write {listed}")
    raise MissingError(f"tfds:{named} is not prepared under {home}; {how_to_prepare(name)}")


def version_key(directory: Path) -> tuple:
    """Order versions as numbers."""
    return tuple(int(part) if part.isdigit() else -1 for part in directory.name.split("."))


def how_to_prepare(name: str) -> str:
    """The one line that gets a set here."""
    return (
        'in an environment with tensorflow-cpu run: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\" "
        "and copy the directory here (TFDS_DATA_DIR names its home)"
    )


def text_feature(features: Any, wanted: str, named: str) -> str:
    """The feature that holds the text. Raises `UserError` when it is absent or not clear."""
    import tensorflow_datasets as tfds

    def is_text(feature: Any) -> bool:
        string = isinstance(feature, tfds.features.Text)
        return string or (feature.np_dtype == np.uint8 and len(feature.shape or ()) == 1)

    texts = sorted(name for name, feature in dict(features or {}).items() if is_text(feature))
    if wanted in texts:
        return wanted
    usual = texts if len(texts) == 1 else [name for name in TEXT_NAMES if name in texts]
    if usual and not wanted:
        return usual[0]
    raise UserError(
        f"which feature of tfds:{named} is the text? write tfds:{named}#FEATURE with one of {texts}"
    )


def scan(spec: str, sources: dict[str, Sequence], feature: str, path: Path) -> dict:
    """Split -> names, sizes and numbers of the records that are not empty; read once, then kept."""
    kept = read_json(path)
    if kept is not None:
        return kept
    announce(f"reading {spec} once to measure its documents")
    digest = hashlib.sha256()
    index: dict = {}
    for split, source in sources.items():
        names, sizes, numbers = [], [], []
        read = record_reader(source, feature)
        progress = Progress(f"{spec} {split} (records)", len(source))
        for number in range(len(source)):
            try:
                content = read(number)
            except Exception as error:  # whatever the reader raises, the shard is at fault
                raise DataError(
                    f"{spec}: record {number} of {split} cannot be read ({error}); prepare it again"
                ) from error
            progress.add(1)
            if content:
                digest.update(content)
                names.append(record_name(source[number], f"{split}/{number}"))
                sizes.append(len(content))
                numbers.append(number)
        if len(numbers) < len(source):
            announce(f"{spec}: left out {len(source) - len(numbers)} empty records of {split}")
        index[split] = {"names": names, "sizes": sizes, "numbers": numbers}
    index["sha256"] = digest.hexdigest()
    with storage_errors(path.parent):
        write_whole(path, json.dumps(index).encode())
    return index


def record_name(record: dict, otherwise: str) -> str:
    """The document's own name where the set has one."""
    for feature in NAME_FEATURES:
        value = record.get(feature)
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if isinstance(value, int | np.integer):
            return str(value)
    return otherwise


def place(spec: str, index: dict) -> tuple[list[tuple[str, str, slice]], list[str]]:
    """(split, split of the set, its records): missing splits come off the end of train."""
    sizes = index["train"]["sizes"]
    missing = [s for s in ("validation", "test") if not index.get(s, {}).get("sizes")]
    if len(sizes) <= len(missing):
        raise DataError(
            f"{spec}: {len(sizes)} documents in train are too few to hold out {missing}; "
            "choose a larger set"
        )
    places = [(s, s, slice(None)) for s in ("validation", "test") if s not in missing]
    ends, stop = np.cumsum(sizes), len(sizes)
    for left, split in enumerate(reversed(missing)):
        goal = ends[stop - 1] - HELD_OUT * ends[-1]
        start = int(np.searchsorted(ends[: stop - 1], goal, side="right"))
        start = max(start, len(missing) - left)
        start = min(start, stop - 1)
        places.append((split, "train", slice(start, stop)))
        stop = start
    places.append(("train", "train", slice(0, stop)))
    notes = [f"{spec} has no {s} split: the last 5 % of train stand for it" for s in missing]
    for note in notes:
        announce(note)
    return places, notes


def open_split(entry: dict, kept: slice, source: Sequence, feature: str) -> TextSplit:
    """A split from the records that were kept for it."""
    numbers = entry["numbers"][kept]
    sizes = tuple(entry["sizes"][kept])
    read = record_reader(source, feature)
    index = Index(tuple(entry["names"][kept]), (1,) * len(sizes), sizes)
    return TextSplit(index, lambda number: read(numbers[number]))
