"""A batch that is being written: tokens, what is asked, and where the answers stand."""

import numpy as np


class Sheet:
    """``tokens`` [R N] begins as 0, ``targets`` as -1, ``depth`` as NaN. Places and ids are [R n]
    or whatever broadcasts to it."""

    def __init__(self, rows: int, length: int):
        self.tokens = np.zeros((rows, length), np.int32)
        self.targets = np.full((rows, length), -1, np.int32)
        self.depth: np.ndarray | None = None
        self._rows = np.arange(rows)[:, None]

    def write(self, at: np.ndarray, ids: np.ndarray | int) -> None:
        self.tokens[self._rows, at] = ids

    def ask(self, at: np.ndarray, answers: np.ndarray, items: np.ndarray | None = None) -> None:
        """The outputs at ``at`` must be ``answers``, which stand in the tokens ``items``."""
        self.targets[self._rows, at] = answers
        if items is not None:
            length = self.targets.shape[1]
            if self.depth is None:
                self.depth = np.full(self.targets.shape, np.nan, np.float32)
            self.depth[self._rows, at] = items / max(1, length - 1)

    def result(self) -> dict[str, np.ndarray]:
        depth = {} if self.depth is None else {"depth": self.depth}
        return {"tokens": self.tokens, "targets": self.targets, **depth}
