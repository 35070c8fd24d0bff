"""What was measured, for a terminal, as Markdown, and as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnlab.files import replace_file
from attnlab.plots import save_figure, style_of

Row = dict[str, Any]
COLUMNS = (
    "entry",
    "position",
    "tokens",
    "wall ms",
    "quartiles",
    "cpu ms",
    "tokens/s",
    "compile s",
    "peak MiB",
    "above empty",
    "GFLOP/s",
    "of products",
    "state KiB",
    "state B / token",
)


def write(rows: Sequence[Row], folder: Path) -> str:
    """bench.md and bench.png of ``rows``; returns what a terminal shows."""
    found, missed = tables(rows), failures(rows)
    text = "\n\n".join([title(rows), *map(markdown, found), *missed]) + "\n"
    replace_file(folder / "bench.md", text.encode())
    plot([row for row in rows if "wall" in row], folder / "bench.png", title(rows))
    return "\n\n".join([title(rows), *map(aligned, found), *missed])


def tables(rows: Sequence[Row]) -> list[list[list[str]]]:
    """What was measured, exponents, and ratios to others; each with a line of headings."""
    done = [row for row in rows if "wall" in row]
    found = [filled([list(COLUMNS), *map(cells, done)])]
    if growing := growths(done):
        found.append([["entry", "position", "wall", "cpu", "memory"], *growing])
    if beside := ratios(done):
        found.append([["ours / theirs", "tokens", "wall", "95 %", "cpu", "95 %"], *beside])
    return found


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for each point that could not be measured."""
    return [
        f"{row['label']}, {row['length']} tokens: {row['error']}" for row in rows if "error" in row
    ]


def title(rows: Sequence[Row]) -> str:
    """Mode, device and versions, in a line."""
    row = next((row for row in rows if "device" in row), rows[0])
    threads = f", {row['threads']} threads" if row["threads"] else ""
    return (
        f"{row['mode']} on {row.get('device', '?')} ({row['machine']}{threads}), "
        f"jax {row['versions']['jax']}"
    )


def cells(row: Row) -> list[str]:
    """One line of the table of `COLUMNS`."""
    wall, above, rate = row["wall"], row["above_empty"], row["rate"]
    return [
        row["label"],
        row["position"],
        f"{row['length']:,}",
        f"{1e3 * wall['median']:.3g}",
        f"{1e3 * wall['low']:.3g} – {1e3 * wall['high']:.3g}",
        f"{1e3 * row['cpu']['median']:.3g}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['compiling']:.1f}",
        f"{row['peak'] / 2**20:,.0f}",
        f"{above / 2**20:,.0f}" if above is not None else "",
        f"{rate / 1e9:.3g}" if rate else "",
        f"{rate / row['ceiling']:.0%}" if rate and row["ceiling"] else "",
        f"{row['state'] / 2**10:,.0f}" if row["state"] else "",
        f"{row['state'] / row['length']:,.0f}" if row["state"] else "",
    ]


def filled(table: Sequence[list[str]]) -> list[list[str]]:
    """The columns in which anything stands below the heading; all of them if nothing does."""
    columns = [column for column in zip(*table) if any(column[1:]) or len(table) == 1]
    return [list(line) for line in zip(*columns)]


def growths(rows: Sequence[Row]) -> list[list[str]]:
    """Exponents in the length, least squares over the last three lengths of each curve."""
    found = []
    for (label, position), points in curves(rows).items():
        last = points[-3:]
        if len(last) < 2:
            continue
        lengths = [row["length"] for row in last]
        memory = [row["above_empty"] for row in last]
        values = [
            [row["wall"]["median"] for row in last],
            [row["cpu"]["median"] for row in last],
            memory if all(z is not None and z > 0 for z in memory) else [],
        ]
        shown = [f"N^{slope(lengths, each):.2f}" if each else "–" for each in values]
        found.append([label, position, *shown])
    return found


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of ln y against ln x."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y)]
    mean_x, mean_y = (sum(z) / len(pairs) for z in zip(*pairs))
    above = sum((a - mean_x) * (b - mean_y) for a, b in pairs)
    return above / sum((a - mean_x) ** 2 for a, _ in pairs)


def ratios(rows: Sequence[Row]) -> list[list[str]]:
    """Ours by theirs, of everything that was called in turn."""
    found = []
    for row in rows:
        if "peer_of" not in row:
            continue
        line = [f"{row['peer_of']} / {row['label']}", f"{row['length']:,}"]
        for kind in ("wall", "cpu"):
            each = row[f"ours_by_theirs_{kind}"]
            line += [f"{each['median']:.2f}", f"{each['low']:.2f} – {each['high']:.2f}"]
        found.append(line)
    return found


def curves(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(entry, position) -> its rows by length."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["label"], row["position"]), []).append(row)
    return {key: sorted(each, key=lambda row: row["length"]) for key, each in found.items()}


def plot(rows: Sequence[Row], path: Path, heading: str) -> None:
    """Seconds of a call and memory above the empty process against the length, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    found = curves(rows)
    places = {position for _, position in found}
    for i, ((label, position), points) in enumerate(found.items()):
        name, look = f"{label}, {position}" if len(places) > 1 else label, style_of(i)
        x = [row["length"] for row in points]
        y = [row["wall"]["median"] for row in points]
        seconds.plot(x, y, label=name, ms=4, **look)
        low, high = ([row["wall"][k] for row in points] for k in ("low", "high"))
        seconds.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)
        kept = [row for row in points if (row["above_empty"] or 0) > 0]
        above = [row["above_empty"] / 2**20 for row in kept]
        memory.plot([row["length"] for row in kept], above, ms=4, **look)
    seconds.set_ylabel("seconds a call")
    memory.set_ylabel("MiB above an empty process")
    for axes in (seconds, memory):
        axes.set_xscale("log", base=2)
        if any(len(line.get_ydata()) for line in axes.lines):
            axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading, fontsize=10, x=0.01, ha="left")
    if found:
        figure.legend(frameon=False, loc="outside lower center", ncols=5, fontsize=9)
    save_figure(figure, path)


def markdown(table: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([head, "| --- " * len(table[0]) + "|", *rest])


def aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table
    )
