"""Pictures of a run, as PNG files."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlab.files import replace_file
from attnlab.scores import headline_of

GREYS = ("#8c8c8c", "#6f6f6f", "#525252")
COLOURS = (
    "#1b6ca8",
    "#d1495b",
    "#2e933c",
    "#edae49",
    "#7a4e9e",
    "#3b3b3b",
    "#1aa5a0",
    "#e2762f",
    "#8c5a3c",
    "#d67bb1",
    "#93a31c",
    "#74b3e3",
)
DASHES, MARKERS = ("-", (0, (4, 1.5)), (0, (1.2, 1.2))), ("o", "s", "^")


def style_of(i: int) -> dict[str, Any]:
    """Colour, dash and marker of line ``i``: 36 that can be told apart."""
    turn = i // len(COLOURS) % len(DASHES)
    return {"color": COLOURS[i % len(COLOURS)], "ls": DASHES[turn], "marker": MARKERS[turn]}


def ink_of(i: int) -> str:
    """The colour of line ``i`` dark enough to be read as text on white."""
    colour = COLOURS[i % len(COLOURS)]
    parts = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    light = (0.3 * parts[0] + 0.59 * parts[1] + 0.11 * parts[2]) / 255
    return "#" + "".join(f"{int(part * min(1.0, 0.52 / light)):02x}" for part in parts)


def _axes(width: float = 8, height: float = 4.2):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    replace_file(path, content.getvalue())


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(r["step"], r[key]) for r in rows if math.isfinite(r.get(key, math.nan))]


def plot_training(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    baselines: Mapping[str, float] | None = None,
) -> None:
    """Bits per byte against the step: training (thin) and validation (dots) of each run, given the
    rows of its metrics.jsonl; horizontal lines for the ``baselines``. Writes a PNG."""
    figure, axes = _axes()
    shown: list[float] = list((baselines or {}).values())
    for i, (name, rows) in enumerate(runs.items()):
        look = style_of(i)
        for key, style in (
            ("train/bits_per_byte", {"lw": 1, "alpha": 0.55}),
            ("validation/bits_per_byte", {"lw": 1.5, "marker": "o", "ms": 4}),
        ):
            if points := _points(rows, key):
                label = f"{name}: " * (len(runs) > 1) + key.partition("/")[0]
                axes.plot(*zip(*points), color=look["color"], label=label, **style)
                shown += [y for _, y in points]
    for (name, bits), grey in zip((baselines or {}).items(), GREYS):
        axes.axhline(bits, color=grey, ls="--", lw=1)
        # Beside the axes, where no curve runs through the words.
        place = axes.get_yaxis_transform()
        axes.text(1.01, bits, name, color=grey, va="center", fontsize=9, transform=place)
    if shown:
        # The first steps of a byte model are at 8 bits and would flatten all that follows.
        middle = sorted(shown)[len(shown) // 2]
        top = min(max(shown), max(1.6 * middle, *(baselines or {"": 0}).values()))
        axes.set_ylim(min(shown) - 0.05 * top, 1.03 * top)
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="step", ylabel="bits per byte")
    if axes.lines[len(baselines or {}) :]:
        axes.legend(frameon=False, loc="upper right")
    else:
        axes.text(0.5, 0.5, "no step was measured", ha="center", transform=axes.transAxes)
    save_figure(figure, path)


def plot_contexts(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Mean bits per token against the number of tokens read before, one curve per name; rows as
    `evaluate.Scores.summary` gives them (``low``, ``high``, ``bits_per_token``)."""
    figure, axes = _axes()
    for i, (name, rows) in enumerate(curves.items()):
        # The middle of [low, high) on a log scale; one more, because context 0 has a place too.
        x = [((r["low"] + 1) * r["high"]) ** 0.5 for r in rows]
        y = [r["bits_per_token"] for r in rows]
        axes.plot(x, y, label=name, **style_of(i))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="tokens read before", ylabel="bits per token")
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_accuracy(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Accuracy of the validation split (dots, left) and training loss (thin, right) against the
    step, given the rows of each run's metrics.jsonl. Writes a PNG."""
    figure, axes = _axes()
    losses = axes.twinx()
    losses.spines["top"].set_visible(False)
    for i, (name, rows) in enumerate(runs.items()):
        look, prefix = style_of(i), f"{name}: " * (len(runs) > 1)
        if points := _points(rows, "train/loss"):
            losses.plot(*zip(*points), color=look["color"], lw=1, alpha=0.4)
        if points := _points(rows, "validation/accuracy"):
            axes.plot(
                *zip(*points), color=look["color"], marker="o", ms=4, label=f"{prefix}accuracy"
            )
        axes.plot([], [], color=look["color"], lw=1, alpha=0.4, label=f"{prefix}training loss")
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="step", ylabel="accuracy of the validation split", ylim=(-0.02, 1.02))
    losses.set(ylabel="nats per answer in training", ylim=(0, None))
    axes.legend(frameon=False, loc="center right")
    save_figure(figure, path)


def plot_distances(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Accuracy against the distance of the answer in tokens, one curve per name; rows as
    `answers.summarise` gives them (``low``, ``high``, ``accuracy``). Writes a PNG."""
    figure, axes = _axes()
    for i, (name, rows) in enumerate(curves.items()):
        x = [(max(r["low"], 1) * r["high"]) ** 0.5 for r in rows]
        if rows:
            axes.plot(x, [r["accuracy"] for r in rows], label=name, **style_of(i))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="tokens back to the answer", ylabel="accuracy", ylim=(-0.02, 1.02))
    if axes.lines:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "this task has no distances", ha="center", transform=axes.transAxes)
    save_figure(figure, path)


def plot_examples(examples: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows of points, each with the lines that are true (above) and those found (below); rows as
    `pointing.score_named` gives them. Writes a PNG."""
    from matplotlib.figure import Figure

    size = len(examples)
    figure = Figure(figsize=(2.1 * size, 4.6), layout="constrained")
    panels = figure.subplots(2, size, squeeze=False)
    for column, row in enumerate(examples):
        colour = COLOURS[2] if row["right"] else COLOURS[1]
        for axes, key, ink in zip(panels[:, column], ("true", "found"), (GREYS[2], colour)):
            for ends in row[key]:
                axes.plot(*zip(*(row["points"][i] for i in ends)), color=ink, lw=1.4)
            axes.plot(*zip(*row["points"]), ls="", marker="o", ms=4, mew=0, color="black")
            axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xticks=[], yticks=[], aspect="equal")
        panels[0, column].set_title(f"{len(row['points'])} points", fontsize=9)
        panels[1, column].set_xlabel("right" if row["right"] else "wrong", color=colour)
    for axes, name in zip(panels[:, 0], ("true", "found")):
        axes.set_ylabel(name)
    save_figure(figure, path)


AXES = {
    "depth": "depth of the answer",
    "distance": "tokens back to the string",
    "points": "points of a row, or more",
}
"""What recall is shown against, see `kinds.Kind.probe`."""


def plot_errors(rows: Sequence[Mapping[str, Any]], path: Path, least: float) -> None:
    """Normalised squared error of the validation split (dots) and squared error in training (thin)
    against the step, given the rows of a metrics.jsonl; ``least`` is what can be had. Writes a
    PNG."""
    figure, axes = _axes()
    for key, label, style in (
        ("train/loss", "training", {"lw": 1, "alpha": 0.45}),
        ("validation/normalised_squared_error", "validation, of E y²", {"marker": "o", "ms": 4}),
    ):
        if points := _points(rows, key):
            axes.plot(*zip(*points), color=COLOURS[0], label=label, **style)
    axes.axhline(least, color=GREYS[0], ls="--", lw=1, label="ridge")
    axes.set_yscale("log")
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="step", ylabel="squared error")
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_regression(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Squared error against the number of examples seen, of a model and of what it is compared
    with; rows as `in_context.summarise` gives them. Writes a PNG."""
    figure, axes = _axes()
    x = [(row["low"] + row["high"] - 1) / 2 for row in rows]
    looks: dict[str, dict[str, Any]] = {
        "zero": {"color": GREYS[0], "ls": ":"},
        "least_squares": {"color": COLOURS[1], "ls": "--"},
        "ridge": {"color": COLOURS[2], "ls": "--"},
        "model": {"color": COLOURS[0], "marker": "o", "ms": 3},
    }
    for name, look in looks.items():
        axes.plot(x, [row[name] for row in rows], label=name.replace("_", " "), **look)
    axes.set_yscale("log")
    top = 3 * max(row["zero"] for row in rows)  # least squares has no mean at d examples
    axes.set(xlabel="examples seen", ylabel="squared error", ylim=(None, top))
    if len(rows) > 1:
        axes.set_xlim(x[0], x[-1])
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_lengths(found: Mapping[int, Mapping[str, Any]], trained: int, path: Path) -> None:
    """The headline against the length, and recall by length and depth (or distance) as a heat map;
    by length what `kinds.Kind.probe` gives. Writes a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    line, heat = figure.subplots(1, 2)
    _headlines(line, found, trained)
    at = sorted({cell["at"] for each in found.values() for cell in each["cells"]})
    grid = [[math.nan] * len(found) for _ in at]
    for column, each in enumerate(found.values()):
        for cell in each["cells"]:
            grid[at.index(cell["at"])][column] = cell["accuracy"]
    if at:
        image = heat.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if math.isfinite(value):
                    ink = "black" if value > 0.6 else "white"
                    heat.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)
        heat.set_xticks(range(len(found)), [f"{n:,}" for n in found])
        heat.set_yticks(range(len(at)), [f"{y:g}" for y in at])
        axis = next(iter(found.values()))["axis"]
        heat.set(xlabel="tokens", ylabel=AXES[axis], title="share recalled")
        figure.colorbar(image, ax=heat)
    else:
        heat.set_axis_off()
    save_figure(figure, path)


def _headlines(axes: Any, found: Mapping[int, Mapping[str, Any]], trained: int) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("tokens")
    axes.axvline(trained, color=GREYS[0], ls="--", lw=1, label="length of training")
    if found:
        headline = headline_of(next(iter(found.values())))
        axes.plot(list(found), [each[headline.key] for each in found.values()], **style_of(0))
        axes.set_ylabel(headline.title)
        if headline.higher:
            axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False)
