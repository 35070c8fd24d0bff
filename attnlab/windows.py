"""How documents are cut into windows, and windows gathered into batches.

A line is (number of the document, its ids [boundary, tokens, boundary]); target t is id t + 1.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

Line = tuple[int, np.ndarray]


class Window(NamedTuple):
    """Targets [start, stop) of a document, of which those from ``first`` on are scored."""

    start: int
    first: int
    stop: int


class Piece(NamedTuple):
    """One row of a batch: a window of a document."""

    document: int
    window: Window
    line: np.ndarray


def cut_windows(targets: int, length: int, stride: int) -> Iterator[Window]:
    """Windows that score each of ``targets`` tokens exactly once, ``stride`` by ``stride``; all are
    full where the document is long enough."""
    done = 0
    while done < targets:
        stop = min(done + (stride if done else length), targets)
        yield Window(max(0, stop - length), done, stop)
        done = stop


def side_by_side(
    lines: Iterable[Line], length: int, stride: int, batch: int
) -> Iterator[list[Piece | None]]:
    """Batches of windows that know nothing of each other."""
    pieces = (
        Piece(number, window, line)
        for number, line in lines
        for window in cut_windows(len(line) - 1, length, stride)
    )
    while chunk := [piece for _, piece in zip(range(batch), pieces)]:
        yield [*chunk]


def in_lanes(lines: Iterable[Line], length: int, batch: int) -> Iterator[list[Piece | None]]:
    """Batches in which every row reads on in its document, window after window without overlap,
    and takes the next document when it is through; None in a row that has nothing left to read.

    The rows idle that wait for the longest documents to end: a split of few documents is read in
    small batches.
    """
    waiting = iter(lines)

    def read() -> Iterator[Piece]:
        for number, line in waiting:
            targets = len(line) - 1
            for start in range(0, targets, length):
                yield Piece(number, Window(start, start, min(start + length, targets)), line)

    lanes = [read() for _ in range(batch)]
    while any(chunk := [next(lane, None) for lane in lanes]):
        yield chunk


def stack(
    chunk: list[Piece | None], length: int, batch: int, carried: bool
) -> dict[str, np.ndarray]:
    """A full [batch, length] whatever is left, so that one program serves all. Positions and
    segments are those of the window, or of the document where memory is ``carried``."""
    arrays = {name: np.zeros((batch, length), np.int32) for name in ("tokens", "targets")}
    arrays["pos"] = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    arrays["seg"] = np.full((batch, length), -1, np.int32)
    for row, piece in enumerate(chunk):
        if piece is None:
            continue
        (start, _, stop), line = piece.window, piece.line
        arrays["tokens"][row, : stop - start] = line[start:stop]
        arrays["targets"][row, : stop - start] = line[start + 1 : stop + 1]
        arrays["seg"][row, : stop - start] = piece.document + 1 if carried else 1
        arrays["pos"][row] += start if carried else 0
    return arrays
