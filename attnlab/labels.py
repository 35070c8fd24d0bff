"""Names written beside the points of a plot so that they cover neither points nor each other."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

RADII = (7.0, 13.0, 21.0, 31.0, 43.0, 57.0, 73.0)  # from point to label, in typographic points
FAR = 15.0  # from here on a line leads from the label to its point
MARKER = 5.0  # half the side of the square that a point keeps free


class Box(NamedTuple):
    """A rectangle in typographic points from the corner of the figure."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """Area in common."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, other: "Box") -> float:
        """Area that does not lie in ``other``."""
        return (self.right - self.left) * (self.top - self.bottom) - self.overlap(other)


def write_labels(
    axes: Any,
    points: Mapping[str, tuple[float, float]],
    colours: Mapping[str, str],
    size: float = 8,
) -> None:
    """Writes each name beside its point (x, y), in its colour.

    Call it when nothing will move the axes any more: limits, scales and layout are taken as they
    are. Cost: about 100 places are tried for each name against every other.
    """
    figure = axes.figure
    scale = 72 / figure.dpi
    renderer = figure.canvas.get_renderer()
    frame = _box(axes.get_window_extent(renderer), scale)
    centres = {
        n: [scale * float(z) for z in axes.transData.transform(p)] for n, p in points.items()
    }
    texts = {
        name: axes.annotate(name, points[name], color=colours[name], fontsize=size, zorder=5)
        for name in points
    }
    extents = {n: _box(text.get_window_extent(renderer), scale) for n, text in texts.items()}
    taken = [Box(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in centres.values()]
    # From the right, where names have least room.
    for name in sorted(points, key=lambda n: -centres[n][0]):
        box = extents[name]
        width, height = box.right - box.left, box.top - box.bottom
        place = choose_place(centres[name], width, height, taken, frame)
        taken.append(place)
        texts[name].remove()
        x, y = centres[name]
        dx, dy = (place.left + place.right) / 2 - x, (place.bottom + place.top) / 2 - y
        far = _gap(place, x, y) >= FAR
        line = {"arrowstyle": "-", "color": colours[name], "lw": 0.6, "alpha": 0.7, "shrinkB": 3}
        text = axes.annotate(
            name,
            points[name],
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            color=colours[name],
            fontsize=size,
            arrowprops=line if far else None,
            zorder=5,
        )
        text.set_in_layout(False)


def choose_place(
    centre: Sequence[float], width: float, height: float, taken: Sequence[Box], frame: Box
) -> Box:
    """The nearest place for a label of that size at ``centre`` [2] that is free and in the frame;
    where there is none, the one that covers least."""

    def cost(box: Box) -> float:
        return sum(map(box.overlap, taken)) + 10 * box.outside(frame)

    best = None
    for box in _places(centre, width, height):
        covered = cost(box)
        if covered < 1e-6:
            return box
        if best is None or covered < best[0]:
            best = covered, box
    assert best is not None
    return best[1]


def _places(centre: Sequence[float], width: float, height: float) -> Iterator[Box]:
    """Boxes around a point, from near to far; right, left, above and below first."""
    x, y = centre
    for radius in RADII:
        for turn in (0, 8, 4, 12, 2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11):
            angle = turn * math.pi / 8
            dx = math.cos(angle) * (radius + width / 2)
            dy = math.sin(angle) * (radius + height / 2)
            yield Box(
                x + dx - width / 2, y + dy - height / 2, x + dx + width / 2, y + dy + height / 2
            )


def _gap(box: Box, x: float, y: float) -> float:
    dx = max(box.left - x, 0.0, x - box.right)
    dy = max(box.bottom - y, 0.0, y - box.top)
    return math.hypot(dx, dy)


def _box(extent: Any, scale: float) -> Box:
    return Box(*(scale * float(z) for z in extent.extents))
