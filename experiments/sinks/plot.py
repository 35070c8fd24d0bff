"""Draws docs/images/sinks.png from results.json.

python experiments/sinks/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "sinks.png"
COLOURS = {
    "softmax": "#3b3b3b",
    "sigmoid": "#d1495b",
    "softmax_plus_one": "#1b6ca8",
    "key_bias": "#2e933c",
}
DASHES = {"softmax_plus_one": (0, (3, 2)), "key_bias": (0, (1, 1))}
PANELS = {
    "idle": ("an idle head, first vector learned", 32),
    "fixed": ("the same, first vector fixed", 32),
    "text": ("a model of bytes, mean of 16 heads", 64),
}
"""Titles, and tokens of a row."""


def main() -> None:
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(11, 3.7), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (part, (title, size)) in zip(panels, PANELS.items()):
        for name, runs in results[part].items():
            draw(axes, name, runs)
        alike = sum(1 / n for n in range(1, size + 1)) / size
        for height, said in ((alike, "equal weights"), (results["epsilon"], "a sink")):
            axes.axhline(height, color="#9a9a9a", lw=1, ls=":")
            where = {"xycoords": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            axes.annotate(said, (1.0, height), **where, fontsize=8.5, color="#6a6a6a")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xlabel="step", ylim=(0, 1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("weight on the first token")
    panels[1].legend(frameon=False, fontsize=9, loc="upper right")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def draw(axes, name: str, runs: dict) -> None:
    """A curve for every seed."""
    style = {"color": COLOURS[name], "ls": DASHES.get(name, "-"), "marker": "o", "ms": 3, "lw": 1.5}
    for number, run in enumerate(runs.values()):
        x = [row["step"] for row in run["curve"]]
        y = [row.get("weight", row["share"]) for row in run["curve"]]
        axes.plot(x, y, **style, label=None if number else name)


if __name__ == "__main__":
    main()
