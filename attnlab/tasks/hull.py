"""Convex hull: which points, in which order, enclose all others?

The corners are named counter-clockwise, from the smallest index on. An answer is right if it is the
same polygon, wherever it starts and whichever way round. ``area_coverage`` is the area of an answer
over that of the hull, on average over the answers that are simple polygons; it is none (FAIL) where
more than 1 % are not, as published.

Source: Vinyals et al. 2015, arXiv 1506.03134; the chain of Andrew 1979.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from attnlab.registry import register
from attnlab.tasks.synthetic.points import Pointing

SIMPLE = 0.99
"""The least share of simple polygons for which an area is told."""


@register
@dataclass(frozen=True)
class Hull(Pointing):
    """``min_points`` to length points, uniform in the unit square. Cost: O(n log n) a row."""

    def steps(self, length: int) -> int:
        return length + 1

    def solve(self, points: np.ndarray) -> Iterable[np.ndarray]:
        return map(find_hull, points)

    def judge(self, points: np.ndarray, found: np.ndarray, true: np.ndarray) -> dict[str, float]:
        simple = is_simple(points[found])
        area = measure_area(points[found]) / measure_area(points[true]) if simple else np.nan
        same = np.array_equal(turn_polygon(found), turn_polygon(true))
        return {"accuracy": same, "simple_polygons": simple, "area_coverage": area}

    def total(self, measures: Mapping[str, np.ndarray]) -> dict[str, float | None]:
        found = super().total(measures)
        simple = found["simple_polygons"]
        return found if simple and simple >= SIMPLE else {**found, "area_coverage": None}


def find_hull(points: np.ndarray) -> np.ndarray:
    """Indices of the corners of points [n 2], counter-clockwise from the smallest index on."""
    order, places = np.lexsort(points.T[::-1]).tolist(), points.tolist()
    corners = np.array(_chain(order, places) + _chain(order[::-1], places))
    return np.roll(corners, -int(corners.argmin()))


def _chain(order: list[int], places: list[list[float]]) -> list[int]:
    """Those of ``order`` at which one turns left, without the last."""
    kept: list[int] = []
    for i in order:
        (x, y) = places[i]
        while len(kept) > 1:
            (ax, ay), (bx, by) = places[kept[-2]], places[kept[-1]]
            if (bx - ax) * (y - ay) > (by - ay) * (x - ax):
                break
            kept.pop()
        kept.append(i)
    return kept[:-1]


def turn_polygon(corners: np.ndarray) -> np.ndarray:
    """The same polygon from its smallest index on, toward the smaller neighbour."""
    if not len(corners):
        return corners
    corners = np.roll(corners, -int(corners.argmin()))
    return np.roll(corners[::-1], 1) if corners[-1] < corners[1 % len(corners)] else corners


def measure_area(corners: np.ndarray) -> float:
    """The area inside corners [m 2], by the shoelace formula."""
    (x, y), (next_x, next_y) = corners.T, np.roll(corners, -1, 0).T
    return float(abs((x * next_y - next_x * y).sum()) / 2)


def is_simple(corners: np.ndarray) -> bool:
    """At least three corners [m 2], and no two edges meet but neighbours at their corner. O(m²)."""
    m = len(corners)
    if m < 3 or len(np.unique(corners, axis=0)) < m:
        return False
    start, stop = corners, np.roll(corners, -1, 0)
    one, other = (orient(start[:, None], stop[:, None], each[None]) for each in (start, stop))
    apart = one * other > 0  # edge j lies on one side of the line through edge i
    meet = ~apart & ~apart.T
    gap = (np.arange(m) - np.arange(m)[:, None]) % m
    return not (meet & (gap > 1) & (gap < m - 1)).any()


def orient(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """1, 0, -1 where c [... 2] lies to the left of the line from a to b, on it, to the right."""
    ab, ac = b - a, c - a
    return np.sign(ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0])
