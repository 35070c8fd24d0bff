"""Draws docs/images/deconstructed.png from results.json.

python experiments/deconstructed/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "deconstructed.png"
COLOURS = {"in all layers": "#d1495b", "in turn with softmax": "#1b6ca8"}


def main() -> None:
    found = json.loads((HERE / "results.json").read_text(encoding="utf-8"))["bits_per_byte"]
    softmax = found.pop("softmax")["in all layers"]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for shift, (layers, colour) in zip((0.2, -0.2), COLOURS.items()):
        for y, variant in enumerate(reversed(found)):
            above = [a - b for a, b in zip(found[variant][layers], softmax, strict=True)]
            mean = sum(above) / len(above)
            axes.barh(y + shift, mean, 0.36, color=colour, alpha=0.55, label=None if y else layers)
            axes.plot(above, [y + shift] * len(above), ".", color=colour, ms=6)
    axes.axvline(0, color="#4a4a4a", lw=1)
    axes.set_yticks(range(len(found)), list(reversed(found)))
    axes.set(xlabel="bits per byte above softmax in all layers; dots: seeds")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
