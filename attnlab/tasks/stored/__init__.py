"""Batches of rows that are stored: byte strings with a label each, a token for each byte.

Training goes through a set epoch after epoch, each in another order; held-out rows stand in one
order for every seed. Ids: the byte, and `PAD` in empty slots, whose ``seg`` is -1.
"""

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from attnlab.data.examples import Examples, LabelledSet
from attnlab.errors import UserError, did_you_mean
from attnlab.tasks.synthetic.rows import Rows

PAD = 256
VOCABULARY = 257


class Stored(Rows):
    """Rows of a set of ``classes`` that ``open`` opens when it is first read. What is longer than a
    row is cut."""

    def __init__(
        self,
        recipe,
        classes: int,
        open: Callable[[], LabelledSet],
        *,
        seed: int,
        length: int,
        batch: int,
    ):
        super().__init__(recipe, seed=seed, length=length, batch=batch)
        self.classes, self._open = classes, open
        self._lock, self._set = threading.Lock(), None

    def examples(self, split: str) -> Examples:
        """The strings of a split. Raises `UserError` for an unknown one."""
        with self._lock:  # batches are made by several threads
            self._set = self._set or self._open()
        if split not in self._set.splits:
            raise UserError(f"no split {split!r}; {did_you_mean(split, self._set.splits)}")
        return self._set.splits[split]

    def size(self, split: str) -> int:
        return len(self.examples(split))

    def draw(
        self, split: str, step: int, rows: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        """int32: tokens, pos, seg [rows length], targets [rows]. Of train, the rows with these
        numbers in the batch of a step; of a held-out split, those of the batch of as many rows as
        are asked for."""
        self.recipe.check(length)
        examples = self.examples(split)
        chosen = [self.choose(split, number) for number in self.count(split, step, rows)]
        tokens = np.full((len(chosen), length), PAD, np.int32)
        for row, i in zip(tokens, chosen):
            content = examples[i][:length]
            row[: len(content)] = content
        pos = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        seg = -(tokens == PAD).astype(np.int32)
        return {"tokens": tokens, "pos": pos, "seg": seg, "targets": examples.labels[chosen]}

    def count(self, split: str, step: int, rows: Sequence[int]) -> list[int]:
        """How many rows of the split come before each of these."""
        size = self.batch_size if split == "train" else len(rows)
        return [step * size + row for row in rows]

    def choose(self, split: str, number: int) -> int:
        """Which string of the split comes after ``number`` others."""
        epoch, place = divmod(number, self.size(split))
        return int(_order(self.seed, epoch, self.size(split))[place]) if split == "train" else place

    def info(self) -> dict:
        """The options of the task, and what is known of the set once it is open."""
        return super().info() | (self._set.about if self._set else {})


class Images(Stored):
    """Rows that are an image each."""

    def draw(
        self, split: str, step: int, rows: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        self.check_size(split, length)
        return super().draw(split, step, rows, length)

    def check_size(self, split: str, length: int) -> None:
        """Raises `UserError` for another length than that of an image."""
        longest = self.examples(split).longest
        if length != longest:
            raise UserError(
                f"length={length}: images of task {self.name} have {longest} pixels; "
                f"set task.length={longest}"
            )


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
