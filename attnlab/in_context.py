"""How well a run regresses in context: squared errors by how many examples it has seen, beside what
least squares, ridge and the constant 0 make of the same rows.

Every y of a held-out row is predicted from the x before it and the examples before that. With all
of a split's rows together,

    normalised squared error = Σ (prediction − y)² / Σ y²

so that predicting 0 is 1 and less is better; what ridge with the true prior leaves is the least
that can be had (see `attnlab.tasks.regression`). Rows are drawn as often as asked for, the same
ones at every call, and may be of any length.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from attnlab.answers import describe, held_out, length_of
from attnlab.core import Array
from attnlab.model import Regressor
from attnlab.tasks.regression import least_squares, ridge

ORACLES = ("least_squares", "ridge", "zero")
SINGLE = 64
"""Up to so many examples every number of them has a row of its own, then doubling ranges."""


@partial(jax.jit, static_argnums=(0, 3))
def _predict(
    model: Regressor, params: Any, batch: dict[str, Array], rows: NamedSharding | None
) -> Array:
    """Predictions [B N]."""
    out: Any = model.apply({"params": params}, *(batch[n] for n in ("tokens", "pos", "seg")))
    if rows is None:
        return out[0]
    everywhere = NamedSharding(rows.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(out[0], everywhere)


def score_examples(
    model: Regressor,
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
    """The scores of a split, as JSON; arguments and errors as `attnlab.answers.score_answers`."""
    length = length_of(task, config, length, stride)
    found: dict[str, list] = {name: [] for name in ("y", "model", *ORACLES)}
    for drawn, arrays, keep in held_out(task, config, split, length, tokens, sharding, stop):
        predicted = np.asarray(_predict(model, params, arrays, sharding), np.float64)
        x, y = drawn["tokens"][:keep, 0::2, :-1], drawn["targets"][:keep, 0::2]
        made = least_squares(x, y), ridge(x, y, task.recipe.noise), np.zeros_like(y)
        for name, z in zip(found, (y, predicted[:keep, 0::2], *made)):
            found[name].append(z.astype(np.float64))
    y, *guesses = (np.concatenate(z) for z in found.values())
    return {
        **describe(task, config, split, step, length),
        **summarise(y, dict(zip(("model", *ORACLES), guesses))),
    }


def summarise(y: np.ndarray, guesses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Scores from targets and predictions [rows L] each, those of the ``model`` among them. The
    interval is that of a ratio of means over rows."""
    errors = {name: np.square(guess - y) for name, guess in guesses.items()}
    scale = float(np.square(y).mean())
    normalised = {name: float(error.mean()) / scale for name, error in errors.items()}
    own = normalised["model"]
    spread = (errors["model"].mean(1) - own * np.square(y).mean(1)).std() / scale
    half = 1.96 * float(spread) / len(y) ** 0.5
    return {
        "rows": len(y),
        "examples": y.shape[1],
        "normalised_squared_error": own,
        "normalised_squared_error_95": [max(0.0, own - half), own + half],
        "oracles": {name: normalised[name] for name in ORACLES},
        "by_examples": [
            {"low": low, "high": high}
            | {name: float(error[:, low:high].mean()) for name, error in errors.items()}
            for low, high in ranges(y.shape[1])
        ],
    }


def ranges(examples: int) -> list[tuple[int, int]]:
    """[low, high) of the numbers of examples seen before a prediction, see `SINGLE`."""
    edges = [n for n in range(examples) if n < SINGLE or n & (n - 1) == 0]
    return list(itertools.pairwise([*edges, examples]))


def format_examples(result: Mapping[str, Any]) -> str:
    """A few lines for a terminal."""
    low, high = result["normalised_squared_error_95"]
    oracles = ", ".join(f"{n.replace('_', ' ')} {z:.4f}" for n, z in result["oracles"].items())
    lines = [
        f"{result['task']}, {result['split']} split: {result['rows']:,} rows of "
        f"{result['examples']:,} examples, {result['length']:,} tokens (trained on "
        f"{result['trained_length']:,}), step {result['step']}",
        f"  normalised squared error  {result['normalised_squared_error']:.4f}  "
        f"(95 % over rows: {low:.4f} to {high:.4f})",
        f"  the same of               {oracles}",
        "  squared error by examples seen",
        "  examples     model  least squares     ridge",
    ]
    rows = result["by_examples"]
    shown = {0, len(rows) - 1, *(2**n for n in range(32))}
    for number, row in enumerate(rows):
        if number in shown:
            lines.append(
                f"  {row['low']:>8}  {row['model']:>8.4f}  {row['least_squares']:>13.4f}  "
                f"{row['ridge']:>8.4f}"
            )
    return "\n".join(lines)
