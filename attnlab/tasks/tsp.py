"""Travelling salesman in the plane: in which order are all points visited on the shortest tour?

The tour begins at point 0 and goes toward the smaller of its two neighbours. An answer is right if
it is as short; ``tour_length`` is in sides of the square and ``tour_ratio`` beside that of the
shortest tour, on average over the answers that visit every point once, which all of a
`attnlab.pointer.PointerNetwork` do. Published: 2.12 and 2.87 for the shortest tours of 5 and of 10
points.

Source: Vinyals et al. 2015, arXiv 1506.03134; Held and Karp 1962.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from attnlab.errors import UserError
from attnlab.registry import register
from attnlab.tasks.synthetic.points import Pointing

MOST = 12
"""Points of which the shortest tour is found."""
CHUNK = 64  # rows at a time: 2^11 subsets x 11 ends x 64 rows are 11 MB


@register
@dataclass(frozen=True)
class Tsp(Pointing):
    """``min_points`` to length points, at most `MOST`, uniform in the unit square.
    Cost: O(n² 2^n) a row."""

    complete = True
    beams = 3

    def steps(self, length: int) -> int:
        return length + 1

    def check(self, length: int) -> None:
        super().check(length)
        if length > MOST:
            raise UserError(
                f"length={length}: the shortest tour is found of at most {MOST} points; use less"
            )

    def solve(self, points: np.ndarray) -> Iterable[np.ndarray]:
        for start in range(0, len(points), CHUNK):
            yield from map(turn_tour, find_tours(points[start : start + CHUNK]))

    def judge(self, points: np.ndarray, found: np.ndarray, true: np.ndarray) -> dict[str, float]:
        shortest = measure_tour(points[true])
        whole = np.array_equal(np.sort(found), np.arange(len(points)))
        length = measure_tour(points[found]) if whole else np.nan
        right = length <= shortest * (1 + 1e-9)
        return {"accuracy": right, "tour_length": length, "tour_ratio": length / shortest}


def measure_tour(points: np.ndarray) -> float:
    """Length of the closed tour through points [n 2] in their order."""
    return float(np.linalg.norm(points - np.roll(points, -1, 0), axis=1).sum())


def turn_tour(tour: np.ndarray) -> np.ndarray:
    """The same tour from 0 on, toward the smaller neighbour."""
    tour = np.roll(tour, -int(np.argmin(tour)))
    return np.roll(tour[::-1], 1) if tour[-1] < tour[1] else tour


def find_tours(points: np.ndarray) -> np.ndarray:
    """Shortest tours int [R n] of points [R n 2], by Held and Karp.

    best[S, j] = min over i in S - j of best[S - j, i] + far[i, j]: the shortest way from point 0
    through the set S (bits, of points 1 .. n - 1) that ends at j in S.
    """
    far = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
    R, n, _ = far.shape
    among, home = far[:, 1:, 1:], far[:, 0, 1:]
    best = np.full((R, 1 << (n - 1), n - 1), np.inf)
    bits = np.arange(n - 1)
    for subset in range(1, 1 << (n - 1)):
        ends = bits[(subset >> bits) & 1 == 1]
        if len(ends) == 1:
            best[:, subset, ends[0]] = home[:, ends[0]]
        else:
            without = best[:, subset ^ (1 << ends)]  # [R ends n-1]
            best[:, subset, ends] = (without + among[:, ends]).min(-1)
    tours = np.zeros((R, n), int)
    each, subset, onward = np.arange(R), np.full(R, (1 << (n - 1)) - 1), home
    for place in range(n - 1, 0, -1):
        last = (best[each, subset] + onward).argmin(-1)
        tours[:, place] = last + 1
        subset, onward = subset ^ (1 << last), among[each, last]
    return tours
