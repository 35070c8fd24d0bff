"""A list of words with given counts, and a question about it.

    w5 w2 0 w9 w5 w5 w2 0 ...   ? w5 ...         asked at ? and at what follows: w5 w2 ...

Ids: 0 filler, 1 ?, then ``words``. The list is a multiset whose counts are fixed by the options and
the length; which words have them and where they stand is drawn anew, uniformly, for every row. The
answers are teacher forced and the last one is not written. There is no ``depth``.
"""

from abc import abstractmethod

import numpy as np

from attnlab.tasks.synthetic import Synthetic
from attnlab.tasks.synthetic.choices import shuffle
from attnlab.tasks.synthetic.sheet import Sheet

QUERY, WORDS = 1, 2  # ids; the first of the words


class WordList(Synthetic):
    """What such tasks share."""

    words: int

    @property
    def vocab_size(self) -> int:
        return WORDS + self.words

    @abstractmethod
    def counts(self, length: int) -> np.ndarray:
        """How often each word of a row stands in its list, those asked for first."""

    def draws(self, length: int) -> dict[str, int]:
        return {"words": len(self.counts(length)), "order": length - self.answers}

    @property
    @abstractmethod
    def answers(self) -> int:
        """How many words are asked for."""

    def fill(self, u: dict[str, np.ndarray], length: int) -> tuple[Sheet, np.ndarray]:
        """The list and its query; and the words of the row [R n], in the order of `counts`."""
        counts = self.counts(length)
        hay = length - self.answers
        words = WORDS + shuffle(u["words"], self.words)[:, : len(counts)]
        fillers = np.zeros((len(words), hay - counts.sum()), np.int32)
        listed = np.concatenate([np.repeat(words, counts, axis=1), fillers], axis=1)
        sheet = Sheet(len(words), length)
        order = np.argsort(u["order"], axis=1)
        sheet.write(np.arange(hay), np.take_along_axis(listed, order, 1))
        sheet.write(np.array([hay]), QUERY)
        return sheet, words

    def ask(self, sheet: Sheet, answers: np.ndarray) -> dict[str, np.ndarray]:
        asked = sheet.tokens.shape[1] - self.answers + np.arange(self.answers)
        sheet.write(asked[1:], answers[:, :-1])
        sheet.ask(asked, answers)
        return sheet.result()
