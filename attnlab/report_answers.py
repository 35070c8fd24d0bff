"""What a run on a synthetic task leaves to be read: scores, pictures and ``report.html``."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from attnlab.files import write_json
from attnlab.metrics import read_metrics
from attnlab.page import count, image, number, table, write_page
from attnlab.plots import plot_accuracy
from attnlab.report import heading, how_it_was_made
from attnlab.workdir import Workdir


class Shown(Protocol):
    """How a kind of task shows its results: what a row is made of, the title and file name of a
    picture, and what draws it; scores by their names; and all for a terminal."""

    unit: str
    question: str
    picture: str

    def plot(self, result: dict[str, Any], path: Path) -> None: ...
    def scores(self, result: Mapping[str, Any]) -> dict[str, Any]: ...
    def format(self, result: dict[str, Any]) -> str: ...


def finish(
    run: Workdir,
    config: ConfigDict,
    data: Mapping[str, Any],
    results: Mapping[str, dict[str, Any]],
    step: int,
    kind: Shown,
) -> None:
    """Writes scores, plots and report of a run at its last step, prints the essentials and marks
    the run as finished. ``results`` by split, as ``kind.score`` gives them."""
    for split, result in results.items():
        write_json(run.path / f"{split}.json", result)
    test, validation = results["test"], results["validation"]["accuracy"]
    rows = [*read_metrics(run.metrics), {"step": step, "validation/accuracy": validation}]
    plot_accuracy({run.path.name: rows}, run.path / "loss.png")
    kind.plot(test, run.path / kind.picture)
    write_report(run, config, data, results, kind)
    print(kind.format(test))
    print(f"curve   {run.path / 'loss.png'}\nreport  {run.path / 'report.html'}")
    run.finish(step, test_accuracy=test["accuracy"], validation=validation)


def write_report(
    run: Workdir,
    config: ConfigDict,
    data: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    kind: Shown,
) -> None:
    """``report.html`` in the workdir: one self-contained file."""
    test = results["test"]
    low, high = test["accuracy_95"]
    rows = test["step"] * config.task.batch
    scores = {split: kind.scores(results[split]) for split in ("validation", "test")}
    body = [
        heading(run, config),
        f"<p><b>{test['accuracy']:.4f} of the answers right</b> (95 % over rows: {low:.3f} to "
        f"{high:.3f}) in {count(test['rows'], 'held-out row')} of {html.escape(config.task.name)} "
        f"of {test['length']:,} {kind.unit}, after {count(test['step'], 'step')} of "
        f"{config.task.batch} × {config.task.length} {kind.unit}: {count(rows, 'row')} in all.</p>",
        "<h2>Training</h2>",
        image(run.path / "loss.png"),
        f"<h2>{kind.question}</h2>",
        image(run.path / kind.picture),
        table(
            ["measure", *scores],
            [
                [name, *(number(found.get(name)) for found in scores.values())]
                for name in scores["test"]
            ],
        ),
        *how_it_was_made(run, config, data),
    ]
    write_page(run.path / "report.html", run.path.name, body)
