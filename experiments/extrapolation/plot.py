"""Draws docs/images/extrapolation.png from results.json.

python experiments/extrapolation/plot.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "extrapolation.png"
COLOURS = ("#d1495b", "#1b6ca8", "#2e933c", "#edae49", "#7a4e9e", "#9a9a9a", "#3b3b3b")


def main() -> None:
    models = json.loads((HERE / "results.json").read_text(encoding="utf-8"))["models"]
    scaled = [name for name in models if name.startswith("rope, ")]
    panels = (
        ("one model per position", [name for name in models if name not in scaled]),
        ("the rotary model, read with other phases", ["rope", *scaled]),
    )
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 2, sharey=True), panels):
        ends = {}
        for name, colour in zip(names, COLOURS):
            x, y = zip(*((int(n), bits) for n, bits in models[name]["bits_per_byte"].items()))
            axes.plot(x, y, color=colour, marker="o", ms=4, lw=1.8)
            ends[name.removeprefix("rope, ")] = (y[-1], colour)
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{n}" for n in x])
        axes.minorticks_off()
        axes.set_xlim(x[0] * 0.85, x[-1] * 3)
        axes.set(xlabel="tokens of a window; training had 128")
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        write_names(axes, x[-1], ends)
    figure.axes[0].set_ylabel("bits per byte, held-out text")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def write_names(axes, x: float, ends: dict[str, tuple[float, str]]) -> None:
    """Each name right of the end of its line; names that would collide are moved up."""
    low, high = axes.get_ylim()
    gap, floor = 0.05 * (high - low), low
    for name, (y, colour) in sorted(ends.items(), key=lambda item: item[1][0]):
        y = max(y, floor)
        floor = y + gap
        axes.annotate(f"  {name}", (x, y), color=colour, va="center", fontsize=9)


if __name__ == "__main__":
    main()
