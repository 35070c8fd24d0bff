"""Draws docs/images/lookup.png from results.json.

python experiments/lookup/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from attnlab.plots import style_of

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "lookup.png"


def main() -> None:
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    weights, recalled, counted = figure.subplots(1, 3, width_ratios=(1.2, 1, 0.8))
    for i, (name, rows) in enumerate(results["needle"].items()):
        look = style_of(i) | {"ms": 5, "lw": 1.8, "mew": 0}
        n = [row["n"] for row in rows]
        weights.plot(n, [row["weight"] for row in rows], label=name, **look)
    weights.set_xscale("log", base=4)
    weights.set_xticks(n, [f"{x:,}" for x in n])
    weights.minorticks_off()
    weights.set(ylim=(0, 1.02), xlabel="keys in sight, n; trained at 64")
    weights.set_title("Weight of the one key that matters", loc="left", fontsize=11)
    weights.legend(frameon=False, fontsize=9, loc="lower left")
    for axes, part, chance in ((recalled, "far", 1 / 16), (counted, "majority", 1 / 2)):
        names = list(results[part])[::-1]
        found = [results[part][name] for name in names]
        axes.barh(names, found, color="#1b6ca8", height=0.65)
        for y, value in enumerate(found):
            axes.text(value + 0.02, y, f"{value:.1%}", va="center", fontsize=8)
        axes.axvline(chance, color="#d1495b", ls=":", lw=1.2)
        axes.set(xlim=(0, 1.2), xlabel="share that is right; dotted: guessing")
    recalled.set_title("One of 160 far facts, one layer", loc="left", fontsize=11)
    counted.set_title("The majority of them", loc="left", fontsize=11)
    for axes in (weights, recalled, counted):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
