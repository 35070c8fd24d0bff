"""Tasks that point: some points in the plane, and which of them are named, in which order.

A task is one file with a frozen dataclass derived from `Pointing`. ``length`` is the most points of
a row and ``min_points`` the fewest; every number between is as likely. A batch holds

    tokens   float32 [rows length 2]        uniform in the unit square, 0 in empty slots
    targets  int32 [rows steps(length)]     indices of points, then ``length``: the end; then -1
    pos, seg int32 [rows length]            places in the row; 0, and -1 in empty slots

Splits are chosen by the content of the points, see `splits`. Positions at random have no two points
alike, no three on a line and no four on a circle, and the solvers count on it.

Source: Vinyals et al. 2015, arXiv 1506.03134.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attnlab.tasks.synthetic import Synthetic
from attnlab.tasks.synthetic.choices import pick
from attnlab.tasks.synthetic.rows import Rows
from attnlab.tasks.synthetic.splits import draw


@dataclass(frozen=True)
class Pointing(Synthetic):
    """What the tasks have in common. Raises `UserError` for fewer than 3 points."""

    min_points: int = 5

    kind = "pointers"
    repeats: ClassVar[bool] = False
    """A point may be named more than once."""
    complete: ClassVar[bool] = False
    """The end comes when all points are named, and not before."""
    beams: ClassVar[int] = 1
    """Sequences that are kept while decoding."""

    def __post_init__(self):
        self.require(self.min_points >= 3, "min_points must be at least 3")

    def build(self, *, seed: int, length: int, batch: int) -> "PointSets":
        return PointSets(self, seed=seed, length=length, batch=batch)

    @property
    def vocab_size(self) -> int:
        """Numbers that a point is made of."""
        return 2

    @property
    def shortest(self) -> int:
        return self.min_points

    @abstractmethod
    def steps(self, length: int) -> int:
        """The most targets of a row of at most ``length`` points, the end among them."""

    @abstractmethod
    def solve(self, points: np.ndarray) -> Iterable[np.ndarray]:
        """The indices to name, in their order, for each of points float64 [R n 2]."""

    @abstractmethod
    def judge(self, points: np.ndarray, found: np.ndarray, true: np.ndarray) -> dict[str, float]:
        """Measures of one answer, indices of points [n 2], beside the true one; ``accuracy``, 0 or
        1, is the first of them. NaN where a measure has no meaning."""

    def edges(self, named: np.ndarray) -> np.ndarray:
        """Lines that draw a sequence of indices: int [lines 2]. By default a closed polygon."""
        return np.stack([named, np.roll(named, -1)], 1)

    def draws(self, length: int) -> dict[str, int]:
        return {"count": 1, "points": 2 * length}

    def write(self, u: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        """``tokens`` and ``seg``; the targets are made for the rows of a split alone."""
        count = self.min_points + pick(u["count"], length - self.min_points + 1)
        full = np.arange(length) < count
        points = np.where(full[..., None], u["points"].reshape(-1, length, 2), 0)
        return {"tokens": points.astype(np.float32), "seg": full.astype(np.int32) - 1}

    def answer(self, drawn: Mapping[str, np.ndarray]) -> np.ndarray:
        """The ``targets`` of rows as `write` returns them."""
        tokens, count = drawn["tokens"], count_points(drawn["seg"])
        length = tokens.shape[1]
        targets = np.full((len(tokens), self.steps(length)), -1, np.int32)
        for n in np.unique(count):
            rows = np.flatnonzero(count == n)
            for row, named in zip(rows, self.solve(tokens[rows, :n].astype(np.float64))):
                targets[row, : len(named)] = named
                targets[row, len(named)] = length
        return targets

    def rows(self, rng: np.random.Generator, rows: int, length: int) -> dict[str, np.ndarray]:
        drawn = super().rows(rng, rows, length)
        return {**drawn, "targets": self.answer(drawn)}

    def measure(self, batch: Mapping[str, np.ndarray], output: np.ndarray) -> dict[str, np.ndarray]:
        """`judge` of every row: float [R] by measure. ``output`` int [R any] is written as targets
        are."""
        count = count_points(batch["seg"])
        judged = [
            self.judge(points[:n].astype(np.float64), read_named(found, n), read_named(true, n))
            for points, n, true, found in zip(batch["tokens"], count, batch["targets"], output)
        ]
        return {name: np.array([row[name] for row in judged], float) for name in judged[0]}

    def total(self, measures: Mapping[str, np.ndarray]) -> dict[str, float | None]:
        """Means over the rows where a measure has a meaning; None where there is no such row."""
        known = {name: values[np.isfinite(values)] for name, values in measures.items()}
        return {name: float(z.mean()) if len(z) else None for name, z in known.items()}


class PointSets(Rows):
    """Rows of points; ``recipe`` is a `Pointing`."""

    def draw(
        self, split: str, step: int, rows: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        drawn = draw(self.recipe, length, seed=self.seed, split=split, step=step, rows=rows)
        pos = np.broadcast_to(np.arange(length, dtype=np.int32), drawn["seg"].shape)
        return {**drawn, "targets": self.recipe.answer(drawn), "pos": pos}


def count_points(seg: np.ndarray) -> np.ndarray:
    """How many points each row has: int [R]."""
    return (seg >= 0).sum(1)


def read_named(row: np.ndarray, count: int) -> np.ndarray:
    """The indices before the first that is none of ``count`` points: the end, or padding."""
    return row[: np.argmax(np.append((row < 0) | (row >= count), True))]
