"""Delaunay triangulation: which triangles have no other point inside their circumcircle?

All triangles are named, one after the other: each as three ascending indices, in lexicographic
order. (The paper orders them by the centres of circles; the order by index can be read off the
triangles alone.) An answer is right if it has all triangles and no other, in whichever order;
``triangle_coverage`` is the share of the true triangles that it has.

Source: Vinyals et al. 2015, arXiv 1506.03134.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from attnlab.registry import register
from attnlab.tasks.hull import find_hull
from attnlab.tasks.synthetic.points import Pointing


@register
@dataclass(frozen=True)
class Delaunay(Pointing):
    """``min_points`` to length points, uniform in the unit square; of n points, h of them corners
    of the hull, 2 n - 2 - h triangles. Cost: O(n²) a row."""

    repeats = True

    def steps(self, length: int) -> int:
        return 3 * max(1, 2 * length - 5) + 1

    def solve(self, points: np.ndarray) -> Iterable[np.ndarray]:
        return (find_triangles(each).ravel() for each in points)

    def judge(self, points: np.ndarray, found: np.ndarray, true: np.ndarray) -> dict[str, float]:
        named, right = collect(found), collect(true)
        return {"accuracy": named == right, "triangle_coverage": len(named & right) / len(right)}

    def edges(self, named: np.ndarray) -> np.ndarray:
        triangles = named[: len(named) // 3 * 3].reshape(-1, 3)
        return triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)


def find_triangles(points: np.ndarray) -> np.ndarray:
    """int [triangles 3] of points [n 2]: ascending each, in lexicographic order.

    Of all points to the left of an edge, the third corner of its triangle is the one that sees the
    edge under the largest angle: no other lies in the circle. From an edge of the hull on, every
    new edge asks for the triangle on its other side.
    """
    a, b = find_hull(points)[:2].tolist()
    open_edges, found = [(a, b)], set()
    while open_edges:
        a, b = open_edges.pop()
        to_a, to_b = points[a] - points, points[b] - points
        area = to_a[:, 0] * to_b[:, 1] - to_a[:, 1] * to_b[:, 0]
        left = area > 0
        left[[a, b]] = False
        if not left.any():
            continue
        cotangent = np.full(len(points), np.inf)
        cotangent[left] = (to_a * to_b).sum(1)[left] / area[left]
        c = int(cotangent.argmin())
        triangle = tuple(sorted((a, b, c)))
        if triangle not in found:
            found.add(triangle)
            open_edges += [(c, b), (a, c)]
    return np.array(sorted(found))


def collect(named: np.ndarray) -> set[tuple[int, ...]]:
    """Triangles of a sequence; one or two indices that are left over are one that is never true."""
    ids = named.tolist()
    return {tuple(sorted(ids[at : at + 3])) for at in range(0, len(ids), 3)}
