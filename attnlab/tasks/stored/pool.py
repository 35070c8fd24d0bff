"""Rows that take long to make up, drawn once and kept with the corpora.

A pool is drawn in parts of `PART` rows, each a stream of its own that depends on the task's options
and the length alone: a larger pool has all that a smaller one has, an interrupted one goes on where
it stopped, and a part that is there is whole (see `attnlab.data.places.publish`).
"""

import hashlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attnlab.data.examples import Example, Examples, LabelledSet, open_examples, write_examples
from attnlab.data.places import MANIFEST, announce, data_dir, publish, storage_errors, verify

PART = 5000


def draw_pool(recipe: Any, length: int) -> LabelledSet:
    """``recipe.pool`` rows for training, out of as many parts as that takes, and the held-out rows
    of those parts; which split a row is in, its content says.

    ``recipe`` is a `LabelledRecipe` whose rows are all of their length, of bytes, with a ``pool``
    and a ``revision`` that grows when its rows change. Raises `DataError` for a part that is
    damaged or cannot be written.
    """
    home, directories, rows, drawn = pool_directory(recipe, length), [], 0, 0
    while rows < recipe.pool:
        number = len(directories)
        directories.append(home / f"{number:05d}")
        if not (directories[-1] / MANIFEST).is_file():
            if drawn % 4 == 0:
                announce(f"drawing {recipe.pool:,} rows once, into {home}: {rows:,} are there")
            publish(directories[-1], partial(draw_part, recipe, length, number))
            drawn += 1
        rows += verify(directories[-1])["rows"]["train"]
    splits = open_examples(directories)
    splits["train"] = Examples(directories, "train", recipe.pool)
    classes = tuple(map(str, range(recipe.classes)))
    return LabelledSet(splits, classes, {"rows": {s: len(e) for s, e in splits.items()}})


def pool_directory(recipe: Any, length: int) -> Path:
    """Where the parts of a pool lie: another place for other rows, the same for every size."""
    name = type(recipe).__module__.rpartition(".")[2]
    options = {key: value for key, value in asdict(recipe).items() if key != "pool"}
    key = hashlib.sha256(f"{recipe.revision} {PART} {length} {options}".encode()).hexdigest()
    return data_dir() / "drawn" / f"{name}-{length}-{key[:16]}"


def draw_part(recipe: Any, length: int, number: int, directory: Path) -> dict:
    """Writes the part with that number into an empty directory; what the manifest should say."""
    rows = recipe.rows(np.random.default_rng([length, number]), PART, length)
    strings = rows["tokens"].astype(np.uint8)
    examples = [Example(s.tobytes(), int(label)) for s, label in zip(strings, rows["targets"])]
    with storage_errors(directory.parent):
        return {"rows": write_examples(directory, examples)}
