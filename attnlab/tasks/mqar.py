"""Multi-query associative recall: pairs first, then keys whose values are asked.

    k1 v1 k2 v2 ... kK vK   k3 0 k1 0 0 0 ... k2 0 0 0       asked at each later key: its value

Ids: 0 filler, 1 .. V/2 - 1 keys, V/2 .. V - 1 values, both without replacement within a row. The
pairs are written ``passes`` times, P. What follows is S = (N - 2KP) / 2 slots of two tokens; key i
stands in the first token of slot g_i and is asked there, and its value is never written. The slots
are drawn without replacement, one key after the other, with p(g) proportional to a (g + 1)^(a - 1),
a = ``power``: at 0.01 most queries come soon after the pairs and favour short windows; 1 is
uniform.

``noise`` replaces fillers by tokens uniform in 0 .. V - 1. One may equal a key or a value of its
row: labels stay right, but nothing tells a reader of the tokens alone which keys are asked.

``depth`` is that of the value in the last pass. Chance is 1/K for who knows the values of a row.
Zoology also asks V > N, which nothing here needs.

Source: Arora et al. 2023 (Zoology, arXiv 2312.04927); passes and noise as in its generator.
"""

from dataclasses import dataclass

import numpy as np

from attnlab.errors import UserError
from attnlab.registry import register
from attnlab.tasks.synthetic import Synthetic
from attnlab.tasks.synthetic.choices import choose_weighted, pick, shuffle
from attnlab.tasks.synthetic.sheet import Sheet


@register
@dataclass(frozen=True)
class Mqar(Synthetic):
    """``pairs`` K of keys and values from ``vocab`` V; see the equation above for the others."""

    vocab: int = 256
    pairs: int = 8
    power: float = 0.01
    passes: int = 1
    noise: bool = False

    def __post_init__(self):
        self.require(self.pairs >= 1, "pairs must be at least 1")
        self.require(self.passes >= 1, "passes must be at least 1")
        self.require(self.power > 0, "power must be above 0")
        least = 2 * self.pairs + 2
        self.require(self.vocab >= least, f"vocab must be at least {least}")

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def shortest(self) -> int:
        return 2 * self.pairs * (self.passes + 1)

    def check(self, length: int) -> None:
        super().check(length)
        if length % 2:
            raise UserError(f"length={length}: {self} needs an even one")

    def slots(self, length: int) -> int:
        """Where a query may stand."""
        return length // 2 - self.pairs * self.passes

    def chances(self, length: int) -> np.ndarray:
        """p(g) of the first slot drawn [S]."""
        weights = np.arange(1, self.slots(length) + 1) ** (self.power - 1.0)
        return weights / weights.sum()

    def draws(self, length: int) -> dict[str, int]:
        fill = length if self.noise else 0
        slots = self.slots(length)
        return {"keys": self.pairs, "values": self.pairs, "slots": slots, "noise": fill}

    def write(self, u: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        K, half = self.pairs, self.vocab // 2
        keys = 1 + shuffle(u["keys"], half - 1)[:, :K]
        values = half + shuffle(u["values"], self.vocab - half)[:, :K]
        slots = choose_weighted(u["slots"], self.chances(length), K)
        sheet = Sheet(len(keys), length)
        if self.noise:
            sheet.write(np.arange(length), pick(u["noise"], self.vocab))
        pairs = 2 * np.arange(K * self.passes)
        sheet.write(pairs, np.tile(keys, self.passes))
        sheet.write(pairs + 1, np.tile(values, self.passes))
        at = 2 * (K * self.passes + slots)
        sheet.write(at, keys)
        sheet.ask(at, values, pairs[-K:] + 1)
        return sheet.result()
