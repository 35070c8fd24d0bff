"""Pictures of a run, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GREYS = ("#8c8c8c", "#595959", "#262626")
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#edae49", "#7a4e9e", "#3b3b3b")


def _axes(width: float = 8, height: float = 4.5):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)


def plot_training(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    baselines: Mapping[str, float] | None = None,
) -> None:
    """Bits per byte against the step: training (thin) and validation (dots) of each run, given the
    rows of its metrics.jsonl; horizontal lines for the ``baselines``."""
    figure, axes = _axes()
    lowest, ends = [], []
    for i, (name, rows) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        for key, style in (
            ("train/bits_per_byte", {"lw": 1, "alpha": 0.6}),
            ("validation/bits_per_byte", {"lw": 1.5, "marker": "o", "ms": 4}),
        ):
            points = [(r["step"], r[key]) for r in rows if key in r]
            if points:
                label = f"{name}: " * (len(runs) > 1) + key.partition("/")[0]
                axes.plot(*zip(*points), color=colour, label=label, **style)
                ends.append(points[-1][0])
                lowest.append(sorted(y for _, y in points)[len(points) // 2])
    right = max(ends, default=1)
    for (name, bits), grey in zip((baselines or {}).items(), GREYS):
        axes.axhline(bits, color=grey, ls="--", lw=1)
        axes.text(right, bits, f" {name}", color=grey, va="center", fontsize=9)
        lowest.append(bits)
    if lowest:
        values = [v for rows in runs.values() for r in rows for k, v in r.items() if "bits" in k]
        axes.set_ylim(min([*values, *lowest]) - 0.1, min(max(values), 1.6 * max(lowest)))
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.legend(frameon=False, loc="upper right")
    _save(figure, path)


def plot_contexts(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Mean bits per token against the number of tokens in sight, one curve per name; rows as
    `evaluate.Scores.summary` gives them (``low``, ``high``, ``bits_per_token``)."""
    figure, axes = _axes()
    for i, (name, rows) in enumerate(curves.items()):
        # The middle of [low, high) on a log scale; one more, because context 0 has a place too.
        x = [((r["low"] + 1) * r["high"]) ** 0.5 for r in rows]
        y = [r["bits_per_token"] for r in rows]
        axes.plot(x, y, marker="o", color=COLOURS[i % len(COLOURS)], label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in sight", ylabel="bits per token")
    axes.legend(frameon=False)
    _save(figure, path)
