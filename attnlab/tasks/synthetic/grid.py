"""Places in small images at twice their resolution: what is taken, and how strokes are inked.

A point is a complex number, x + iy in pixels. A place is an index into an image of doubled size,
laid out line by line, with a margin that nothing within reach of a curve leaves.
"""

from functools import cache

import numpy as np

FINE = 2  # cells of a pixel, along each side


class Grid:
    """Images of ``size`` pixels with ``margin`` pixels around them."""

    def __init__(self, size: int, margin: float):
        self.size, self.margin = size, int(np.ceil(FINE * margin))
        self.side = FINE * size + 2 * self.margin

    def cells(self, points: np.ndarray) -> np.ndarray:
        """The place of each point, int64 of the same shape."""
        y, x = (np.floor(FINE * z).astype(np.int64) for z in (np.imag(points), np.real(points)))
        return (y + self.margin) * self.side + x + self.margin

    def centres(self, cells: np.ndarray) -> np.ndarray:
        """The point in the middle of each place."""
        y, x = np.divmod(cells, self.side)
        return ((x + 1j * y) - (1 + 1j) * (self.margin - 0.5)) / FINE

    def disc(self, radius: float) -> np.ndarray:
        """What to add to a place for all those within ``radius`` pixels of it, int64 [K]."""
        return _disc(self.side, FINE * radius)

    def border(self, padding: int) -> np.ndarray:
        """bool [places]: True in the margin and within ``padding`` pixels of it."""
        taken = np.ones((self.side, self.side), bool)
        inside = slice(self.margin + FINE * padding, self.side - self.margin - FINE * padding)
        taken[inside, inside] = False
        return taken.ravel()


class Field:
    """What curves must keep off, in each of some images: places nearer than ``clear`` pixels to
    anything drawn. ``rows`` are numbers of images throughout."""

    def __init__(self, grid: Grid, rows: int, clear: float, padding: int):
        self.grid, self.clear = grid, clear
        self._blank = grid.border(padding)
        self.taken = np.tile(self._blank, (rows, 1))

    def wipe(self, rows: np.ndarray) -> None:
        """Nothing is drawn any more."""
        self.taken[rows] = self._blank

    def avoid(self, rows: np.ndarray, points: np.ndarray, radius: float = 0.0) -> None:
        """Keep off discs of that radius around the points [rows K]."""
        around = self.grid.disc(self.clear + radius)
        self.taken[rows[:, None, None], self.grid.cells(points)[..., None] + around] = True

    def is_clear(self, rows: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Whether none of the points [rows ... K] is taken: bool [rows ...]."""
        first = rows.reshape(-1, *(1,) * (points.ndim - 1))
        return np.logical_not(np.any(self.taken[first, self.grid.cells(points)], -1))


def ink(
    grid: Grid,
    strokes: np.ndarray,
    drawn: np.ndarray,
    discs: np.ndarray,
    *,
    thickness: float,
    radius: float,
    contrast: float,
) -> np.ndarray:
    """uint8 [rows size size]: strokes [rows K 2], of which those ``drawn`` [rows K] exist, at
    ``contrast``, under discs [rows D] at 1; 1 is white. Strokes do not touch each other.

    Inked at the doubled resolution with soft edges, reduced by a Lanczos filter, and clipped.
    """
    fine = np.zeros((len(strokes), grid.side**2))
    row, which = np.nonzero(drawn)
    ends = strokes[row, which]
    reach = np.abs(ends[:, 1] - ends[:, 0]).max(initial=0.0) / 2 + thickness / 2 + 1
    cells = grid.cells(ends.mean(1))[:, None] + grid.disc(reach)
    shade = np.clip(FINE * (thickness / 2 - distance(grid.centres(cells), ends)) + 0.5, 0, 1)
    stroke, at = np.nonzero(shade)
    fine[row[stroke], cells[stroke, at]] = contrast * shade[stroke, at]
    cells = grid.cells(discs)[..., None] + grid.disc(radius + 1)
    row, which, at = np.nonzero(np.abs(grid.centres(cells) - discs[..., None]) <= radius)
    fine[row, cells[row, which, at]] = 1
    inside = slice(grid.margin, grid.side - grid.margin)
    fine = fine.reshape(-1, grid.side, grid.side)[:, inside, inside]
    reduction = lanczos(grid.size)
    return np.clip(255 * (reduction @ fine @ reduction.T), 0, 255).astype(np.uint8)


def distance(points: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """From points [D K] to the lines between ``ends`` [D 2]: [D K]."""
    start, line = ends[:, :1], ends[:, 1:] - ends[:, :1]
    along = np.real((points - start) * np.conj(line)) / np.abs(line) ** 2
    return np.abs(points - start - np.clip(along, 0, 1) * line)


@cache
def _disc(side: int, radius: float) -> np.ndarray:
    reach = int(radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return (y * side + x)[y * y + x * x <= radius**2]


@cache
def lanczos(size: int) -> np.ndarray:
    """[size, 2 size]: rows of sinc(x) sinc(x/3), |x| < 3 pixels, that sum to 1."""
    fine = (np.arange(FINE * size) + 0.5) / FINE
    x = fine - (np.arange(size)[:, None] + 0.5)
    weight = np.sinc(x) * np.sinc(x / 3) * (np.abs(x) < 3)
    return weight / weight.sum(1, keepdims=True)
