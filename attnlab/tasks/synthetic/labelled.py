"""Batches of generated rows that have one label each."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attnlab.tasks import Recipe
from attnlab.tasks.synthetic import SPLITS, rng_of
from attnlab.tasks.synthetic.rows import Rows
from attnlab.tasks.synthetic.splits import split_of

PIECE = 64
"""Rows drawn at a time, whatever is asked for: so the first rows of many are the few."""


@dataclass(frozen=True)
class LabelledRecipe(Recipe):
    """Tasks whose rows are drawn until enough of them belong to a split."""

    kind = "classes"
    vocab_size: ClassVar[int]
    classes: ClassVar[int]

    def build(self, *, seed: int, length: int, batch: int) -> Rows:
        return Labelled(self, seed=seed, length=length, batch=batch)

    @abstractmethod
    def check(self, length: int) -> None:
        """Raises `UserError` for a length that cannot be."""

    @abstractmethod
    def rows(self, rng: np.random.Generator, rows: int, length: int) -> dict[str, np.ndarray]:
        """The next rows of a stream: int32 ``tokens`` and ``seg`` [rows length], -1 in empty slots,
        ``targets`` [rows]."""


class Labelled(Rows):
    """Rows with one label each; ``recipe`` is a `LabelledRecipe`."""

    @property
    def classes(self) -> int:
        return self.recipe.classes

    def draw(
        self, split: str, step: int, rows: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        """Cost: of all rows up to the last of these, 1.25 times for train and 10 times for a
        held-out split."""
        rng, wanted = rng_of(self.seed, split, step, 0), SPLITS.index(split)
        pieces, found = [], 0
        while not pieces or found <= max(rows):
            piece = self.recipe.rows(rng, PIECE, length)
            kept = split_of(piece["tokens"]) == wanted
            pieces.append({name: z[kept] for name, z in piece.items()})
            found += int(kept.sum())
        drawn = {n: np.concatenate([p[n] for p in pieces])[list(rows)] for n in pieces[0]}
        pos = np.broadcast_to(np.arange(length, dtype=np.int32), drawn["tokens"].shape)
        return {**drawn, "pos": pos}
