"""Draws docs/images/needle.png from results.json.

python experiments/needle/plot.py
"""

import json
import math
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "needle.png"


def main() -> None:
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    trained = results["sizes"]["growth"][-1][0]
    figure = Figure(figsize=(3.1 * len(results["rows"]) + 1, 3.6), layout="constrained")
    panels = figure.subplots(1, len(results["rows"]), sharey=True)
    for axes, (name, row) in zip(panels, results["rows"].items()):
        image = draw(axes, row)
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_xlabel(f"tokens; trained on {trained}")
    panels[0].set_ylabel("depth of the needle, from")
    figure.colorbar(image, ax=panels, label="answers right")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def draw(axes, row: dict):
    """One heat map, length by depth."""
    lengths = row["lengths"]
    depths = sorted({cell["low"] for each in lengths.values() for cell in each["by_depth"]})
    grid = [[math.nan] * len(lengths) for _ in depths]
    for column, each in enumerate(lengths.values()):
        for cell in each["by_depth"]:
            grid[depths.index(cell["low"])][column] = cell["accuracy"]
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    for y, values in enumerate(grid):
        for x, value in enumerate(values):
            if math.isfinite(value):
                ink = "black" if value > 0.6 else "white"
                text = f"{100 * value:.0f}"
                axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=8)
    names = [n if int(n) < 1024 else f"{int(n) // 1024}k" for n in lengths]
    axes.set_xticks(range(len(lengths)), names, fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
    return image


if __name__ == "__main__":
    main()
