"""What a run of regression in context leaves to be read: scores, pictures and ``report.html``."""

import html
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from attnlab.files import write_json
from attnlab.in_context import ORACLES, format_examples
from attnlab.metrics import read_metrics
from attnlab.page import count, image, number, table, write_page
from attnlab.plots import plot_errors, plot_regression
from attnlab.report import heading, how_it_was_made
from attnlab.workdir import Workdir

KEY = "normalised_squared_error"


def finish(
    run: Workdir,
    config: ConfigDict,
    data: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    step: int,
) -> None:
    """Writes scores, plots and report of a run at its last step, prints the essentials and marks
    the run as finished. ``results`` by split, as `attnlab.in_context.score_examples` gives them."""
    for split, result in results.items():
        write_json(run.path / f"{split}.json", result)
    test, validation = results["test"], results["validation"][KEY]
    rows = [*read_metrics(run.metrics), {"step": step, f"validation/{KEY}": validation}]
    plot_errors(rows, run.path / "loss.png", results["validation"]["oracles"]["ridge"])
    plot_regression(test["by_examples"], run.path / "examples.png")
    write_report(run, config, data, results)
    print(format_examples(test))
    print(f"curve   {run.path / 'loss.png'}\nreport  {run.path / 'report.html'}")
    run.finish(step, test_normalised_squared_error=test[KEY], validation=validation)


def write_report(
    run: Workdir,
    config: ConfigDict,
    data: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
) -> None:
    """``report.html`` in the workdir: one self-contained file."""
    test, splits = results["test"], ("validation", "test")
    low, high = test[f"{KEY}_95"]
    body = [
        heading(run, config),
        f"<p><b>{test[KEY]:.4f} of the squared error of predicting 0</b> (95 % over rows: "
        f"{low:.4f} to {high:.4f}) in {count(test['rows'], 'held-out row')} of "
        f"{html.escape(config.task.name)} of {count(test['examples'], 'example')}, after "
        f"{count(test['step'], 'step')} of "
        f"{config.task.batch} × {config.task.length} tokens.</p>",
        "<h2>Training</h2>",
        image(run.path / "loss.png"),
        "<h2>Do more examples help?</h2>",
        image(run.path / "examples.png"),
        table(
            ["normalised squared error", *splits],
            [
                ["this model", *(number(results[s][KEY]) for s in splits)],
                *(
                    [name.replace("_", " "), *(number(results[s]["oracles"][name]) for s in splits)]
                    for name in ORACLES
                ),
            ],
            own=0,
        ),
        *how_it_was_made(run, config, data),
    ]
    write_page(run.path / "report.html", run.path.name, body)
