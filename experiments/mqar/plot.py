"""Draws docs/images/mqar.png from results.json.

python experiments/mqar/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "mqar.png"
COLOURS = {
    "softmax": "#3b3b3b",
    "linear": "#d1495b",
    "delta": "#1b6ca8",
    "window": "#edae49",
    "dynamic_mask": "#2e933c",
}


def main() -> None:
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    points = results["rows"].values()
    pairs = sorted({row["pairs"] for row in points})
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    panels = figure.subplots(1, len(pairs), sharey=True)
    for axes, count in zip(panels, pairs):
        draw(axes, [row for row in points if row["pairs"] == count], count)
        axes.set_title(
            f"{count} pairs in {results['sizes']['task.length']} tokens", loc="left", fontsize=11
        )
    panels[0].set_ylabel("answers right")
    panels[0].legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1.0, 0.44))
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def draw(axes, points: list[dict], pairs: int) -> None:
    """A line for every mechanism: what it answers by what it remembers."""
    for name, colour in COLOURS.items():
        rows = [row for row in points if row["attention"] == name]
        rows.sort(key=lambda row: row["state_bytes"])
        kibibytes = [row["state_bytes"] / 1024 for row in rows]
        accuracy = [row["accuracy"] for row in rows]
        axes.plot(kibibytes, accuracy, color=colour, marker="o", ms=5, lw=1.8, label=name)
    axes.axhline(1 / pairs, color="#9a9a9a", lw=1, ls="--")
    where = {"xytext": (0.98, 1 / pairs + 0.015), "textcoords": axes.get_yaxis_transform()}
    axes.annotate("any value of the row", (1, 0), **where, ha="right", color="#6a6a6a", fontsize=9)
    axes.set(xscale="log", xlim=(1, 40))
    axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.minorticks_off()
    axes.set(ylim=(0, 1.03), xlabel="state of the second layer, KiB (float32)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
