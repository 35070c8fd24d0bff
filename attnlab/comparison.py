"""What a comparison found, as JSON: everything that its report shows.

All numbers come from the files of the runs and from `attnlab.plan`; nothing is measured here.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab.config import mechanisms_of
from attnlab.errors import DataError
from attnlab.files import read_json
from attnlab.metrics import read_metrics
from attnlab.plan import Estimate

SCORES = (
    "bits_per_byte",
    "bits_per_byte_95",
    "documents",
    "bytes",
    "loss_by_context",
    "accuracy",
    "accuracy_95",
    "rows",
    "by_distance",
    "by_points",
    "normalised_squared_error",
    "normalised_squared_error_95",
    "by_examples",
)
"""What is kept of a result, as far as its kind has it."""


@dataclass
class Entry:
    """One mechanism of a comparison while it runs. ``state``: pending, finished, stopped, refused
    (the combination has no meaning) or failed; ``reason`` in one line, ``code`` of the exit."""

    label: str
    config: ConfigDict
    path: Path
    task: Any
    state: str = "pending"
    reason: str = ""
    code: int = 0
    estimate: Estimate | None = None

    def fail(self, state: str, reason: str, code: int) -> None:
        """Writes down why it did not come to its end."""
        self.state = state if self.state != "finished" else self.state
        self.reason, self.code = reason, code


def collect(
    entries: Sequence[Entry], notes: Sequence[str], command: Sequence[str]
) -> dict[str, Any]:
    """Everything that is known of a comparison, finished or not, as JSON."""
    found = [describe_entry(entry) for entry in entries]
    shared = {k: v for k, v in entries[0].config.to_dict().items() if k != "attention"}
    done = [entry for entry in entries if entry.state == "finished"]
    start = _read(done[0], "run.json")["attempts"][-1] if done else {}
    return {
        "command": list(command),
        "notes": list(notes),
        "shared": shared,
        "environment": {k: start.get(k) for k in ("devices", "platform", "versions", "git")},
        "baselines": _baselines(done[0]) if done else {},
        "entries": found,
    }


def _baselines(entry: Entry) -> dict[str, Any]:
    """What compressors make of the same text; nothing where the task is no text."""
    return _read(entry, "baselines.json") if (entry.path / "baselines.json").exists() else {}


def describe_entry(entry: Entry) -> dict[str, Any]:
    """One entry as JSON; its scores only where its run is finished.

    ``tokens_per_second`` is the median over intervals between logged training steps;
    ``peak_bytes`` of the device in training, or of the whole process where devices do not tell.
    ``growth`` holds declared exponents in the length, the largest of any layer.
    """
    attention = entry.config.attention.to_dict()
    about: dict[str, Any] = {
        "label": entry.label,
        "attention": attention,
        "workdir": entry.path.name,
        "state": entry.state,
        "reason": entry.reason,
    }
    if entry.estimate is not None:
        costs = [mechanism.cost for mechanism in mechanisms_of(entry.config)]
        about |= {
            "parameters": sum(entry.estimate.parameters.values()),
            "attention_flops": entry.estimate.attention_flops,
            "matmul_flops": entry.estimate.matmul_flops,
            "decoding_bytes": entry.estimate.decoding,
            "growth": dict(zip(("time", "memory", "state"), map(max, zip(*costs)))),
        }
    if entry.state == "finished":
        rows, task = read_metrics(entry.path / "metrics.jsonl"), entry.config.task
        peaks = [row["train/peak_bytes"] for row in rows if "train/peak_bytes" in row]
        for split in ("validation", "test"):
            scores = _read(entry, f"{split}.json")
            about[split] = {name: scores[name] for name in SCORES if name in scores}
        about |= {
            "tokens_per_second": measure_speed(rows, task.batch * task.length),
            "peak_bytes": max(peaks, default=None),
            "steps": scores["step"],
            "needle": _read(entry, "needle.json")
            if (entry.path / "needle.json").exists()
            else None,
        }
    return about


def measure_speed(rows: Sequence[Mapping[str, Any]], tokens: int) -> float | None:
    """Median tokens per second over the intervals between logged steps of ``tokens`` each, given
    the rows of a metrics.jsonl; None where there are fewer than two.

    The first interval is left out, as are pauses (compilation, evaluation, a restart) by being few.
    """
    logged = [(row["step"], row["time"]) for row in rows if "train/loss" in row]
    speeds = [
        (step - before) * tokens / (now - then)
        for (before, then), (step, now) in itertools.pairwise(logged[1:])
        if step > before and now > then
    ]
    return statistics.median(speeds) if speeds else None


def _read(entry: Entry, name: str) -> Any:
    try:
        return read_json(entry.path / name)
    except (OSError, ValueError):
        fix = f"delete {entry.path / 'run.json'} and run the same command"
        raise DataError(f"no readable {entry.path / name}; {fix}") from None
