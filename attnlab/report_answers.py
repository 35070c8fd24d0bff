"""What a run on a synthetic task leaves to be read: scores, pictures and ``report.html``."""

import html
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from attnlab.answers import format_answers
from attnlab.files import write_json
from attnlab.metrics import read_metrics
from attnlab.page import count, image, number, table, write_page
from attnlab.plots import plot_accuracy, plot_distances
from attnlab.report import heading, how_it_was_made
from attnlab.workdir import Workdir

SCORES = (
    ("accuracy", "accuracy"),
    ("rows all right", "rows_right"),
    ("nats per answer", "nats_per_answer"),
    ("answers", "asked"),
    ("rows", "rows"),
)


def finish(
    run: Workdir,
    config: ConfigDict,
    data: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    step: int,
) -> None:
    """Writes scores, plots and report of a run at its last step, prints the essentials and marks
    the run as finished. ``results`` by split, as `attnlab.answers.score_answers` gives them."""
    for split, result in results.items():
        write_json(run.path / f"{split}.json", result)
    test, validation = results["test"], results["validation"]["accuracy"]
    rows = [*read_metrics(run.metrics), {"step": step, "validation/accuracy": validation}]
    plot_accuracy({run.path.name: rows}, run.path / "loss.png")
    plot_distances({"test": test["by_distance"]}, run.path / "distance.png")
    write_report(run, config, data, results)
    print(format_answers(dict(test)))
    print(f"curve   {run.path / 'loss.png'}\nreport  {run.path / 'report.html'}")
    run.finish(step, test_accuracy=test["accuracy"], validation=validation)


def write_report(
    run: Workdir,
    config: ConfigDict,
    data: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
) -> None:
    """``report.html`` in the workdir: one self-contained file."""
    test = results["test"]
    low, high = test["accuracy_95"]
    rows = test["step"] * config.task.batch
    body = [
        heading(run, config),
        f"<p><b>{test['accuracy']:.4f} of the answers right</b> (95 % over rows: {low:.3f} to "
        f"{high:.3f}) in {count(test['rows'], 'held-out row')} of {html.escape(config.task.name)} "
        f"of {test['length']:,} tokens, after {count(test['step'], 'step')} of "
        f"{config.task.batch} × {config.task.length} tokens: {count(rows, 'row')} in all.</p>",
        "<h2>Training</h2>",
        image(run.path / "loss.png"),
        "<h2>How far back?</h2>",
        image(run.path / "distance.png"),
        table(
            ["measure", "validation", "test"],
            [
                [name, *(number(results[s][key]) for s in ("validation", "test"))]
                for name, key in SCORES
            ],
        ),
        *how_it_was_made(run, config, data),
    ]
    write_page(run.path / "report.html", run.path.name, body)
