"""Frequent words: the words of a list by how often they stand in it.

    w5 w2 0 w9 w5 w5 w2 0 ...   ? w5 ...         asked at ? and at what follows: w5 w2 ...

Ids: 0 filler, 1 ?, then ``words``; counts are fixed by the options and the length, the rest is
drawn. The answers are teacher forced and the last one is not written. There is no ``depth``.

Source: Hsieh et al. 2024 (RULER, arXiv 2404.06654), fwe, one token a word.
"""

from dataclasses import dataclass

import numpy as np

from attnlab.errors import UserError
from attnlab.registry import register
from attnlab.tasks.synthetic.words import WordList


@register
@dataclass(frozen=True)
class FrequentWords(WordList):
    """Counts fall as rank^-``power``: of n places, rank r has floor(n r^-power / sum_s s^-power)
    over the ranks s up to ``words`` + 1. Rank 1 and what rounding leaves are fillers. Asked: the
    ``asked`` most frequent words, ranks 2 and up, the most frequent first. Raises `UserError` for
    a length at which two of those counts, or the next, are equal."""

    asked: int = 3
    power: float = 2.0
    words: int = 64

    def __post_init__(self):
        self.require(self.asked >= 1, "asked must be at least 1")
        self.require(self.power > 0, "power must be above 0")
        self.require(self.words >= self.asked, f"words must be at least {self.asked}")

    @property
    def answers(self) -> int:
        return self.asked

    @property
    def shortest(self) -> int:
        return 2 * self.asked

    def check(self, length: int) -> None:
        super().check(length)
        counts = np.append(self.counts(length), [0] * (self.asked + 1))
        if (np.diff(counts[: self.asked + 1]) == 0).any():
            raise UserError(f"length={length}: {self} has equal counts; a longer row has not")

    def counts(self, length: int) -> np.ndarray:
        ranks = np.arange(1, self.words + 2) ** -float(self.power)
        counts = ((length - self.asked) * ranks / ranks.sum()).astype(int)[1:]
        return counts[counts > 0]

    def write(self, u: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        sheet, words = self.fill(u, length)
        return self.ask(sheet, words[:, : self.asked])
