"""Draws docs/images/capacity.png from results.json.

python experiments/capacity/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "capacity.png"
COLOURS = {"hebbian": "#d1495b", "delta": "#1b6ca8", "delta, 16 passes": "#2e933c"}
SHOWN = "64"


def main() -> None:
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    rules, limit = results["rules"], results["sizes"]["relative error of a stored pair"]
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    error, nearest, stored = figure.subplots(1, 3)
    for rule, colour in COLOURS.items():
        style = {"color": colour, "marker": "o", "ms": 3.5, "lw": 1.6, "label": rule}
        rows = rules[rule][SHOWN]["rows"]
        x = [row["pairs"] / int(SHOWN) for row in rows]
        error.plot(x, [row["error"] for row in rows], **style)
        nearest.plot(x, [row["nearest"] for row in rows], **style)
        dims = [int(dim) for dim in rules[rule]]
        stored.plot(dims, [each["stored"] for each in rules[rule].values()], **style)
    error.axhline(limit, color="#9a9a9a", lw=1, ls="--")
    error.set(xscale="log", xlabel="pairs / D", title="relative squared error")
    nearest.set(xscale="log", xlabel="pairs / D", title="own value is the nearest", ylim=(0, 1.03))
    stored.set(xscale="log", yscale="log", xlabel="D", title=f"pairs of an error up to {limit}")
    stored.set_xticks(dims, dims)
    stored.minorticks_off()
    for axes in (error, nearest):
        axes.set_xticks([0.125, 0.25, 0.5, 1, 2], ["1/8", "1/4", "1/2", "1", "2"])
        axes.minorticks_off()
    for axes in (error, nearest, stored):
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    error.legend(frameon=False, fontsize=9)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
