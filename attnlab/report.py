"""What a run on text leaves to be read: scores, a sample, ``loss.png``, ``report.html``; and the
table of finished runs of any kind."""

import html
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab.analysis.charts import plot_spread
from attnlab.analysis.logged import history
from attnlab.config import REGISTRIES, base, diff
from attnlab.decode import sample_text
from attnlab.errors import DataError, UserError
from attnlab.evaluate import format_scores, score_split
from attnlab.files import read_json, replace_file, write_json
from attnlab.metrics import read_metrics
from attnlab.page import count, image, number, plain, table, write_page
from attnlab.plots import plot_contexts, plot_training
from attnlab.scores import headline_of
from attnlab.sweep_table import is_sweep, report_sweep
from attnlab.workdir import Workdir

SPREAD = "dilution.png"


def finish(
    run: Workdir,
    config: ConfigDict,
    task: Any,
    model: Any,
    params: Any,
    step: int,
    **scoring: Any,
) -> None:
    """Scores the test split, samples, plots and writes the report of a run at its last step, prints
    the essentials and marks the run as finished. ``scoring``: options of `evaluate.score`."""
    results = {}
    for split in ("validation", "test"):
        tokens = config.evaluate.tokens if split == "validation" else 0
        results[split] = score_split(
            model, params, task, config, split, step, tokens=tokens, **scoring
        )
        write_json(run.path / f"{split}.json", results[split])
    options = {"context": config.task.length, "seed": config.seed}
    sample = sample_text(model, params, task.tokenizer, config.sample, **options)
    replace_file(run.path / "sample.txt", sample)
    baselines = task.baselines("test")
    write_json(run.path / "baselines.json", baselines)
    last = {"step": step, "validation/bits_per_byte": results["validation"]["bits_per_byte"]}
    rows = [*read_metrics(run.metrics), last]
    alone = {name: bits["alone"] for name, bits in baselines.items()}
    plot_training({run.path.name: rows}, run.path / "loss.png", alone)
    plot_contexts({"test": results["test"]["loss_by_context"]}, run.path / "context.png")
    if spread := history(rows, "entropy"):
        plot_spread(rows, run.path / SPREAD)
    write_report(run, config, task.info(), results, baselines, sample, bool(spread))
    bits = results["test"]["bits_per_byte"]
    print(format_scores(results["test"]))
    print(format_baselines(bits, baselines))
    print(f"\nsample\n------\n{sample.decode(errors='replace')}\n------")
    print(f"curve   {run.path / 'loss.png'}\nreport  {run.path / 'report.html'}")
    run.finish(step, test_bits_per_byte=bits, validation=results["validation"]["bits_per_byte"])


def format_baselines(bits: float, baselines: Mapping[str, Mapping[str, float]]) -> str:
    """The model beside the compressors, for a terminal."""
    lines = ["  compressors        held-out bytes alone   appended to the training text"]
    for name, values in baselines.items():
        lines.append(f"  {name:<18} {values['alone']:>20.4f}   {values['after_train']:>29.4f}")
    return "\n".join([*lines, f"  {'this model':<18} {bits:>20.4f}   {bits:>29.4f}"])


def write_report(
    run: Workdir,
    config: ConfigDict,
    data: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, float]],
    sample: bytes,
    spread: bool = False,
) -> None:
    """``report.html`` in the workdir: one self-contained file. ``spread`` says that there is a
    picture of how the attention spread while the run learnt."""
    test = results["test"]
    low_high = test["bits_per_byte_95"]
    interval = f" (95 % over documents: {low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else ""
    tokens = test["step"] * config.task.batch * config.task.length
    own = f"{test['bits_per_byte']:.4f}"
    body = [
        heading(run, config),
        f"<p><b>{own} bits per byte</b>{interval} on "
        f"{count(test['documents'], 'held-out document')} of "
        f"{html.escape(str(test['corpus']))} ({test['bytes']:,} bytes), after "
        f"{count(test['step'], 'step')} of {config.task.batch} × {config.task.length} tokens: "
        f"{tokens:,} in all.</p>",
        table(
            ["", "held-out bytes alone", "appended to the training text"],
            [
                *(
                    [n, f"{b['alone']:.4f}", f"{b['after_train']:.4f}"]
                    for n, b in baselines.items()
                ),
                ["this model", own, own],
            ],
            own=len(baselines),
        ),
        '<p class="note">Bits per byte; lower is better. The model has read the training text, so '
        "the fair reading of a compressor is the second.</p>",
        "<h2>Training</h2>",
        image(run.path / "loss.png"),
        "<h2>Sample</h2>",
        f"<pre>{html.escape(sample.decode(errors='replace'))}</pre>",
        "<h2>Does more context help?</h2>",
        image(run.path / "context.png"),
        table(
            ["measure", "validation", "test"],
            [
                [name, *(number(results[s][key]) for s in ("validation", "test"))]
                for name, key in (
                    ("bits per byte", "bits_per_byte"),
                    ("perplexity per token", "token_perplexity"),
                    ("perplexity per word", "word_perplexity"),
                    ("perplexity per word, line ends counted", "word_perplexity_eos"),
                    ("tokens", "tokens"),
                    ("bytes", "bytes"),
                    ("words", "words"),
                    ("lines", "lines"),
                    ("documents", "documents"),
                )
            ],
        ),
        *(["<h2>How attention spreads</h2>", image(run.path / SPREAD)] if spread else []),
        *how_it_was_made(run, config, data),
    ]
    write_page(run.path / "report.html", run.path.name, body)


def heading(run: Workdir, config: ConfigDict) -> str:
    """The name of a run and of what it is made of, as HTML."""
    names = (config.attention.name, config.position.name, config.normaliser.name)
    return f"<h1>{html.escape(run.path.name)}: {html.escape(', '.join(names))}</h1>"


def how_it_was_made(run: Workdir, config: ConfigDict, data: Mapping[str, Any]) -> list[str]:
    """The last section of a report, as HTML: command, config, data, environment."""
    attempts = read_json(run.path / "run.json")["attempts"]
    defaults = base(*(config[path].name for path in REGISTRIES))
    changed = diff(defaults, config) or ["nothing"]
    return [
        "<h2>How it was made</h2>",
        f"<pre>{html.escape(shlex.join(attempts[-1]['command']))}</pre>",
        f"<p>Changed from the defaults: <code>{html.escape('; '.join(changed))}</code></p>",
        table(["data", ""], [[k, plain(v)] for k, v in data.items() if v]),
        table(
            ["environment", ""],
            [[k, plain(v)] for k, v in attempts[-1].items() if k not in ("command", "overrides")],
        ),
        f"<details><summary>Whole config</summary><pre>"
        f"{html.escape(json.dumps(config.to_dict(), indent=2))}</pre></details>",
    ]


COLUMNS = (
    "run",
    "attention",
    "position",
    "normaliser",
    "score",
    "95 %",
    "steps",
    "data",
    "window",
)
SAME = ("corpus", "tokenizer", "length", "stride", "bytes", "task", "rows")
"""Fields of test.json, as far as its kind has them, that make two scores comparable."""


def report(workdirs: Sequence[str], out: str | None = None) -> None:
    """Prints a table of finished runs, best first; writes it, or their curves, to ``out`` (.md or
    .png). Runs that were not scored on the same bytes in the same way are said to differ. Of one
    sweep: `attnlab.sweep_table.report_sweep`.

    Raises `UserError` for a workdir without a finished run or another ``out``, `DataError` for
    results that cannot be read or written.
    """
    if swept := [path for path in workdirs if is_sweep(path)]:
        if len(workdirs) > 1:
            raise UserError(f"{swept[0]} is a sweep; report it by itself")
        return report_sweep(swept[0], out)
    if out and Path(out).suffix not in (".md", ".png"):
        raise UserError(f"--out={out}: must end in .png (the curves) or .md (the table)")
    found = [_result(path) for path in workdirs]
    headline = headline_of(found[0][1])
    if strange := [run.path for run, test, _ in found if headline.key not in test]:
        raise UserError(f"{strange[0]} has no {headline.title}: its task is of another kind")
    found.sort(key=lambda r: r[1][headline.key], reverse=headline.higher)
    rows: list[list[str]] = [[headline.title if c == "score" else c for c in COLUMNS]]
    for run, test, config in found:
        low_high = test[f"{headline.key}_95"]
        rows.append(
            [
                run.path.name,
                config["attention"]["name"],
                config["position"]["name"],
                config["normaliser"]["name"],
                f"{test[headline.key]:.4f}",
                f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else "–",
                str(test["step"]),
                str(test.get("corpus", config["task"]["name"])),
                str(test["length"]),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    differ = [name for name in SAME if len({str(test.get(name)) for _, test, _ in found}) > 1]
    if differ:
        print(f"not comparable: the runs differ in {', '.join(differ)} of what was scored")
    if out:
        _write_comparison(Path(out), rows, [run for run, _, _ in found])
        print(f"written: {out}")


def _result(path: str) -> tuple[Workdir, dict[str, Any], dict[str, Any]]:
    """A finished run with what is in its test.json and config.json."""
    run = Workdir.existing(path)
    if run.finished() is None:
        raise UserError(f"{path}: the run is not finished; train it to its end first")
    try:
        test = read_json(run.path / "test.json")
        if not {f"{headline_of(test).key}_95", "length", "step"} <= test.keys():
            raise ValueError
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        fix = f"write it with attnlab train --workdir={path} after deleting {path}/run.json"
        raise DataError(f"no readable result in {run.path / 'test.json'}; {fix}") from None
    return run, test, run.config()


def _write_comparison(out: Path, rows: Sequence[Sequence[str]], runs: Sequence[Workdir]) -> None:
    try:
        if out.suffix == ".png":
            # The whole path where names repeat: no run hides another.
            names = [run.path.name for run in runs]
            unique = len(set(names)) == len(names)
            plot_training(
                {
                    run.path.name if unique else str(run.path): read_metrics(run.metrics)
                    for run in runs
                },
                out,
            )
        else:
            cells = [[cell.replace("|", "&#124;") for cell in row] for row in rows]
            cells.insert(1, ["---"] * len(rows[0]))
            text = "".join(f"| {' | '.join(row)} |\n" for row in cells)
            replace_file(out, text.encode())
    except OSError as error:
        raise UserError(f"cannot write --out={out}: {error.strerror}") from None
