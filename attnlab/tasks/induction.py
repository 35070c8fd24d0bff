"""Induction: a token seen before is followed by what followed it then.

    x x k1 v1 x x k2 v2 x ...   k2 k1         asked at k2, k1 of the end: v2, v1

Ids: 0 .. vocab - 1, all symbols: nothing marks a key but its return. The keys of a row are drawn
without replacement; all other tokens before the end, values included, are uniform among the symbols
that are no key, so each key stands there exactly once. The pairs lie anywhere without overlap,
uniformly; the keys at the end are in random order. Values are not written at the end.

Source: induction heads, Olsson et al. 2022 (arXiv 2209.11895); with one query, the synthetic of H3
(Fu et al. 2022, arXiv 2212.14052) and Mamba, there with one key fixed for all rows.
"""

from dataclasses import dataclass

import numpy as np

from attnlab.registry import register
from attnlab.tasks.synthetic import Synthetic
from attnlab.tasks.synthetic.choices import pick, place, shuffle
from attnlab.tasks.synthetic.sheet import Sheet


@register
@dataclass(frozen=True)
class Induction(Synthetic):
    """``queries`` keys of ``vocab`` symbols. Models learn sooner from rows that ask much."""

    vocab: int = 64
    queries: int = 1

    def __post_init__(self):
        self.require(self.queries >= 1, "queries must be at least 1")
        self.require(self.vocab > self.queries, f"vocab must be at least {self.queries + 1}")

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def shortest(self) -> int:
        return 3 * self.queries

    def draws(self, length: int) -> dict[str, int]:
        q = self.queries
        return {"keys": q, "places": q, "others": length - q}

    def write(self, u: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        q, past = self.queries, length - self.queries
        symbols = shuffle(u["keys"], self.vocab)
        keys, others = symbols[:, :q], symbols[:, q:]
        pairs = place(shuffle(u["places"], past - q)[:, :q], 2)
        sheet = Sheet(len(keys), length)
        fill = pick(u["others"], self.vocab - q)
        sheet.write(np.arange(past), np.take_along_axis(others, fill, 1))
        sheet.write(pairs, keys)
        values = np.take_along_axis(sheet.tokens, pairs + 1, 1)
        end = past + np.arange(q)
        sheet.write(end, keys)
        sheet.ask(end, values, pairs + 1)
        return sheet.result()
