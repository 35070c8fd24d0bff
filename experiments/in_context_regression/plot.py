"""Draws docs/images/in_context_regression.png from results.json.

python experiments/in_context_regression/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "in_context_regression.png"
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#7a4e9e")
ORACLES = {
    "zero": ("0, whatever is asked", {"color": "#9a9a9a", "ls": ":"}),
    "least_squares": ("least squares", {"color": "#edae49", "ls": "--"}),
    "ridge": ("ridge, the least there is", {"color": "#3b3b3b", "ls": "--"}),
}


def main() -> None:
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    models, dim = results["models"], results["sizes"]["task"]["dim"]
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    rows = next(iter(models.values()))["by_examples"]
    x = [row["examples"] for row in rows]
    for key, (label, style) in ORACLES.items():
        axes.plot(x, [row[key] for row in rows], label=label, lw=1.5, **style)
    for (name, model), colour in zip(models.items(), COLOURS):
        y = [row["model"] for row in model["by_examples"]]
        axes.plot(x, y, color=colour, marker="o", ms=3.5, lw=1.8, label=f"Transformer, {name}")
    axes.axvline(dim, color="#cccccc", lw=1)
    axes.annotate(f" {dim} unknowns", (dim, 0.007), color="#6f6f6f", fontsize=8)
    axes.set_yscale("log")
    axes.set(xlim=(0, x[-1]), ylim=(0.006, 4))
    axes.set(xlabel="examples seen", ylabel="squared error of the next y, held-out rows")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
