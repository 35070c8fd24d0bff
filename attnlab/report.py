"""What a run leaves to be read: scores, a sample, ``loss.png`` and a one-page ``report.html``."""

import base64
import html
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab.config import base, diff
from attnlab.decode import sample_text
from attnlab.errors import UserError
from attnlab.evaluate import format_scores, score_split
from attnlab.files import read_json, replace_file, write_json
from attnlab.metrics import read_metrics
from attnlab.plots import plot_contexts, plot_training
from attnlab.workdir import Workdir

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 } td, th { padding: .2rem .9rem .2rem 0;
       text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } tr.best td { font-weight: 600 }
pre { background: #f6f6f4; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: 100% } .note { color: #666 }
"""


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
    rows = read_metrics(run.metrics)
    alone = {name: bits["alone"] for name, bits in baselines.items()}
    plot_training({run.path.name: rows}, run.path / "loss.png", alone)
    plot_contexts({"test": results["test"]["loss_by_context"]}, run.path / "context.png")
    write_report(run, config, task.info(), results, baselines, sample)
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
) -> None:
    """``report.html`` in the workdir: one self-contained file."""
    test, attempts = results["test"], read_json(run.path / "run.json")["attempts"]
    defaults = base(config.attention.name, config.position.name)
    changed = diff(defaults, config) or ["nothing"]
    low_high = test["bits_per_byte_95"]
    interval = f" (95 % over documents: {low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else ""
    body = [
        f"<h1>{html.escape(run.path.name)}: {html.escape(config.attention.name)}, "
        f"{html.escape(config.position.name)}</h1>",
        f"<p><b>{test['bits_per_byte']:.4f} bits per byte</b> on {test['documents']} held-out "
        f"documents of {html.escape(str(test['corpus']))} ({test['bytes']:,} bytes){interval}, "
        f"after {test['step']:,} steps of {config.task.batch} x {config.task.length} tokens.</p>",
        _table(
            ["", "held-out bytes alone", "appended to the training text"],
            [
                *(
                    [n, f"{b['alone']:.4f}", f"{b['after_train']:.4f}"]
                    for n, b in baselines.items()
                ),
                ["this model", f"{test['bits_per_byte']:.4f}", f"{test['bits_per_byte']:.4f}"],
            ],
        ),
        '<p class="note">Bits per byte; lower is better. The model has read the training text, so '
        "the fair reading of a compressor is the second.</p>",
        "<h2>Training</h2>",
        _image(run.path / "loss.png"),
        "<h2>Sample</h2>",
        f"<pre>{html.escape(sample.decode(errors='replace'))}</pre>",
        "<h2>Does more context help?</h2>",
        _image(run.path / "context.png"),
        _table(
            ["measure", "validation", "test"],
            [
                [name, *(_number(results[s][key]) for s in ("validation", "test"))]
                for name, key in (
                    ("bits per byte", "bits_per_byte"),
                    ("perplexity per token", "token_perplexity"),
                    ("perplexity per word", "word_perplexity"),
                    ("tokens", "tokens"),
                    ("bytes", "bytes"),
                    ("words", "words"),
                    ("documents", "documents"),
                )
            ],
        ),
        "<h2>How it was made</h2>",
        f"<pre>{html.escape(shlex.join(attempts[-1]['command']))}</pre>",
        f"<p>Changed from the defaults: <code>{html.escape('; '.join(changed))}</code></p>",
        _table(["data", ""], [[k, _plain(v)] for k, v in data.items()]),
        _table(
            ["environment", ""],
            [[k, _plain(v)] for k, v in attempts[-1].items() if k not in ("command", "overrides")],
        ),
        f"<details><summary>Whole config</summary><pre>"
        f"{html.escape(json.dumps(config.to_dict(), indent=2))}</pre></details>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(run.path.name)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    replace_file(run.path / "report.html", page.encode())


def report(workdirs: Sequence[str], out: str | None = None) -> None:
    """Prints a table of finished runs, best first, and writes their curves to ``out`` (a .png)."""
    rows, curves = [], {}
    for path in workdirs:
        run = Workdir.existing(path)
        config, done = run.config(), run.finished()
        if done is None:
            raise UserError(f"{path}: the run is not finished; train it to its end first")
        name = f"{run.path.name} ({config['attention']['name']}, {config['position']['name']})"
        rows.append((done["test_bits_per_byte"], name, done["step"]))
        curves[name] = read_metrics(run.metrics)
    width = max(len(name) for _, name, _ in rows)
    print(f"{'run':<{width}}  bits per byte    steps")
    for bits, name, step in sorted(rows):
        print(f"{name:<{width}}  {bits:>13.4f}  {step:>7}")
    if out:
        plot_training(curves, Path(out))
        print(f"written: {out}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numeric = [i > 0 and all(_is_number(row[i]) for row in rows) for i in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (
            f"<{tag}{' class=n' if numeric[i] else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").isdigit()


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if type(value) is int else str(value)


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
