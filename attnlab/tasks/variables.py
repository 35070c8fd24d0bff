"""Variable tracking: which names have a number, through chains of assignments.

    = a 7 x x = c 3 x : b a x x : d c ...   ? 7 a        asked at 7 and a of the end: a, b

Ids: 0 = (a name is set to a number), 1 : (a name is set to a name), 2 ?, then ``fillers`` x,
``names``, ``numbers``. Each of ``chains`` begins with (=, name, number) and goes on with ``hops``
statements (:, new name, name before). Names and numbers differ within a row. The statements of all
chains lie anywhere without overlap, uniformly but that each chain stands in its own order. At the
end ?, the number of one chain, and its hops + 1 names but the last: each is asked at the token
before it, in the order of the chain, which is that of appearance.

``depth`` is that of the name where it is first written.

Source: Hsieh et al. 2024 (RULER, arXiv 2404.06654), vt, there with one chain of four hops; one
token a word, new places in every row.
"""

from dataclasses import dataclass

import numpy as np

from attnlab.registry import register
from attnlab.tasks.synthetic import Synthetic
from attnlab.tasks.synthetic.choices import pick, place, shuffle
from attnlab.tasks.synthetic.sheet import Sheet

SET, COPY, QUERY, WORDS = 0, 1, 2, 3  # ids; the first of the fillers


@register
@dataclass(frozen=True)
class Variables(Synthetic):
    """``hops`` 0 is recall of one name by its number; more make the chain to be followed."""

    chains: int = 1
    hops: int = 4
    fillers: int = 32
    names: int = 32
    numbers: int = 32

    def __post_init__(self):
        for name, least in (("chains", 1), ("hops", 0), ("fillers", 1)):
            self.require(getattr(self, name) >= least, f"{name} must be at least {least}")
        least = self.chains * (self.hops + 1)
        self.require(self.names >= least, f"names must be at least chains * (hops + 1), {least}")
        self.require(self.numbers >= self.chains, f"numbers must be at least {self.chains}")

    @property
    def vocab_size(self) -> int:
        return WORDS + self.fillers + self.names + self.numbers

    @property
    def shortest(self) -> int:
        return 3 * self.chains * (self.hops + 1) + self.tail

    @property
    def tail(self) -> int:
        """Tokens of the query."""
        return self.hops + 2

    def draws(self, length: int) -> dict[str, int]:
        n = self.chains * (self.hops + 1)
        return {"places": n, "names": n, "numbers": self.chains, "hay": length - self.tail}

    def write(self, u: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        C, size = self.chains, self.hops + 1
        n, hay = C * size, length - self.tail
        names = WORDS + self.fillers + shuffle(u["names"], self.names)[:, :n]
        numbers = WORDS + self.fillers + self.names + shuffle(u["numbers"], self.numbers)[:, :C]
        starts = place(shuffle(u["places"], hay - 2 * n)[:, :n], 3)
        starts = np.sort(starts.reshape(-1, C, size), axis=2).reshape(-1, n)

        sources = np.roll(names, 1, axis=1)
        sources[:, ::size] = numbers
        kinds = np.where(np.arange(n) % size, COPY, SET)
        sheet = Sheet(len(names), length)
        sheet.write(np.arange(hay), WORDS + pick(u["hay"], self.fillers))
        for offset, ids in enumerate((kinds, names, sources)):
            sheet.write(starts + offset, ids)

        asked = hay + 1 + np.arange(size)
        sheet.write(np.array([hay]), QUERY)
        sheet.write(asked[:1], numbers[:, :1])
        sheet.write(asked[1:], names[:, : size - 1])
        sheet.ask(asked, names[:, :size], starts[:, :size] + 1)
        return sheet.result()
