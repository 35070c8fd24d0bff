"""Draws docs/images/growth.png from results.json.

python experiments/growth/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "growth.png"
COLOURS = ("#9a9a9a", "#d1495b", "#1b6ca8", "#2e933c", "#edae49", "#7a4e9e")
PANELS = (("seconds", "processor seconds", 1.0), ("bytes", "MiB", 2.0**20))


def main() -> None:
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (key, unit, scale) in zip(figure.subplots(1, 2), PANELS):
        for (name, points), colour in zip(results["points"].items(), COLOURS):
            x, y = [p["length"] for p in points], [p[key] / scale for p in points]
            axes.plot(x, y, color=colour, marker="o", ms=4, lw=1.8)
            label = f" {name} (N^{results['exponents'][name][key]:.1f})"
            axes.annotate(label, (x[-1], y[-1]), color=colour, va="center", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = [p["length"] for points in results["points"].values() for p in points]
        axes.set_xticks(sorted(set(lengths)), [f"{n // 1024}k" for n in sorted(set(lengths))])
        axes.minorticks_off()
        axes.set_xlim(min(lengths) * 0.9, max(lengths) * 3.4)
        axes.set(xlabel="length N, in tokens", ylabel=unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    first, second = figure.axes
    first.set_title("time of a gradient", loc="left", fontsize=11)
    second.set_title("memory of a gradient", loc="left", fontsize=11)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
