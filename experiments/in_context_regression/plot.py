"""Draws docs/images/in_context_regression.png from results.json.

python experiments/in_context_regression/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from attnlab.plots import style_of

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "in_context_regression.png"


def main() -> None:
    models = json.loads((HERE / "results.json").read_text(encoding="utf-8"))["models"]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, result) in enumerate(models.items()):
        rows = result["by_examples"]
        style = style_of(i) | {"ms": 3.5, "lw": 1.6, "label": name}
        axes.plot([row["examples"] for row in rows], [row["model"] for row in rows], **style)
    rows = next(iter(models.values()))["by_examples"]
    for key, dash in (("least_squares", "--"), ("ridge", ":")):
        label, x = key.replace("_", " "), [row["examples"] for row in rows]
        axes.plot(x, [row[key] for row in rows], color="#8c8c8c", ls=dash, label=label)
    axes.set(yscale="log", xlabel="examples seen", ylabel="squared error of the next y")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
