"""Needle in a haystack, of tokens: values are written among fillers and asked for by their key.

    x x ! k v x x x ! k' v' x ...   ? k' ? k        asked at k', k of the end: v', v

Ids: 0 ! (a needle begins), 1 ? (a query begins), then ``fillers`` x, ``names`` for keys and
``numbers`` for values. A row holds K ``keys`` with v ``values`` each: K v needles (!, key, value),
anywhere without overlap, uniformly, in fillers drawn uniformly. Names and numbers differ within a
row. Then q ``queries``: ?, key, and the values of that key but the last one, in the order in which
they stand in the row; each is asked at the token before it. The keys asked are a random choice in
random order.

| | K | v | q |
| --- | --- | --- | --- |
| passkey | 1 | 1 | 1 |
| multi-key | K | 1 | 1 |
| multi-value | 1 | v | 1 |
| multi-query | K | 1 | q |

Of length 3 K v + q (v + 1) the row is needles and nothing else, the hardest of all.

Source: Hsieh et al. 2024 (RULER, arXiv 2404.06654), niah, with one token a word, and a new
permutation in every row. Without a key to go by, chance is 1/numbers.
"""

from dataclasses import dataclass

import numpy as np

from attnlab.registry import register
from attnlab.tasks.synthetic import Synthetic
from attnlab.tasks.synthetic.choices import pick, place, shuffle
from attnlab.tasks.synthetic.sheet import Sheet

NEEDLE, QUERY, WORDS = 0, 1, 2  # ids; the first of the fillers


@register
@dataclass(frozen=True)
class Needle(Synthetic):
    """``depth`` in 0 .. 1 puts a needle of the key that is asked first there, from the first place
    that it can have to the last; None: uniform over all of them."""

    keys: int = 1
    values: int = 1
    queries: int = 1
    depth: float | None = None
    fillers: int = 32
    names: int = 32
    numbers: int = 32

    def __post_init__(self):
        for name in ("keys", "values", "queries", "fillers"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1")
        self.require(self.queries <= self.keys, f"queries must be at most keys, {self.keys}")
        self.require(self.names >= self.keys, f"names must be at least keys, {self.keys}")
        least = self.keys * self.values
        self.require(self.numbers >= least, f"numbers must be at least keys * values, {least}")
        self.require(self.depth is None or 0 <= self.depth <= 1, "depth must be in 0 .. 1")

    @property
    def vocab_size(self) -> int:
        return WORDS + self.fillers + self.names + self.numbers

    @property
    def shortest(self) -> int:
        return 3 * self.keys * self.values + self.tail

    @property
    def tail(self) -> int:
        """Tokens of the queries."""
        return self.queries * (self.values + 1)

    def draws(self, length: int) -> dict[str, int]:
        n = self.keys * self.values
        hay = length - self.tail
        return {"depth": 1, "places": n - 1, "names": self.keys, "numbers": n, "hay": hay}

    def write(self, u: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        K, v, q = self.keys, self.values, self.queries
        R, hay = len(u["names"]), length - self.tail
        names = WORDS + self.fillers + shuffle(u["names"], self.names)[:, :K]
        numbers = WORDS + self.fillers + self.names + shuffle(u["numbers"], self.numbers)
        numbers = numbers[:, : K * v].reshape(R, K, v)
        starts = self._places(u, hay - 2 * K * v).reshape(R, K, v)

        sheet = Sheet(R, length)
        sheet.write(np.arange(hay), WORDS + pick(u["hay"], self.fillers))
        for offset, ids in enumerate((NEEDLE, np.repeat(names, v, 1), numbers.reshape(R, K * v))):
            sheet.write(starts.reshape(R, K * v) + offset, ids)

        order = np.argsort(starts[:, :q], axis=2)
        answers = np.take_along_axis(numbers[:, :q], order, 2)
        items = np.take_along_axis(starts[:, :q], order, 2) + 2
        queries = hay + (v + 1) * np.arange(q)[:, None] + np.arange(v + 1)  # [q v+1]
        sheet.write(queries[:, 0], QUERY)
        sheet.write(queries[:, 1], names[:, :q])
        sheet.write(queries[:, 2:].ravel(), answers[:, :, :-1].reshape(R, q * (v - 1)))
        asked = queries[:, 1:].ravel()
        sheet.ask(asked, answers.reshape(R, q * v), items.reshape(R, q * v))
        return sheet.result()

    def _places(self, u: dict[str, np.ndarray], items: int) -> np.ndarray:
        """Where the needles begin [R K v], among ``items`` fillers and needles: the first at the
        depth, the others uniform over what is left."""
        first = pick(u["depth"], items)
        if self.depth is not None:
            first[:] = round(self.depth * (items - 1))
        others = shuffle(u["places"], items - 1)[:, : u["places"].shape[1]]
        return place(np.concatenate([first, others + (others >= first)], axis=1), 3)
