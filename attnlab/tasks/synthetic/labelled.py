"""Batches of generated rows that have one label each."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from attnlab.data.prefetch import prefetch
from attnlab.tasks import Recipe, check_sizes
from attnlab.tasks.synthetic import SPLITS, rng_of
from attnlab.tasks.synthetic.splits import split_of

PIECE = 64
"""Rows drawn at a time, whatever is asked for: so the first rows of many are the few."""


@dataclass(frozen=True)
class LabelledRecipe(Recipe):
    """Tasks whose rows are drawn until enough of them belong to a split."""

    kind = "classes"
    vocab_size: ClassVar[int]
    classes: ClassVar[int]

    def build(self, *, seed: int, length: int, batch: int) -> "Labelled":
        return Labelled(self, seed=seed, length=length, batch=batch)

    @abstractmethod
    def check(self, length: int) -> None:
        """Raises `UserError` for a length that cannot be."""

    @abstractmethod
    def rows(self, rng: np.random.Generator, rows: int, length: int) -> dict[str, np.ndarray]:
        """The next rows of a stream: int32 ``tokens`` and ``seg`` [rows length], -1 in empty slots,
        ``targets`` [rows]."""


class Labelled:
    """Rows of ``recipe``. No row is drawn twice but by chance, and none of a held-out split is ever
    trained on, see `splits`."""

    def __init__(self, recipe: LabelledRecipe, *, seed: int, length: int, batch: int):
        check_sizes(seed, length, batch)
        recipe.check(length)
        self.recipe, self.seed, self.length, self.batch_size = recipe, seed, length, batch
        self.name = type(recipe).__module__.rpartition(".")[2]
        self.vocab_size, self.classes = recipe.vocab_size, recipe.classes

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """int32: tokens, pos, seg [rows N] and targets [rows]."""
        every = range(self.batch_size)[rows if rows is not None else slice(None)]
        return self.draw("train", step, every, self.length)

    def batches(
        self, start_step: int = 0, rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches from a step on, made ahead by threads; ``close()`` it to end them."""
        return prefetch(lambda step: self.batch(step, rows), start_step)

    def draw(
        self, split: str, step: int, rows: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        """Those rows of the batch of a step of any split. Cost: of all rows up to the last of
        them, 1.25 times for train and 10 times for a held-out split."""
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

    def info(self) -> dict:
        """The options of the task."""
        return {"task": self.name, **asdict(self.recipe)}
