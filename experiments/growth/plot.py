"""Draws docs/images/growth.png from results.json.

python experiments/growth/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "growth.png"
COLOURS = ("#9a9a9a", "#d1495b", "#1b6ca8", "#2e933c", "#edae49", "#7a4e9e")
PANELS = (
    ("time of a gradient", "seconds", "processor seconds", 1.0),
    ("memory of a gradient", "bytes", "MiB", 2.0**20),
)


def main() -> None:
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    lengths = sorted({p["length"] for points in results["points"].values() for p in points})
    for axes, (title, key, unit, scale) in zip(figure.subplots(1, 2), PANELS):
        ends = {}
        for (name, points), colour in zip(results["points"].items(), COLOURS):
            x, y = [p["length"] for p in points], [p[key] / scale for p in points]
            axes.plot(x, y, color=colour, marker="o", ms=4, lw=1.8)
            ends[name] = (x[-1], y[-1], colour)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axes.minorticks_off()
        axes.set_xlim(lengths[0] * 0.9, lengths[-1] * 2.4)
        axes.set(xlabel="length N, in tokens", ylabel=unit)
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        write_names(axes, ends)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def write_names(axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Each name beside the end of its line: left of a line that ends early, else right, where
    names that would collide are moved apart."""
    low, high = axes.get_ylim()
    last, gap, floor = max(x for x, _, _ in ends.values()), (high / low) ** 0.06, 0.0
    for name, (x, y, colour) in sorted(ends.items(), key=lambda item: item[1][1]):
        if x == last:
            y = floor = max(y, floor * gap)
        side = "left" if x == last else "right"
        axes.annotate(f"  {name}  ", (x, y), color=colour, va="center", ha=side, fontsize=9)


if __name__ == "__main__":
    main()
