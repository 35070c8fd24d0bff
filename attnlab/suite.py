"""``attnlab evaluate --suite=long_context``: one run at many lengths, below and beyond training.

At every length, doubling, a run is scored as `attnlab evaluate` scores it, and asked how far back
it recalls: held-out rows by the depth of their answer, held-out text by the distance of a planted
string (see `attnlab.needle`). All is teacher forced: nothing is generated. What was measured at one
length is written down before the next, so that the same command goes on where it was stopped.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnlab.errors import DataError, UserError, did_you_mean
from attnlab.files import read_json, write_json
from attnlab.kinds import kind_of
from attnlab.runs import Run, open_run
from attnlab.scores import headline_of

log = logging.getLogger(__name__)

SUITES = ("long_context",)
BELOW, BEYOND = 4, 8
"""Lengths from a fourth of that of training to 8 times as many."""
TOKENS, TOY = 2**19, 2**13
"""Read at a length; the second for a look in seconds."""


def run_suite(
    workdir: str | Path,
    suite: str,
    *,
    split: str = "test",
    length: int | None = None,
    toy: bool = False,
    step: int | None = None,
) -> None:
    """Measures, prints a table, and writes ``evaluations/SUITE-....json`` and a picture.

    ``length`` is the longest. Raises `UserError` for an unknown suite, `DataError` for data or
    checkpoints that cannot be read or results that cannot be written.
    """
    if suite not in SUITES:
        raise UserError(f"--suite={suite}: {did_you_mean(suite, SUITES)}")
    run = open_run(workdir, step)
    trained = run.config.task.length
    longest = length or trained * (2 if toy else BEYOND)
    file = run.path / "evaluations" / f"{suite}{'-toy' * toy}-{split}-step{run.step}.json"
    settings = {
        "suite": suite,
        "split": split,
        "step": run.step,
        "trained_length": trained,
        "tokens": TOY if toy else TOKENS,
    }
    found = _begun(file, settings)
    task, kind = run.task(), kind_of(run.config)
    for size in lengths(trained, longest):
        if str(size) in found:
            continue
        try:
            found[str(size)] = kind.probe(run, task, split, size, settings["tokens"])
        except UserError as error:
            log.warning("%d tokens: %s", size, error)
            found[str(size)] = {"refused": str(error)}
        found = dict(sorted(found.items(), key=lambda item: int(item[0])))
        _write(file, {**settings, "lengths": found})
    result = {**settings, "lengths": found}
    print(format_suite(result, run))
    _plot(result, file.with_suffix(".png"))
    print(f"written: {file.with_suffix('')}.json and .png")


def lengths(trained: int, longest: int) -> list[int]:
    """Doubling up to ``longest``, the length of training among them."""
    found, size = [], trained
    while size and size * BELOW >= trained:
        found.append(size)
        size //= 2
    size = 2 * trained
    while size <= longest:
        found.append(size)
        size *= 2
    return sorted(n for n in found if n <= longest) or [longest]


def format_suite(result: Mapping[str, Any], run: Run) -> str:
    """A few lines for a terminal: the headline, and the recall nearest and farthest."""
    lines = [f"{run.path}, step {result['step']}, trained on {result['trained_length']:,} tokens"]
    for size, found in result["lengths"].items():
        if "refused" in found:
            lines.append(f"  {int(size):>8,}   {found['refused']}")
            continue
        headline = headline_of(found)
        recall = [f"{cell['accuracy']:.2f}" for cell in found["cells"]]
        shown = f"; recall by {found['axis']}: {' '.join(recall)}" if recall else ""
        lines.append(f"  {int(size):>8,}   {headline.title} {found[headline.key]:.4f}{shown}")
    return "\n".join(lines)


def _begun(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call with the same settings measured."""
    try:
        found = read_json(file)
        same = all(found[key] == value for key, value in settings.items())
        return found["lengths"] if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    try:
        file.parent.mkdir(exist_ok=True)
        write_json(file, content)
    except OSError as error:
        raise DataError(f"cannot write in {file.parent}: {error.strerror}") from None


def _plot(result: Mapping[str, Any], path: Path) -> None:
    from attnlab.plots import plot_lengths

    found = {int(n): each for n, each in result["lengths"].items() if "refused" not in each}
    try:
        plot_lengths(found, result["trained_length"], path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None
