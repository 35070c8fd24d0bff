"""Synthetic tasks of recall: every row has an answer that is known, at any length.

A task is one file with a frozen dataclass derived from `Synthetic`; its fields are the options.
`answers.Answers` makes batches of it.
``task.rows(rng, rows, length)`` returns

    tokens   int32 [rows length]    what is read
    targets  int32 [rows length]    the answer at the position whose output must be it; else -1
    depth    float32 [rows length]  where the item asked about stands; NaN where nothing is asked

A decoder predicts ``targets[i]`` from ``tokens[: i + 1]``: a loss takes the targets as they are and
shifts nothing. Answers of several tokens are asked one after the other, those before written out
(teacher forced), in an order that the task defines. The answer to position i stands at position
depth * (length - 1), that is i - depth * (length - 1) tokens back. Tasks whose answer is a count
over the row have no ``depth``.

A row is a function of its own `width(length)` uniform numbers and of nothing else, and those are
drawn row by row: ``rows(rng, 1, length)`` is the first row of ``rows(rng, 64, length)``. No two
rows share a permutation. `rng_of` gives the stream of a row, and `splits.draw` batches whose splits
share no instance. NumPy alone; cost: O(rows * (length + vocab_size)).
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnlab.errors import UserError, did_you_mean
from attnlab.tasks import Recipe

if TYPE_CHECKING:
    from attnlab.tasks.synthetic.answers import Answers

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Synthetic(Recipe):
    """What the tasks have in common. Raises `UserError` for options or lengths that cannot be."""

    kind = "answers"

    def build(self, *, seed: int, length: int, batch: int) -> "Answers":
        from attnlab.tasks.synthetic.answers import Answers

        return Answers(self, seed=seed, length=length, batch=batch)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1."""

    @property
    @abstractmethod
    def shortest(self) -> int:
        """The least length that holds what is asked."""

    @abstractmethod
    def draws(self, length: int) -> dict[str, int]:
        """How many uniform numbers a row takes, by what they are for."""

    @abstractmethod
    def write(self, u: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Rows out of uniform numbers, ``u[name]`` [rows draws(length)[name]] in [0, 1)."""

    def check(self, length: int) -> None:
        """Raises `UserError` where ``length`` is too short."""
        if length < self.shortest:
            raise UserError(f"length={length}: {self} needs at least {self.shortest}")

    def require(self, holds: bool, mend: str) -> None:
        """Raises `UserError` naming these options and the mend, unless it ``holds``."""
        if not holds:
            raise UserError(f"{self}: {mend}")

    def width(self, length: int) -> int:
        """How many uniform numbers make a row."""
        return sum(self.draws(length).values())

    def form(self, u: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """Rows out of uniform numbers [rows width(length)]."""
        names, sizes = zip(*self.draws(length).items())
        return self.write(dict(zip(names, np.split(u, np.cumsum(sizes)[:-1], axis=1))), length)

    def rows(self, rng: np.random.Generator, rows: int, length: int) -> dict[str, np.ndarray]:
        """The next ``rows`` rows of a stream."""
        self.check(length)
        return self.form(rng.random((rows, self.width(length))), length)


def rng_of(seed: int, split: str, step: int, row: int) -> np.random.Generator:
    """The stream of one row, independent of that of any other (seed, split, step, row)."""
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown; {did_you_mean(split, SPLITS)}")
    for name, value in (("seed", seed), ("step", step), ("row", row)):
        if value < 0:
            raise UserError(f"{name}={value} must be at least 0")
    key = (SPLITS.index(split), step, row)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))
