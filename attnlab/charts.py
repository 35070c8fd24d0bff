"""Pictures of a comparison: quality against each cost, by context, by distance; and one with all.

Every function takes the entries of a `comparison.json` and leaves out what was not measured. An
entry has the same colour, dash and marker in all pictures: those of its place in the list.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attnlab.labels import write_labels
from attnlab.plots import ink_of, save_figure, style_of
from attnlab.scores import HEADLINES, headline_of

Entries = Sequence[Mapping[str, Any]]


class Cost(NamedTuple):
    """A column of numbers to plot quality against."""

    key: str
    title: str
    axis: str


SPEED = Cost("tokens_per_second", "speed", "tokens per second in training, right is better")
FLOPS = Cost("attention_flops", "FLOPs", "FLOPs of attention per training token, left is better")
STATE = Cost("decoding_bytes", "decoding memory", "bytes for one sequence, left is better")


def plot_costs(entries: Entries, path: Path) -> None:
    """Bits per byte against speed, FLOPs and decoding memory, side by side. Writes a PNG."""
    figure, panels = _figure(1, 3, 16, 5)
    drawn = [_scatter(axes, entries, cost) for axes, cost in zip(panels, (SPEED, FLOPS, STATE))]
    _finish(figure, drawn, path)


def plot_overview(entries: Entries, path: Path, title: str) -> None:
    """The comparison on one page, 16 by 9. Writes a PNG."""
    figure, (speed, state, context, recall) = _figure(2, 2, 13.33, 7.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14)
    drawn = [_scatter(speed, entries, SPEED), _scatter(state, entries, STATE)]
    _context(context, entries)
    _recall(recall, entries)
    _legend(figure, entries)
    _finish(figure, drawn, path)


def plot_context(entries: Entries, path: Path) -> None:
    """Bits per token against the tokens in sight. Writes a PNG."""
    figure, (axes,) = _figure(1, 1, 9, 5.4)
    _context(axes, entries)
    _legend(figure, entries)
    _finish(figure, [], path)


def plot_recall(entries: Entries, path: Path) -> None:
    """Recall of a planted string against its distance. Writes a PNG."""
    figure, (axes,) = _figure(1, 1, 9, 5.4)
    _recall(axes, entries)
    _legend(figure, entries)
    _finish(figure, [], path)


def format_power(number: float) -> str:
    """1,500 -> 1.5k: three digits and a decimal prefix, for an axis."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def _scatter(axes: Any, entries: Entries, cost: Cost) -> tuple[Any, dict, dict]:
    points, colours = {}, {}
    done = [entry["test"] for entry in entries if entry.get("test")]
    headline = headline_of(done[0]) if done else HEADLINES[0]
    for i, entry in enumerate(entries):
        x, y = entry.get(cost.key), (entry.get("test") or {}).get(headline.key)
        if not x or y is None or not math.isfinite(y):
            continue
        style = style_of(i)
        axes.plot([x], [y], ls="", color=style["color"], marker=style["marker"], ms=7, mew=0)
        points[entry["label"]], colours[entry["label"]] = (x, y), ink_of(i)
    _name(axes, f"Quality against {cost.title}", cost.axis, headline.title)
    if points:
        axes.set_xscale("log")
        for side, values in zip("xy", zip(*points.values())):
            _widen(axes, side, values)
        _thousands(axes.xaxis)
    return axes, points, colours


def _name(axes: Any, title: str, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left", fontsize=11, weight="bold")


def _widen(axes: Any, side: str, values: Sequence[float]) -> None:
    """Room for names around the points, on the scale of the axis."""
    low, high = min(values), max(values)
    if side == "x":
        room = max((high / low) ** 0.3, 1.3)
        axes.set_xlim(low / room, high * room)
    else:
        room = max(0.22 * (high - low), 0.01 * high)
        axes.set_ylim(low - room, high + room)


def _thousands(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: format_power(x)))
    axis.set_minor_formatter(NullFormatter())


def _context(axes: Any, entries: Entries) -> None:
    """The loss of text by the tokens in sight, the accuracy of answers by their distance or by the
    points of a row, or the error of regression by the examples seen."""
    for key, draw in (
        ("by_distance", _distances),
        ("by_points", _points),
        ("by_examples", _examples),
    ):
        if any(key in (entry.get("test") or {}) for entry in entries):
            return draw(axes, entries)
    late: list[float] = []
    for i, entry in enumerate(entries):
        if rows := (entry.get("test") or {}).get("loss_by_context"):
            rows = [row for row in rows if math.isfinite(row["bits_per_token"])]
            x = [((row["low"] + 1) * row["high"]) ** 0.5 for row in rows]
            y = [row["bits_per_token"] for row in rows]
            axes.plot(x, y, label=entry["label"], **_line(i))
            late += [bits for row, bits in zip(rows, y) if row["low"] >= 8] or y
    if late:
        # Before 8 tokens nobody knows anything: those heights would flatten all that follows.
        room = 0.06 * (max(late) - min(late)) or 0.01
        axes.set_ylim(min(late) - room, max(late) + room)
    _doubling(axes)
    _name(axes, "Does more context help?", "tokens in sight", "bits per token")


def _distances(axes: Any, entries: Entries) -> None:
    for i, entry in enumerate(entries):
        if rows := (entry.get("test") or {}).get("by_distance"):
            x = [(max(row["low"], 1) * row["high"]) ** 0.5 for row in rows]
            y = [row["accuracy"] for row in rows]
            axes.plot(x, y, label=entry["label"], **_line(i))
    axes.set_ylim(-0.02, 1.02)
    _doubling(axes)
    _name(axes, "How far back?", "tokens back to the answer", "accuracy")


def _points(axes: Any, entries: Entries) -> None:
    for i, entry in enumerate(entries):
        if rows := (entry.get("test") or {}).get("by_points"):
            x, y = [row["points"] for row in rows], [row["accuracy"] for row in rows]
            axes.plot(x, y, label=entry["label"], **_line(i))
    axes.set_ylim(-0.02, 1.02)
    axes.locator_params(axis="x", integer=True)
    _name(axes, "How many points?", "points of a row", "accuracy")


def _examples(axes: Any, entries: Entries) -> None:
    found = [(i, rows) for i, e in enumerate(entries) if (rows := _by_examples(e))]
    for i, rows in found:
        x = [(row["low"] + row["high"] - 1) / 2 for row in rows]
        axes.plot(x, [row["model"] for row in rows], label=entries[i]["label"], **_line(i))
    for _, rows in found[:1]:  # the same rows for all
        x = [(row["low"] + row["high"] - 1) / 2 for row in rows]
        axes.plot(x, [row["ridge"] for row in rows], color="#8c8c8c", ls=":", lw=1.4)
        axes.annotate("ridge", (x[-1], rows[-1]["ridge"]), color="#6f6f6f", fontsize=8, va="top")
    axes.set_yscale("log")
    _name(axes, "Do more examples help?", "examples seen", "squared error")


def _by_examples(entry: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return (entry.get("test") or {}).get("by_examples", ())


def _recall(axes: Any, entries: Entries) -> None:
    absent, highest = [], []
    for i, entry in enumerate(entries):
        if found := entry.get("needle"):
            x = [row["distance"] for row in found["distances"]]
            y = [row["accuracy"] for row in found["distances"]]
            axes.plot(x, y, label=entry["label"], **_line(i))
            absent.append(found["absent"]["accuracy"])
            highest += y
    if absent:
        chance = sum(absent) / len(absent)
        axes.axhline(chance, color="#8c8c8c", ls=":", lw=1.2)
        place = axes.get_yaxis_transform()
        note = {"color": "#6f6f6f", "fontsize": 8, "ha": "left", "va": "bottom"}
        axes.text(0.005, chance, "nothing planted", transform=place, **note)
        axes.set_ylim(0, max(0.25, 1.08 * max(highest)))
    _doubling(axes)
    _name(axes, "Recall of a planted string", "its distance in tokens", "share recalled")


def _line(i: int) -> dict[str, Any]:
    return style_of(i) | {"ms": 4, "lw": 1.6, "mew": 0}


def _doubling(axes: Any) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Any, entries: Entries) -> None:
    from matplotlib.lines import Line2D

    shown = [(e["label"], style_of(i)) for i, e in enumerate(entries) if e.get("test")]
    handles = [Line2D([], [], label=name, ms=5, lw=1.8, mew=0, **style) for name, style in shown]
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 0.62)))
    if handles:
        options = {"frameon": False, "fontsize": 9, "handlelength": 2.4, "columnspacing": 1.6}
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, **options)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _finish(figure: Any, scatters: Sequence[tuple[Any, dict, dict]], path: Path) -> None:
    """Names go in last, when the layout has settled."""
    figure.draw_without_rendering()
    for axes, points, colours in scatters:
        write_labels(axes, points, colours)
    save_figure(figure, path)
