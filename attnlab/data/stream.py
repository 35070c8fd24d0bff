"""Packing for recurrent memory: every row of the batch reads on where it stopped.

The document line is a circle; lane b starts at ``b T // B`` of it, turned by an offset drawn from
the seed, and step s reads the N predictions that follow those of step s - 1.
"""

import numpy as np

from attnlab.data.tokens import DocumentLine
from attnlab.errors import DataError


class Stream:
    """Rows of N predictions; a document keeps its ``seg`` and goes on in ``pos`` across steps.

    ``seg`` is one more than the number of documents before this one in the lane's endless walk
    over the corpus, so keys kept from an earlier step still tell their document.
    """

    def __init__(self, line: DocumentLine, *, seed: int, length: int, batch: int):
        if line.length < length:
            raise DataError(
                f"the train split has {line.length:,} predictions, fewer than one sequence of "
                f"{length:,}; lower task.length or choose a larger corpus"
            )
        self._line, self._length, self._batch = line, length, batch
        self._turn = int(np.random.default_rng(seed).integers(line.length))

    def row(self, step: int, lane: int) -> tuple[np.ndarray, ...]:
        """(tokens, targets, pos, seg), each int32 [N]."""
        total = self._line.length
        begin = self._turn + lane * total // self._batch
        start = begin + step * self._length
        read = self._line.read(start, start + self._length)
        rounds = (start + np.arange(self._length)) // total - begin // total
        seg = 1 + read.document + rounds * len(self._line.ends)
        return read.tokens, read.targets, read.pos, seg.astype(np.int32)
