"""Batches of a synthetic task: a new one every step, and held-out rows at any length."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np

from attnlab.data.prefetch import prefetch
from attnlab.tasks import check_sizes
from attnlab.tasks.synthetic import Synthetic
from attnlab.tasks.synthetic.splits import draw


class Answers:
    """Rows of ``task``, every one a document of its own. No row is drawn twice but by chance, and
    none of a held-out split is ever trained on."""

    def __init__(self, task: Synthetic, *, seed: int, length: int, batch: int):
        check_sizes(seed, length, batch)
        self.task, self.seed, self.length, self.batch_size = task, seed, length, batch
        self.name, self.vocab_size = type(task).__module__.rpartition(".")[2], task.vocab_size
        task.check(length)

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """int32 [rows N] each: tokens, targets (-1: nothing is asked), pos, seg."""
        every = range(self.batch_size)[rows if rows is not None else slice(None)]
        drawn = self.draw("train", step, every, self.length)
        return {name: drawn[name] for name in ("tokens", "targets", "pos", "seg")}

    def batches(
        self, start_step: int = 0, rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches from a step on, made ahead by threads; ``close()`` it to end them."""
        return prefetch(lambda step: self.batch(step, rows), start_step)

    def draw(
        self, split: str, step: int, rows: Sequence[int], length: int
    ) -> dict[str, np.ndarray]:
        """Those rows of the batch of a step of any split; also ``depth`` where the task has it."""
        drawn = draw(self.task, length, seed=self.seed, split=split, step=step, rows=rows)
        pos = np.broadcast_to(np.arange(length, dtype=np.int32), drawn["tokens"].shape)
        return {**drawn, "pos": pos, "seg": np.zeros_like(pos)}

    def info(self) -> dict:
        """The options of the task."""
        return {"task": self.name, **asdict(self.task)}
