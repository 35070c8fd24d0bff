"""The report of a comparison: tables, pictures, Markdown and one HTML page from its JSON alone."""

import html
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attnlab.charts import format_power, plot_context, plot_costs, plot_overview, plot_recall
from attnlab.files import replace_file, write_json
from attnlab.page import image, number, plain, table, write_page
from attnlab.scores import HEADLINES, Headline, headline_of

COLUMNS = (
    "mechanism",
    "score",
    "95 %",
    "validation",
    "recall near",
    "recall far",
    "tokens/s",
    "peak memory",
    "parameters",
    "attention FLOPs",
    "decoding",
    "time, memory, state",
)


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row a finished entry, in the order of `COLUMNS`, the best first."""
    done = [e for e in result["entries"] if e.get("test")]
    rows, headline = [], _headline(result)
    for entry in sorted(done, key=lambda e: e["test"][headline.key], reverse=headline.higher):
        test, needle = entry["test"], entry["needle"]
        low_high = test[f"{headline.key}_95"]
        recall = [row["accuracy"] for row in needle["distances"]] if needle else None
        growth = entry.get("growth") or {}
        rows.append(
            [
                entry["label"],
                f"{test[headline.key]:.4f}",
                f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else "–",
                f"{entry['validation'][headline.key]:.4f}",
                f"{recall[0]:.2f}" if recall else "–",
                f"{recall[-1]:.2f}" if recall else "–",
                short(entry["tokens_per_second"]),
                short(entry["peak_bytes"], "B"),
                number(entry.get("parameters")),
                short(entry.get("attention_flops")),
                short(entry.get("decoding_bytes"), "B"),
                ", ".join(map(_growth, growth.values())) or "–",
            ]
        )
    return rows


def _headline(result: Mapping[str, Any]) -> Headline:
    """What the entries are ranked by; bits per byte as long as none is finished."""
    done = [e["test"] for e in result["entries"] if e.get("test")]
    return headline_of(done[0]) if done else HEADLINES[0]


def columns(result: Mapping[str, Any]) -> tuple[str, ...]:
    """`COLUMNS` with the name of the score."""
    return tuple(_headline(result).title if name == "score" else name for name in COLUMNS)


def failures(result: Mapping[str, Any]) -> list[list[str]]:
    """Label, state and reason of every entry that something is to be said about."""
    return [
        [e["label"], e["state"], e["reason"] or "not begun; the same command goes on"]
        for e in result["entries"]
        if e["state"] != "finished" or e["reason"]
    ]


def format_table(result: Mapping[str, Any]) -> str:
    """The comparison for a terminal."""
    rows = [
        [row[i] for i in (0, 1, 3, 4, 5, 6, 7, 10)]
        for row in [columns(result), *table_rows(result)]
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return "\n".join(
        [*lines, *(f"{label}: {what}: {why}" for label, what, why in failures(result))]
    )


def write(result: Mapping[str, Any], folder: Path) -> None:
    """``comparison.json``, ``.md``, ``.html`` and the pictures, whole, into a directory."""
    entries = result["entries"]
    write_json(folder / "comparison.json", result)
    plot_overview(entries, folder / "comparison.png", title_of(result))
    plot_costs(entries, folder / "costs.png")
    plot_context(entries, folder / "context.png")
    plot_recall(entries, folder / "recall.png")
    replace_file(folder / "comparison.md", markdown(result).encode())
    write_page(folder / "comparison.html", f"{folder.name}: comparison", _page(result, folder), 80)


def title_of(result: Mapping[str, Any]) -> str:
    """What was the same for all, in one line."""
    shared = result["shared"]
    task, model = shared["task"], shared["model"]
    tokens = task["batch"] * task["length"] * shared["train"]["steps"]
    data = task.get("corpus", task["name"])
    return (
        f"{data}, sequences of {task['length']:,} tokens, {model['layers']} layers of "
        f"width {model['width']}, {format_power(tokens)} tokens of training each"
    )


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison as one Markdown page."""
    notes = "".join(f"- {note}\n" for note in result["notes"])
    command = f"```sh\n{shlex.join(result['command'])}\n```\n"
    parts = [f"# Comparison\n\n{title_of(result)}.\n", tables(result, "## "), notes, command]
    return "\n".join(filter(None, parts))


def tables(result: Mapping[str, Any], level: str = "### ") -> str:
    """Its tables in Markdown, under headings of that level."""
    parts = [markdown_table(columns(result), table_rows(result))]
    if bad := failures(result):
        parts.append(markdown_table(("entry", "state", "why"), bad))
    for section in sections(result):
        shown = markdown_table(section.head, section.rows)
        parts.append(f"{level}{section.title}\n\n{section.note}\n\n{shown}")
    return "\n".join(parts)


class Section(NamedTuple):
    """A table of curves: one row a mechanism."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def sections(result: Mapping[str, Any]) -> list[Section]:
    """The loss by context, the recall by distance, the answers by points, as far as they were
    measured."""
    done = [entry for entry in result["entries"] if entry.get("test")]
    planted = [entry for entry in done if entry["needle"]]
    found = []
    curves = [e for e in done if "loss_by_context" in e["test"]]
    if curves:
        # One that carries its state counts all of a document, not only one window of it.
        seen = {e["label"]: {r["low"]: r for r in e["test"]["loss_by_context"]} for e in curves}
        lows = sorted({low for rows in seen.values() for low in rows})
        head = [f"{low:,}" for low in lows]
        rows = [
            [label, *(f"{r[low]['bits_per_token']:.3f}" if low in r else "–" for low in lows)]
            for label, r in seen.items()
        ]
        note = "Bits per token of held-out text, by tokens in sight, from the number above on."
        found.append(Section("Does more context help?", note, ["mechanism", *head], rows))
    found += _answered(done)
    if learnt := [e for e in done if "by_examples" in e["test"]]:
        found.append(_examples(learnt))
    if planted:
        about = planted[0]["needle"]
        distances = [f"{row['distance']:,}" for row in about["distances"]]
        head = ["mechanism", *distances, "absent"]
        what = (
            f"{about['string_bytes']} random letters stand in held-out text and are begun again at "
            f"the end of the window, so many tokens later; {about['samples']} windows. "
        )
        for title, key, note in (
            ("Recall of a planted string", "accuracy", "Share of its second half predicted right, "
             "given the first. Absent: nothing was planted, so this is chance."),
            ("Bits for a planted string", "bits_per_byte", "Bits per byte of the second half; who "
             f"knows nothing but the alphabet needs {about['guessing_bits_per_byte']:.2f}."),
        ):  # fmt: skip
            rows = [
                [e["label"], *(f"{row[key]:.3f}" for row in _recall_rows(e["needle"]))]
                for e in planted
            ]
            found.append(Section(title, what + note, head, rows))
    return found


def _answered(done: Sequence[Mapping[str, Any]]) -> list[Section]:
    """The answers by distance, or by points."""
    found = []
    for key, at, title, by in (
        ("by_distance", "low", "How far back?", "by tokens back to the answer, from the number "
         "above on."),
        ("by_points", "points", "How many points?", "by the points of a row."),
    ):  # fmt: skip
        if asked := [e for e in done if e["test"].get(key)]:
            answered = {e["label"]: {int(r[at]): r for r in e["test"][key]} for e in asked}
            lows = sorted({low for each in answered.values() for low in each})
            rows = [
                [label, *(f"{r[low]['accuracy']:.3f}" if low in r else "–" for low in lows)]
                for label, r in answered.items()
            ]
            note = f"Share of the answers that are right, {by}"
            head = ["mechanism", *(f"{low:,}" for low in lows)]
            found.append(Section(title, note, head, rows))
    return found


def _examples(entries: Sequence[Mapping[str, Any]]) -> Section:
    """Squared errors by the number of examples seen, powers of two, beside the least possible."""
    curves = [(e["label"], e, "model") for e in entries] + [("ridge", entries[0], "ridge")]
    rows, head = [], []
    for label, entry, key in curves:
        seen = [row for row in entry["test"]["by_examples"] if row["low"].bit_count() < 2]
        head = ["mechanism", *(f"{row['low']:,}" for row in seen)]
        rows.append([label, *(f"{row[key]:.4f}" for row in seen)])
    note = "Squared error by examples seen; ridge with the true prior has the least there is."
    return Section("Do more examples help?", note, head, rows)


MEANING = (
    "Bits per byte of held-out documents, lower is better; the interval is a bootstrap over "
    "documents, which moves together for all. Accuracy: share of the answers of held-out rows that "
    "are right; normalised squared error: that of the model over that of predicting 0; both with "
    "an interval over rows. Recall: share of the second half of a planted random string that is "
    "predicted right, at the nearest and the farthest distance. Tokens per second: median over "
    "training steps. Peak memory: of the device, or of the whole process on a CPU. "
    "Attention FLOPs: per training token, forward and backward, counted. Decoding: bytes "
    "of state for one sequence of the training length. The last column is the declared "
    "growth in the length N."
)


def _page(result: Mapping[str, Any], folder: Path) -> list[str]:
    bad = failures(result)
    options = [
        [e["label"], plain({k: v for k, v in e["attention"].items() if k != "name"}) or "–"]
        for e in result["entries"]
    ]
    body = [
        "<h1>Comparison</h1>",
        f"<p>{html.escape(title_of(result))}.</p>",
        f'<div class="wide">{table(columns(result), table_rows(result))}</div>',
        f'<p class="note">{MEANING}</p>',
        *([table(("entry", "state", "why"), bad)] if bad else []),
        *(f"<p>{html.escape(note)}</p>" for note in result["notes"]),
        image(folder / "comparison.png"),
        "<h2>Quality against cost</h2>",
        image(folder / "costs.png"),
    ]
    curves = dict.fromkeys(("Do", "Does", "How"), "context.png")
    pictures = {**curves, "Recall": "recall.png"}
    for section in sections(result):
        body.append(f"<h2>{section.title}</h2>")
        if picture := pictures.get(section.title.partition(" ")[0]):
            body.append(image(folder / picture))
        body.append(f'<p class="note">{section.note}</p>')
        body.append(f'<div class="wide">{table(section.head, section.rows)}</div>')
    shared = [[name, plain(fields)] for name, fields in result["shared"].items()]
    facts = [[k, plain(v)] for k, v in result["environment"].items() if v]
    return [
        *body,
        "<h2>How it was made</h2>",
        f"<pre>{html.escape(shlex.join(result['command']))}</pre>",
        "<p>The same for every entry:</p>",
        table(("config", ""), shared),
        "<p>What differs, and nothing else does:</p>",
        table(("entry", "config.attention"), options),
        table(("environment", ""), facts) if facts else "",
    ]


def _recall_rows(needle: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*needle["distances"], needle["absent"]]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "&#124;") for cell in row] for row in (head, *rows)]
    cells.insert(1, ["---"] * len(head))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def short(value: float | None, unit: str = "") -> str:
    return "–" if value is None else _with_unit(format_power(value), unit)


def _with_unit(text: str, unit: str) -> str:
    """1.5k, or 1.5 kB."""
    if not unit:
        return text
    return f"{text[:-1]} {text[-1]}{unit}" if text[-1].isalpha() else f"{text} {unit}"


def _growth(exponent: float) -> str:
    return {0.0: "1", 1.0: "N"}.get(exponent, f"N^{exponent:g}")
