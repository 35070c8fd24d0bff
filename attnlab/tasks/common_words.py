"""Common words: which words stand often in a list, by counting alone.

    w5 w2 0 w9 w5 w5 w2 0 ...   ? w5 ...         asked at ? and at what follows: w5 w2 ...

Ids: 0 filler, 1 ?, then ``words``; counts are fixed by the options and the length, the rest is
drawn. The answers are teacher forced and the last one is not written. There is no ``depth``.

Source: Hsieh et al. 2024 (RULER, arXiv 2404.06654), cwe, one token a word, without the
numbers before the words.
"""

from dataclasses import dataclass

import numpy as np

from attnlab.registry import register
from attnlab.tasks.synthetic.words import WordList


@register
@dataclass(frozen=True)
class CommonWords(WordList):
    """``common`` words stand ``often`` times each, as many others of ``words`` as fit ``seldom``
    times, fillers in the rest. Asked: the common words, in the order in which they first appear."""

    common: int = 10
    often: int = 30
    seldom: int = 3
    words: int = 256

    def __post_init__(self):
        self.require(self.common >= 1, "common must be at least 1")
        self.require(self.often > self.seldom >= 1, "often must be above seldom, seldom above 0")
        self.require(self.words >= self.common, f"words must be at least {self.common}")

    @property
    def answers(self) -> int:
        return self.common

    @property
    def shortest(self) -> int:
        return self.common * (self.often + 1)

    def counts(self, length: int) -> np.ndarray:
        fitting = (length - self.shortest) // self.seldom
        others = min(self.words - self.common, fitting)
        return np.repeat([self.often, self.seldom], [self.common, others])

    def write(self, u: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        sheet, words = self.fill(u, length)
        common = words[:, : self.common]
        first = np.argmax(sheet.tokens[:, None] == common[:, :, None], axis=2)
        return self.ask(sheet, np.take_along_axis(common, np.argsort(first, axis=1), 1))
