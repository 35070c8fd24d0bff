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
    "unbiased_sigmoid": "#e08e45",
    "softmax_plus_one": "#1b6ca8",
    "key_bias": "#2e933c",
}
DASHES = {"softmax_plus_one": (0, (3, 2)), "key_bias": (0, (1, 1))}
IDLE = {"idle": "an idle head, first vector learned", "fixed": "the same, first vector fixed"}
LENGTH = 32  # of its rows


def main() -> None:
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(11, 3.7), layout="constrained")
    *idle, text = figure.subplots(1, 3)
    alike = sum(1 / n for n in range(1, LENGTH + 1)) / LENGTH
    for axes, (part, title) in zip(idle, IDLE.items()):
        for name, runs in results[part].items():
            draw(axes, name, runs, "weight")
        for height, said in ((alike, "equal weights"), (results["epsilon"], "a sink")):
            axes.axhline(height, color="#9a9a9a", lw=1, ls=":")
            where = {"xycoords": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            axes.annotate(said, (1.0, height), **where, fontsize=8.5, color="#6a6a6a")
        describe(axes, title, "weight on the first token")
        axes.set_ylim(0, 1)
    for name, runs in results["subwords"].items():
        draw(text, name, runs, "sink")
    describe(text, "a language model of 18 heads", "heads and rows with a sink by shares, %")
    text.set_ylim(0)
    idle[1].legend(frameon=False, fontsize=9, loc="upper right")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def draw(axes, name: str, runs: dict, value: str) -> None:
    """A curve for every seed."""
    style = {"color": COLOURS[name], "ls": DASHES.get(name, "-"), "marker": "o", "ms": 3, "lw": 1.5}
    for number, run in enumerate(runs.values()):
        x = [row["step"] for row in run["curve"]]
        axes.plot(x, [row[value] for row in run["curve"]], **style, label=None if number else name)


def describe(axes, title: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set(xlabel="step", ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
