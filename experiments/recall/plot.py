"""Draws docs/images/recall.png from results.json.

python experiments/recall/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "recall.png"
TITLES = {"mqar": "4 pairs in 64 tokens", "needle": "4 needles in 64 tokens"}
CHANCE = 1 / 4
"""Of who names any value of the row."""


def main() -> None:
    rows = json.loads((HERE / "results.json").read_text(encoding="utf-8"))["rows"]
    figure = Figure(figsize=(11, 11), layout="constrained")
    panels = figure.subplots(1, len(TITLES), sharey=True)
    order = sorted(rows, key=lambda name: rows[name]["mqar"]["state_bytes"])
    for axes, (task, title) in zip(panels, TITLES.items()):
        found = [rows[name][task] for name in order]
        y = range(len(order))
        accuracy = [row["accuracy"] for row in found]
        low, high = zip(*(row["accuracy_95"] for row in found))
        axes.hlines(y, low, high, color="#9aa7b5", lw=2)
        axes.plot(accuracy, y, "o", color="#1b6ca8", ms=5)
        axes.axvline(CHANCE, color="#9a9a9a", lw=1, ls="--")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xlim=(0, 1.02), ylim=(-0.7, len(order) - 0.3), xlabel="answers right")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    labels = [f"{name}  {rows[name]['mqar']['state_bytes'] / 1024:.1f}" for name in order]
    panels[0].set_yticks(range(len(order)), labels, fontsize=9)
    panels[0].set_ylabel("mechanism, KiB of state in the second layer after 64 tokens")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
