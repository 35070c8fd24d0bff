"""Selective copying: symbols scattered among fillers are put out in order, one at each marker.

    0 s1 0 0 s2 0 ... sn 0   1 1 ... 1        asked at the j-th marker: sj

Ids: 0 filler, 1 marker, 2 .. vocab - 1 symbols, drawn uniformly with repetition. The n places are a
uniform choice among the length - n before the markers. Answers are not written: the marker says
that one is due, and its number must be counted.

Source: Jing et al. 2019 (Gated Orthogonal Recurrent Units); Gu & Dao 2023 (Mamba,
arXiv 2312.00752), there with 16 symbols of 16 in 4096 tokens.
"""

from dataclasses import dataclass

import numpy as np

from attnlab.registry import register
from attnlab.tasks.synthetic import Synthetic
from attnlab.tasks.synthetic.choices import pick, shuffle
from attnlab.tasks.synthetic.sheet import Sheet


@register
@dataclass(frozen=True)
class SelectiveCopy(Synthetic):
    """``symbols`` of them, each of ``vocab`` - 2 kinds."""

    vocab: int = 18
    symbols: int = 16

    def __post_init__(self):
        self.require(self.vocab >= 3, "vocab must be at least 3")
        self.require(self.symbols >= 1, "symbols must be at least 1")

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def shortest(self) -> int:
        return 2 * self.symbols

    def draws(self, length: int) -> dict[str, int]:
        return {"symbols": self.symbols, "places": self.symbols}

    def write(self, u: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        n = self.symbols
        symbols = 2 + pick(u["symbols"], self.vocab - 2)
        places = np.sort(shuffle(u["places"], length - n)[:, :n], axis=1)
        markers = length - n + np.arange(n)
        sheet = Sheet(len(symbols), length)
        sheet.write(places, symbols)
        sheet.write(markers, 1)
        sheet.ask(markers, symbols, places)
        return sheet.result()
