"""Copy a random string that stands before a delimiter.

    s1 s2 ... sn  0 ... 0  |  s1 ... s(n-1)        asked at | and at what follows it: s1 s2 ... sn

Ids: 0 filler, 1 the delimiter, 2 .. vocab - 1 symbols, drawn uniformly with repetition. All n
answers are teacher forced, and the last one is not written. Fillers stand only between the string
and the delimiter. Every answer stands length - n tokens back.

Source: the copying memory problem (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016,
arXiv 1511.06464), with the string written out as in Jelassi et al. 2024 (arXiv 2402.01032).
"""

from dataclasses import dataclass

import numpy as np

from attnlab.registry import register
from attnlab.tasks.synthetic import Synthetic
from attnlab.tasks.synthetic.choices import pick
from attnlab.tasks.synthetic.sheet import Sheet


@register
@dataclass(frozen=True)
class Copy(Synthetic):
    """``size`` symbols of ``vocab`` - 2; None: as many as fit, half of the length."""

    vocab: int = 64
    size: int | None = None

    def __post_init__(self):
        self.require(self.vocab >= 3, "vocab must be at least 3")
        self.require(self.size is None or self.size >= 1, "size must be at least 1")

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def shortest(self) -> int:
        return 2 * (self.size or 1)

    def draws(self, length: int) -> dict[str, int]:
        return {"string": self.size or length // 2}

    def write(self, u: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        rows, size = u["string"].shape
        string = 2 + pick(u["string"], self.vocab - 2)
        sheet = Sheet(rows, length)
        places = np.arange(size)
        answers = length - size + places
        sheet.write(places, string)
        sheet.write(answers[:1], 1)
        sheet.write(answers[1:], string[:, :-1])
        sheet.ask(answers, string, places)
        return sheet.result()
