"""Retrieval of the Long Range Arena: do two texts belong together, read apart, byte by byte?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnlab.data.examples import LabelledSet
from attnlab.data.labelled import open_labelled
from attnlab.data.splits import SPLITS
from attnlab.errors import DataError, UserError
from attnlab.registry import register
from attnlab.tasks import Recipe
from attnlab.tasks.stored import PAD, VOCABULARY, Stored


@register
@dataclass(frozen=True)
class Retrieval(Recipe):
    """A row holds two texts as bytes, each in a half of its own, cut or padded: segments 0 and 1,
    whose positions both begin at 0, so that neither sees the other. Label 1 if they are of one
    class, else 0. ``source`` as in `text_classification`; the published task has papers that cite
    each other, or not, at 2 x 4,000 bytes, which no package holds: here topics stand for citations.

    In training every text of the split is the first of one pair an epoch, with another second one
    each time; held-out pairs are the same at every call and for every seed. The pairs of a split
    are made of its own texts, half of them of one class. Raises `UserError` for a row of one token,
    `DataError` for a split where a class has one text or there is one class, and what
    `attnlab.data.labelled.open_labelled` does. Source: Tay et al., arXiv 2011.04006.
    """

    source: str = "bbc"

    kind = "pairs"
    vocab_size = VOCABULARY

    def build(self, *, seed: int, length: int, batch: int) -> "Pairs":
        found = open_labelled(self.source)
        check_pairs(found, self.source)
        return Pairs(self, 2, lambda: found, seed=seed, length=length, batch=batch)

    def check(self, length: int) -> None:
        if length < 2:
            raise UserError(f"length={length}: {self} needs at least 2, a half for each text")


class Pairs(Stored):
    """Rows of two texts each."""

    def draw(
        self, split: str, step: int, rows: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        """As `Stored.draw`; ``seg`` is 0 and 1 for the two texts."""
        self.recipe.check(length)
        examples, half = self.examples(split), length // 2
        numbers = self.count(split, step, rows)
        together = np.array([number % 2 for number in numbers], np.int32)
        tokens = np.full((len(numbers), length), PAD, np.int32)
        seg = np.full_like(tokens, -1)
        for row, number in enumerate(numbers):
            first = self.choose(split, number)
            stream = self.stream(split, number)
            second = partner(examples.labels, first, bool(together[row]), stream)
            for side, i in enumerate((first, second)):
                content = examples[i][:half]
                place = slice(side * half, side * half + len(content))
                tokens[row, place], seg[row, place] = content, side
        pos = np.broadcast_to(np.arange(length, dtype=np.int32) % half, tokens.shape)
        return {"tokens": tokens, "pos": pos, "seg": seg, "targets": together}

    def stream(self, split: str, number: int) -> np.random.Generator:
        """What the second text of a pair is drawn from; that of a held-out pair knows no seed."""
        seed = self.seed if split == "train" else 0
        return np.random.default_rng([seed, SPLITS.index(split), number])


def partner(labels: np.ndarray, first: int, together: bool, rng: np.random.Generator) -> int:
    """Another text, uniform among those of the same class, or of any other."""
    wanted = (labels == labels[first]) == together
    wanted[first] = False
    return int(rng.choice(np.flatnonzero(wanted)))


def check_pairs(found: LabelledSet, source: str) -> None:
    """Raises `DataError` where a text would have no partner."""
    for split, examples in found.splits.items():
        counts = np.bincount(examples.labels, minlength=len(found.classes))
        if 1 in counts or (counts > 0).sum() < 2:
            texts = ", ".join(f"{n} {name}" for name, n in zip(found.classes, counts))
            raise DataError(
                f"{source}: {split} has {texts}; pairs need two classes, and two texts of each; "
                "choose a larger set"
            )
