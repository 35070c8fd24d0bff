"""``attnlab dilution``: what a number of keys does to attention, as tables and pictures."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attnlab.errors import DataError, UserError
from attnlab.files import write_csv

SHORTEST = 16


def dilution(
    workdir: str | Path | None = None,
    length: int | None = None,
    samples: int = 32,
    seed: int | None = None,
    out: str | Path | None = None,
    step: int | None = None,
) -> None:
    """Without a ``workdir``, `margins.sweep` over every normaliser and ``length``s up to the one
    given: margins.csv and margins.png. With one, `observed.measure_layers` of that run on held-out
    text: layers.csv, heads.png and layers.png.

    Raises `UserError` for a length, number of samples, seed or step that cannot be, and for a flag
    without a meaning; `DataError` for data or checkpoints that cannot be read, and a directory that
    cannot be written.
    """
    for name, value in (("length", length), ("samples", samples)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if workdir is None:
        if step is not None:
            raise UserError("--step chooses a checkpoint of a run; add --workdir=DIR")
        compare_normalisers(Path(out or "dilution"), length or 4**8, samples, seed or 0)
    else:
        if seed is not None:
            raise UserError("--seed is that of the noise; with --workdir nothing is drawn")
        look_into(workdir, out, length, samples, step)


def compare_normalisers(folder: Path, length: int, samples: int, seed: int) -> None:
    """One key that matters, among up to ``length``, under every normaliser."""
    from attnlab.analysis.charts import plot_margins
    from attnlab.analysis.margins import LENGTHS, sweep

    if length < SHORTEST:
        raise UserError(f"length={length} must be at least {SHORTEST}")
    if seed < 0:
        raise UserError(f"seed={seed} must be at least 0")
    lengths = [n for n in LENGTHS if n < length] + [length]
    with _writing(folder):
        rows = list(sweep(lengths=lengths, samples=samples, seed=seed))
        write_csv(folder / "margins.csv", rows)
        plot_margins(rows, folder / "margins.png")
    print(format_margins(rows))
    print(f"written: {folder / 'margins.csv'} and .png")


def look_into(
    workdir: str | Path,
    out: str | Path | None,
    length: int | None,
    windows: int,
    step: int | None,
) -> None:
    """Every layer and head of a run, on the first ``windows`` of its test split."""
    from attnlab.analysis.charts import plot_heads, plot_layers
    from attnlab.analysis.observed import cut, measure_layers
    from attnlab.runs import open_run

    run = open_run(workdir, step)
    run.need_text()
    trained, most = run.config.task.length, run.config.evaluate.batch
    size: int = length or trained
    batch = min(windows, max(1, most * trained // max(size, trained)))
    task = run.task()
    batches = cut(task.documents("test"), task.boundary, size, windows, batch)
    folder = Path(out) if out else run.path / "dilution"
    with _writing(folder):
        rows = measure_layers(run.model, run.params, batches)
        if not rows:
            raise DataError("nothing to look at: the test split is empty")
        write_csv(folder / "layers.csv", rows)
        plot_heads(rows, folder / "heads.png")
        plot_layers(rows, folder / "layers.png")
    print(format_layers(rows, run.step, size))
    print(f"written: {folder / 'layers.csv'}, layers.png and heads.png")


def format_margins(rows: Sequence[dict[str, Any]]) -> str:
    """Weights of the key that matters for a terminal: a line a normaliser and length a column."""
    lines, lengths = [], list(dict.fromkeys(row["n"] for row in rows))
    for margin, noise in dict.fromkeys((row["margin"], row["noise"]) for row in rows):
        lines.append(f"weight of one key with margin {margin:g}, noise {noise:g}, among n keys")
        lines.append(f"  {'n':<16}" + "".join(f"{n:>9}" for n in lengths))
        for name in dict.fromkeys(row["normaliser"] for row in rows):
            found = [
                row["signal"]
                for row in rows
                if (row["normaliser"], row["margin"], row["noise"]) == (name, margin, noise)
            ]
            lines.append(f"  {name:<16}" + "".join(f"{weight:>9.4f}" for weight in found))
    return "\n".join(lines)


def format_layers(rows: Sequence[dict[str, Any]], step: int, length: int) -> str:
    """For a terminal: every layer where the most keys are in sight, means over its heads."""
    lines = [
        f"attention of step {step} in windows of {length} tokens, with the most keys in sight",
        "  layer         n   support   largest    sink   over",
    ]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if row["layer"] == layer]
        last = [row for row in own if row["low"] == max(r["low"] for r in own)]
        mean = {
            key: sum(row[key] for row in last) / len(last)
            for key in ("visible", "support", "largest", "sink")
        }
        lines.append(
            f"  {layer:>5}   {mean['visible']:>7.0f}   {mean['support']:>7.1f}"
            f"   {mean['largest']:>7.3f}   {mean['sink']:>5.3f}   {last[0]['keys']}"
        )
    if any(row["keys"] != "its own" for row in rows):
        lines.append(
            "  over all visible: what full attention would make of these queries and keys, which "
            "is not what the layer computes"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A directory to write in; what it refuses becomes a `DataError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(f"cannot write in {folder}: {error.strerror}") from None
