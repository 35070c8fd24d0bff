"""Packing for training on shuffled chunks: fixed-length windows of the document line.

Epoch e turns the circular line by an offset drawn from (seed, e), cuts it into ``T // N`` windows
and visits them in an order drawn from (seed, e). Row r of all rows ever read is window
``r mod (T // N)`` of epoch ``r // (T // N)``: any row of any step is found without the ones before
it. An epoch leaves out fewer than N predictions, others each time.
"""

import numpy as np

from attnlab.data.tokens import DocumentLine
from attnlab.errors import DataError


class Packed:
    """Rows of N predictions; ``pos`` starts at 0 and ``seg`` at 1 in every row."""

    def __init__(self, line: DocumentLine, *, seed: int, length: int, batch: int):
        import grain

        if line.length < length:
            raise DataError(
                f"the train split has {line.length:,} predictions, fewer than one sequence of "
                f"{length:,}; lower task.length or choose a larger corpus"
            )
        self.windows = line.length // length
        self._line, self._length, self._batch, self._seed = line, length, batch, seed
        # Past the end of an epoch, the order goes on with the next epoch's permutation.
        self._order = grain.MapDataset.range(self.windows).seed(seed).shuffle().repeat()

    def row(self, step: int, lane: int) -> tuple[np.ndarray, ...]:
        """(tokens, targets, pos, seg), each int32 [N]."""
        number = step * self._batch + lane
        window = self._order[number]
        assert window is not None
        start = self.offset(number // self.windows) + int(window) * self._length
        read = self._line.read(start, start + self._length)
        starts = np.flatnonzero(np.diff(read.document, prepend=-1) | (read.pos == 0))
        piece = np.zeros(self._length, np.int32)
        piece[starts] = 1
        seg = np.cumsum(piece, dtype=np.int32)
        pos = np.arange(self._length, dtype=np.int32) - starts[seg - 1].astype(np.int32)
        return read.tokens, read.targets, pos, seg

    def offset(self, epoch: int) -> int:
        """How far the line is turned in an epoch."""
        return int(np.random.default_rng([self._seed, epoch]).integers(self._line.length))
