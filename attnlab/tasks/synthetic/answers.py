"""Batches of a task of recall."""

from collections.abc import Sequence

import numpy as np

from attnlab.tasks.synthetic.rows import Rows
from attnlab.tasks.synthetic.splits import draw


class Answers(Rows):
    """Rows that ask at some of their positions; ``recipe`` is a `Synthetic`."""

    def draw(
        self, split: str, step: int, rows: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        drawn = draw(self.recipe, length, seed=self.seed, split=split, step=step, rows=rows)
        pos = np.broadcast_to(np.arange(length, dtype=np.int32), drawn["tokens"].shape)
        return {**drawn, "pos": pos, "seg": np.zeros_like(pos)}
