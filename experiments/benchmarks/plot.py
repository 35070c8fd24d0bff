"""Draws docs/images/growth.png from results.json.

python experiments/benchmarks/plot.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlab.bench.subjects import DRAWN

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "growth.png"
COLOURS = {
    "softmax": "#3b3b3b",
    "window": "#edae49",
    "linear": "#d1495b",
    "gated_delta": "#1b6ca8",
    "lsh": "#2e933c",
    "routing": "#7a4e9e",
    "favor": "#00798c",
    "compressive": "#b08968",
    "fenwick": "#9a9a9a",
}
Row = dict[str, Any]
PANELS: tuple[tuple[str, str, str, Callable[[Row], float]], ...] = (
    ("fwdbwd", "time of a gradient", "seconds", lambda row: row["wall"]["median"]),
    ("fwdbwd", "memory of a gradient", "MiB", lambda row: row["above_empty"] / 2**20),
    (
        "decode",
        "time of a token, six layers",
        "milliseconds",
        lambda row: row["wall"]["median"] / DRAWN * 1e3,
    ),
)


def main() -> None:
    rows = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if "wall" in row and not (row["threads"] or row.get("peer_of"))]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, (mode, title, unit, value) in zip(figure.subplots(1, 3), PANELS):
        draw(axes, [row for row in rows if row["mode"] == mode], value)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xlabel="length N, in tokens", ylabel=unit)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def draw(axes: Axes, rows: list[Row], value: Callable[[Row], float]) -> None:
    """One line for each mechanism, by length."""
    ends = {}
    lengths = sorted({row["length"] for row in rows})
    for name, colour in COLOURS.items():
        mine = sorted((row["length"], value(row)) for row in rows if row["label"] == name)
        if not mine:
            continue
        x, y = zip(*mine)
        axes.plot(x, y, color=colour, marker="o", ms=4, lw=1.8)
        ends[name] = (x[-1], y[-1], colour)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
    axes.minorticks_off()
    axes.set_xlim(lengths[0] * 0.85, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.45)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    write_names(axes, ends)


def write_names(axes: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Each name right of the end of its line; names that would collide are moved up."""
    low, high = axes.get_ylim()
    gap, floor = (high / low) ** 0.045, 0.0
    for name, (x, y, colour) in sorted(ends.items(), key=lambda item: item[1][1]):
        y = floor = max(y, floor * gap)
        axes.annotate(f"  {name}", (x, y), color=colour, va="center", fontsize=9)
    axes.set_ylim(low, max(high, floor * gap))


if __name__ == "__main__":
    main()
