"""How well a run names points of held-out rows: measures of whole sequences, by number of points.

A sequence is decoded without any help: greedily, or with as many beams as its task keeps. What is
measured of it, the task says (`attnlab.tasks.synthetic.points.Pointing.judge`). The nats are those
of the true sequence, each index with all before it in sight (teacher forced).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from attnlab.answers import describe, held_out, interval_of, length_of
from attnlab.core import Array
from attnlab.pointer import PointerNetwork
from attnlab.step import losses_of
from attnlab.tasks.synthetic.points import count_points, read_named

EXAMPLES = 6
LINES = 12
"""Numbers of points that a terminal shows."""


@partial(jax.jit, static_argnums=(0, 3, 4))
def _name(
    model: PointerNetwork,
    params: Any,
    batch: dict[str, Array],
    beams: int,
    rows: NamedSharding | None,
) -> tuple[Array, Array]:
    """Nats of the true sequences, and the sequences found: [B m] each."""
    points, pos, seg = (batch[name] for name in ("tokens", "pos", "seg"))
    named = model.decode({"params": params}, points, pos, seg, beams)
    found = losses_of(model, params, batch).nll, named
    if rows is not None:
        everywhere = NamedSharding(rows.mesh, PartitionSpec())
        found = jax.lax.with_sharding_constraint(found, (everywhere, everywhere))
    return found


def score_named(
    model: PointerNetwork,
    params: Any,
    task: Any,
    config: ConfigDict,
    split: str,
    step: int,
    *,
    length: int = 0,
    stride: int = 0,
    tokens: int = 0,
    sharding: NamedSharding | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """The scores of a split, as JSON; options and errors as for `attnlab.answers.score_answers`,
    with points for tokens."""
    length, recipe = length_of(task, config, length, stride), task.recipe
    batches, outputs, nats, asked = [], [], 0.0, 0
    for drawn, arrays, keep in held_out(task, config, split, length, tokens, sharding, stop):
        found = map(np.asarray, _name(model, params, arrays, recipe.beams, sharding))
        losses, named = (z[:keep] for z in found)
        batches.append({name: z[:keep] for name, z in drawn.items()})
        outputs.append(named)
        nats += float(losses.sum())
        asked += int((batches[-1]["targets"] >= 0).sum())
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    output = np.concatenate(outputs)
    measures, count = recipe.measure(rows, output), count_points(rows["seg"])
    total = recipe.total(measures)
    return {
        **describe(task, config, split, step, length),
        "rows": len(output),
        "asked": asked,
        **total,
        "accuracy_95": interval_of(total["accuracy"], measures["accuracy"]),
        "nats_per_answer": nats / asked,
        "by_points": _by_points(recipe, measures, count),
        "examples": [
            _example(recipe, rows["tokens"][i], rows["targets"][i], output[i], n)
            for i, n in enumerate(count[:EXAMPLES])
        ],
    }


def _by_points(recipe: Any, measures: Mapping[str, np.ndarray], count: np.ndarray) -> list[dict]:
    rows = []
    for n in np.unique(count):
        of = {name: values[count == n] for name, values in measures.items()}
        rows.append({"points": int(n), "rows": int((count == n).sum()), **recipe.total(of)})
    return rows


def _example(
    recipe: Any, points: np.ndarray, targets: np.ndarray, output: np.ndarray, count: int
) -> dict[str, Any]:
    """A row to be drawn: its points, and lines between them as they are and as they were found."""
    true, found = (read_named(row, count) for row in (targets, output))
    judged = recipe.judge(points[:count].astype(np.float64), found, true)
    return {
        "points": np.round(points[:count].astype(np.float64), 4).tolist(),
        "true": recipe.edges(true).tolist(),
        "found": recipe.edges(found).tolist(),
        "right": bool(judged["accuracy"]),
    }


def measures_of(result: Mapping[str, Any]) -> list[str]:
    """What was measured of every sequence."""
    return [key for key in result["by_points"][0] if key not in ("points", "rows")]


def mix_counts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The ``accuracy`` ``at`` 4, 8, 16, ... points: of all rows from there to the next."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(1 << (row["points"].bit_length() - 1), []).append(row)
    cells = []
    for at, group in groups.items():
        right = sum(row["rows"] * row["accuracy"] for row in group)
        cells.append({"at": at, "accuracy": right / sum(row["rows"] for row in group)})
    return cells


def format_named(result: Mapping[str, Any]) -> str:
    """A few lines for a terminal."""
    names, (low, high) = measures_of(result), result["accuracy_95"]
    lines = [
        f"{result['task']}, {result['split']} split: {result['rows']:,} rows of at most "
        f"{result['length']:,} points (trained on {result['trained_length']:,}), step "
        f"{result['step']}",
    ]
    for name in names:
        interval = f"  (95 % over rows: {low:.3f} to {high:.3f})" if name == "accuracy" else ""
        lines.append(f"  {name.replace('_', ' '):<18}{_shown(result[name], 4)}{interval}")
    lines.append(f"  {'nats per answer':<18}{result['nats_per_answer']:.4f}")
    heads = [name.replace("_", " ") for name in names]
    lines.append("  ".join(["  points", *heads]))
    rows = result["by_points"]
    for row in rows[:: -(-len(rows) // LINES)]:
        cells = [f"{_shown(row[name], 3):>{len(head)}}" for name, head in zip(names, heads)]
        lines.append("  ".join([f"{row['points']:>8}", *cells]))
    return "\n".join(lines)


def _shown(value: float | None, digits: int) -> str:
    return "FAIL" if value is None else f"{value:.{digits}f}"
