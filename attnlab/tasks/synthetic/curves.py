"""Dashed curves that keep clear of each other and of themselves, in many images at once.

Points are complex numbers, x + iy in pixels. A curve grows dash by dash: the next one begins a gap
beyond the last, in a direction that turns by t with probability proportional to
cos(min(continuity |t|, pi/2))^2 among those that stay clear. ``rows`` are the numbers of the images
that are still in hand: every step returns those that could take it.
"""

from typing import NamedTuple

import numpy as np

from attnlab.tasks.synthetic.grid import Field, Grid

DIRECTIONS = np.deg2rad(np.arange(0, 360, 5))
TOWARD = np.exp(1j * DIRECTIONS)
SLACK = 1.5  # pixels of dark between curves, beyond the gap of a curve
PADDING = 1  # pixels at the border
TRIALS = 40  # places where a distractor may begin


class Geometry(NamedTuple):
    """Pixels, but for ``continuity`` and ``distractors`` (a budget in dashes)."""

    size: int
    dash: float
    gaps: tuple[float, ...]
    thickness: float
    apart: float
    radius: float
    continuity: float
    distractors: int

    @property
    def clear(self) -> float:
        """How far curves keep from each other."""
        return max(self.gaps) + self.thickness + SLACK

    @property
    def grid(self) -> Grid:
        """With room for all that is looked at or kept clear beyond the border."""
        ahead = max(self.gaps) + self.dash
        return Grid(self.size, max(ahead, self.clear) + self.radius + 1)


class Curve:
    """One curve in each image: ``dashes`` complex [rows segments 2 ends]. It stays clear of what
    ``field`` holds, and does not enter itself there."""

    def __init__(self, shape: Geometry, field: Field, gap: np.ndarray, segments: int):
        self.shape, self.field, self.gap = shape, field, gap
        self.dashes = np.zeros((len(gap), segments, 2), complex)
        self.angle = np.zeros(len(gap))
        self._share = np.linspace(0, 1, int(np.ceil(shape.dash)) + 1)

    def line(self, rows: np.ndarray, step: int) -> np.ndarray:
        """Points along a dash, a pixel apart or less: [rows K]."""
        return self._between(*self.dashes[rows, step].T)

    def begin(self, rows: np.ndarray, tails: np.ndarray, angles: np.ndarray) -> np.ndarray:
        """The first dash, from ``tails`` [rows]; whether it is clear, bool [rows]."""
        self.dashes[rows, 0] = np.stack([tails, tails + self.shape.dash * np.exp(1j * angles)], 1)
        self.angle[rows] = angles
        return self.field.is_clear(rows, self.line(rows, 0))

    def extend(
        self, rng: np.random.Generator, rows: np.ndarray, step: int, room: float = 0.0
    ) -> np.ndarray:
        """Dash number ``step``; which rows have one. ``room``: radius of a disc at its end."""
        turn = np.abs((DIRECTIONS - self.angle[rows, None] + np.pi) % (2 * np.pi) - np.pi)
        bend = self.shape.continuity * turn
        starts = self.dashes[rows, step - 1, 1, None] + self.gap[rows, None] * TOWARD
        stops = starts + self.shape.dash * TOWARD
        points = [self._between(starts, stops)]
        if room:
            points.append(stops[..., None] + room * TOWARD[::9])
        weight = np.where(bend < np.pi / 2, np.cos(bend) ** 2, 0)
        weight *= self.field.is_clear(rows, np.concatenate(points, -1))
        total = weight.cumsum(1)
        found = np.flatnonzero(total[:, -1])
        drawn = rng.random(len(found)) * total[found, -1]
        pick = (total[found] <= drawn[:, None]).sum(1)
        rows = rows[found]
        self.dashes[rows, step] = np.stack([starts[found, pick], stops[found, pick]], 1)
        self.angle[rows] = DIRECTIONS[pick]
        return rows

    def _between(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        return starts[..., None] + self._share * (stops - starts)[..., None]


def grow_pairs(
    rng: np.random.Generator, shape: Geometry, gap: np.ndarray, segments: int
) -> list[Curve]:
    """Two long curves in each image, of one gap each [rows]: begun anew until both reach their end.
    The field of the first holds all that was drawn."""
    fields = [Field(shape.grid, len(gap), shape.clear, PADDING) for _ in range(2)]
    pair = [Curve(shape, field, gap, segments) for field in fields]
    pending = np.arange(len(gap))
    while len(pending):
        for curve in pair:
            curve.field.wipe(pending)
        pending = np.setdiff1d(pending, _grow_pair(rng, shape, pair, pending, segments))
    fields[0].taken |= fields[1].taken
    return pair


def _grow_pair(
    rng: np.random.Generator, shape: Geometry, pair: list[Curve], rows: np.ndarray, segments: int
) -> np.ndarray:
    rows = _begin_pair(rng, shape, pair, rows)
    for step in range(1, segments):
        room = shape.radius if step == segments - 1 else 0.0
        for curve, other in (pair, pair[::-1]):
            rows = curve.extend(rng, rows, step, room)
            curve.field.avoid(rows, curve.line(rows, step - 1))
            other.field.avoid(rows, curve.line(rows, step))
            if room:
                other.field.avoid(rows, curve.dashes[rows, step, 1:], room)
    return rows


def _begin_pair(
    rng: np.random.Generator, shape: Geometry, pair: list[Curve], rows: np.ndarray
) -> np.ndarray:
    """Two first dashes whose outer ends lie ``apart``, each clear of the other's disc."""
    angles = rng.uniform(0, 2 * np.pi, (3, len(rows)))
    x, y = rng.uniform(2 * shape.apart, shape.size - 2 * shape.apart, (2, len(rows)))
    tails = x + 1j * y, x + 1j * y + shape.apart * np.exp(1j * angles[2])
    for curve, other in zip(pair, tails[::-1]):
        curve.field.avoid(rows, other[:, None], shape.radius)
    clear = [curve.begin(rows, *how) for curve, *how in zip(pair, tails, angles)]
    rows = rows[clear[0] & clear[1]]
    for curve, other in (pair, pair[::-1]):
        other.field.avoid(rows, curve.line(rows, 0))
    return rows


def grow_distractors(
    rng: np.random.Generator, shape: Geometry, field: Field, gap: np.ndarray, segments: int
) -> tuple[np.ndarray, np.ndarray]:
    """As many short curves as find room, up to the budget: dashes complex [rows K 2], and which of
    them are drawn, bool [rows K]."""
    curves, drawn = [], []
    for _ in range(shape.distractors // segments):
        curve, done = Curve(shape, field, gap, segments), np.zeros(len(gap), bool)
        for _ in range(TRIALS):
            rows = np.flatnonzero(~done)
            x, y = rng.uniform(0, shape.size, (2, len(rows)))
            angles = rng.uniform(0, 2 * np.pi, len(rows))
            rows = rows[curve.begin(rows, x + 1j * y, angles)]
            done[_grow(rng, curve, rows, segments)] = True
        curves.append(curve.dashes)
        drawn.append(np.repeat(done[:, None], segments, 1))
    return np.concatenate(curves, 1), np.concatenate(drawn, 1)


def _grow(rng: np.random.Generator, curve: Curve, rows: np.ndarray, segments: int) -> np.ndarray:
    """The rows whose curve reaches its end; in the others nothing is drawn."""
    field, begun, before = curve.field, rows, curve.field.taken[rows]
    for step in range(1, segments):
        rows = curve.extend(rng, rows, step)
        field.avoid(rows, curve.line(rows, step - 1))
    field.avoid(rows, curve.line(rows, segments - 1))
    lost = ~np.isin(begun, rows)
    field.taken[begun[lost]] = before[lost]
    return rows
