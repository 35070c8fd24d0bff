"""Draws docs/images/anchor.png from results.json.

python experiments/anchor/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from attnlab.plots import save_figure, style_of

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "anchor.png"
PANELS = {"recall": "mean over queries", "fifth": "5th percentile over queries"}


def main() -> None:
    curves = json.loads((HERE / "results.json").read_text(encoding="utf-8"))["curves"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (value, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items()):
        for i, (name, rows) in enumerate(curves.items()):
            dashed = {"ls": "--"} if "," in name else {}
            axes.plot(
                [row["density"] for row in rows],
                [row[value] for row in rows],
                label=name,
                **(style_of(i) | {"ms": 4} | dashed),
            )
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xlabel="share of the visible keys that are seen", xlim=(0, 1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylabel="weight of softmax on what is seen", ylim=(0, 1.02))
    figure.axes[0].legend(frameon=False, loc="lower right")
    PICTURE.parent.mkdir(exist_ok=True)
    save_figure(figure, PICTURE)


if __name__ == "__main__":
    main()
