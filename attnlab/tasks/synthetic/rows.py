"""Batches of rows, each a document of its own, and rows of held-out splits at any length."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from attnlab.data.prefetch import prefetch
from attnlab.tasks import check_sizes


class Rows(ABC):
    """Rows of ``recipe``. None of a held-out split is ever trained on; one that is made up, see
    `splits`, is not drawn twice but by chance."""

    def __init__(self, recipe: Any, *, seed: int, length: int, batch: int):
        check_sizes(seed, length, batch)
        recipe.check(length)
        self.recipe, self.seed, self.length, self.batch_size = recipe, seed, length, batch
        self.name = type(recipe).__module__.rpartition(".")[2]
        self.vocab_size = recipe.vocab_size

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """int32: tokens, pos, seg [rows N]; targets [rows N] (-1: nothing is asked) or [rows]. Of
        points, float32 tokens [rows N 2] and targets [rows m]."""
        every = range(self.batch_size)[rows if rows is not None else slice(None)]
        drawn = self.draw("train", step, every, self.length)
        return {name: drawn[name] for name in ("tokens", "targets", "pos", "seg")}

    def batches(
        self, start_step: int = 0, rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches from a step on, made ahead by threads; ``close()`` it to end them."""
        return prefetch(lambda step: self.batch(step, rows), start_step)

    @abstractmethod
    def draw(
        self, split: str, step: int, rows: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        """Those rows of the batch of a step of any split; also ``depth`` where the task has it."""

    def size(self, split: str) -> int | None:
        """How many rows a split has; None where there are as many as one asks for."""
        return None

    def info(self) -> dict:
        """The options of the task."""
        return {"task": self.name, **asdict(self.recipe)}
