"""Pictures of how attention spreads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnlab.analysis.logged import history
from attnlab.analysis.observed import by_head, by_layer
from attnlab.plots import save_figure, style_of

Table = Sequence[dict[str, Any]]

STEPS = (("evenness", "H / ln n"), ("largest", "largest weight"), ("sink", "weight of the sink"))


def plot_margins(rows: Table, path: Path) -> None:
    """Of every normaliser: the weight of the key that matters, and the effective support, against
    the number of keys; a column for each noise and margin. Rows of `margins.sweep`; writes a PNG.
    """
    settings = list(dict.fromkeys((row["noise"], row["margin"]) for row in rows))
    names = list(dict.fromkeys(row["normaliser"] for row in rows))
    figure, panels = _figure(2, len(settings), 4 * len(settings), 7.2)
    for column, (noise, margin) in enumerate(settings):
        weights, supports = panels[0][column], panels[1][column]
        for i, name in enumerate(names):
            part = [
                row
                for row in rows
                if (row["normaliser"], row["noise"], row["margin"]) == (name, noise, margin)
            ]
            n = [row["n"] for row in part]
            # Later lines are thinner, because some normalisers agree exactly.
            look = _line(i) | {"lw": 5 - 3.8 * i / len(names), "ms": 0}
            label = name if column == 0 else None
            weights.plot(n, [row["signal"] for row in part], label=label, **look)
            supports.plot(n, [row["support"] for row in part], **look)
        supports.plot(n, n, color="#8c8c8c", ls=":", lw=1.2)
        supports.annotate("all alike", (n[-1], n[-1]), ha="right", va="bottom", fontsize=8)
        weights.set_title(f"margin {margin:g}, noise {noise:g}", loc="left", fontsize=11)
        weights.set_ylim(-0.03, 1.03)
        for axes in (weights, supports):
            axes.set_xscale("log", base=4)
            axes.set_xticks(n, [_short(x) for x in n])
            axes.minorticks_off()
        supports.set_yscale("log")
        supports.set_xlabel("keys in sight, n")
    panels[0][0].set_ylabel("weight of the key that matters")
    panels[1][0].set_ylabel("effective support, $e^H$")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(names), fontsize=9)
    save_figure(figure, path)


def plot_layers(rows: Table, path: Path) -> None:
    """Of every layer, against the keys in sight: effective support, largest weight, weight of the
    first positions; means over heads and queries. Rows of `measure_layers`; writes a PNG."""
    figure, ((support, *others),) = _figure(1, 3, 13, 4.4)
    widest = max(row["visible"] for row in rows)
    support.plot([1, widest], [1, widest], color="#8c8c8c", ls=":", lw=1.2)
    support.annotate("all alike", (widest, widest), ha="right", va="bottom", fontsize=8)
    support.set_yscale("log", base=2)
    support.yaxis.set_major_formatter("{x:g}")
    support.set_ylabel("effective support, $e^H$")
    keys = {row["layer"]: row["keys"] for row in rows}
    for i, layer in enumerate(keys):
        mark = "" if keys[layer] == "its own" else ", over all visible"
        curve = zip(*by_layer(rows, "support")[layer])
        support.plot(*curve, label=f"layer {layer}{mark}", **_line(i))
        for axes, (name, _) in zip(others, STEPS[1:]):
            axes.plot(*zip(*by_layer(rows, name)[layer]), **_line(i))
    for axes, (_, title) in zip(others, STEPS[1:]):
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel(title)
    for axes in (support, *others):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("keys in sight, n")
    figure.legend(frameon=False, loc="outside lower center", ncols=6, fontsize=9)
    save_figure(figure, path)


def plot_spread(metrics: Table, path: Path) -> None:
    """Evenness, largest weight and weight of the first positions while a run learnt: a line for
    each layer, the mean of its heads, and their range. Rows of metrics.jsonl; writes a PNG."""
    figure, (panels,) = _figure(1, 3, 13, 3.8)
    for axes, (name, title) in zip(panels, STEPS):
        for layer, steps in history(metrics, name).items():
            heads = [steps[step] for step in steps]
            look = _line(layer) | {"label": f"layer {layer}"}
            axes.plot([*steps], [sum(values) / len(values) for values in heads], **look)
            low, high = [*map(min, heads)], [*map(max, heads)]
            axes.fill_between([*steps], low, high, color=look["color"], alpha=0.12, lw=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("step")
        axes.set_title(title, loc="left", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 8, "fontsize": 9}
    figure.legend(handles, labels, frameon=False, **place)
    save_figure(figure, path)


def plot_heads(rows: Table, path: Path) -> None:
    """Maps of layers by heads, where the most keys are in sight: evenness, largest weight, weight
    of the first positions. Rows of `measure_layers`; writes a PNG."""
    figure, (panels,) = _figure(1, 3, 13, 3.6, grid=False)
    for axes, (name, title) in zip(panels, STEPS):
        table = by_head(rows, name)
        shown = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        for (layer, head), value in _cells(table):
            ink = "black" if value > 0.6 else "white"
            axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xlabel="head", ylabel="layer")
        axes.set_xticks(range(table.shape[1]))
        axes.set_yticks(range(table.shape[0]))
    figure.colorbar(shown, ax=panels)
    save_figure(figure, path)


def _cells(table: Any):
    """The cells of a table that is small enough for numbers."""
    return [(place, table[place]) for place in _indices(table)] if table.size <= 256 else []


def _indices(table: Any):
    return [(i, j) for i in range(table.shape[0]) for j in range(table.shape[1])]


def _line(i: int) -> dict[str, Any]:
    return style_of(i) | {"ms": 4, "lw": 1.6, "mew": 0}


def _short(n: float) -> str:
    return f"{n // 1024:g}k" if n >= 1024 else f"{n:g}"


def _figure(rows: int, columns: int, width: float, height: float, grid: bool = True):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.ravel() if grid else ():
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
