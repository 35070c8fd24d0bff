"""How well a run answers held-out rows: the share of answers that are right, by depth and distance.

A row asks at some of its positions; the answer to a position is right if it is the likeliest token
there, with everything before it in sight (teacher forced). A classifier answers once a row. Rows
of a split are the same at every call, as many as asked for where they are made up, and their length
may be any.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from attnlab.core import Array
from attnlab.cross_entropy import likeliest
from attnlab.errors import UserError
from attnlab.evaluate import Stopped
from attnlab.model import Classifier, Model
from attnlab.sharding import put, spread
from attnlab.step import losses_of

ROWS = 1024
"""Rows of a split where no number of tokens is set, at the length of training."""
FEWEST = 32
DEPTHS = 10
NAMES = ("tokens", "targets", "pos", "seg")


@partial(jax.jit, static_argnums=(0, 3))
def _answer(
    model: Model,
    params: Any,
    batch: dict[str, Array],
    rows: NamedSharding | None,
) -> tuple[Array, Array]:
    """Of every target: nats, and whether it is the likeliest. [B N] each, [B] of a classifier."""
    tokens = (batch[name] for name in ("tokens", "pos", "seg"))
    if isinstance(model, Classifier):
        out: Any = model.apply({"params": params}, *tokens)
        guess = jnp.argmax(out[0], -1)
    else:
        out = model.apply({"params": params}, *tokens, method=model.hidden)
        guess = likeliest(out[0], model.table(params))
    found = losses_of(model, params, batch).nll, guess == batch["targets"]
    if rows is not None:
        everywhere = NamedSharding(rows.mesh, PartitionSpec())
        found = jax.lax.with_sharding_constraint(found, (everywhere, everywhere))
    return found


def held_out(
    task: Any,
    config: ConfigDict,
    split: str,
    length: int,
    tokens: int,
    sharding: NamedSharding | None,
    stop: Callable[[], bool],
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any], int]]:
    """About ``tokens`` tokens of a split, by default all rows that are stored, or `ROWS` of the
    training length where they are made up, a batch at a time: as drawn, as arrays on the devices,
    and how many of its rows count. Raises `Stopped`."""
    trained = config.task.length
    stored = task.size(split)
    rows = stored or max(FEWEST, ROWS * trained // length)
    if tokens:
        rows = min(stored or tokens, max(1, tokens // length))
    batch = max(1, min(rows, config.evaluate.batch * trained // length))
    batch, share = spread(batch, sharding)
    for number in range(-(-rows // batch)):
        if stop():
            raise Stopped
        drawn = task.draw(split, number, range(batch), length)
        arrays = {name: drawn[name] for name in NAMES}
        if sharding is not None:
            arrays = put({name: z[share] for name, z in arrays.items()}, sharding)
        yield drawn, arrays, min(batch, rows - number * batch)


def length_of(task: Any, config: ConfigDict, length: int, stride: int) -> int:
    """The length that is scored: the given one, or that of the config where it is 0. Raises
    `UserError` for a stride."""
    length = length or config.evaluate.length or config.task.length
    if stride not in (0, length):
        raise UserError(f"stride={stride}: rows of task {task.name} are scored whole; leave it out")
    return length


def describe(task: Any, config: ConfigDict, split: str, step: int, length: int) -> dict[str, Any]:
    """What is needed to compare scores with others: JSON."""
    return {
        "task": task.name,
        "split": split,
        "step": step,
        "length": length,
        "trained_length": config.task.length,
        "dtype": config.model.dtype,
        "average": bool(config.optimizer.ema),
    }


def score_answers(
    model: Model,
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
    """The scores of a split, as JSON: about ``tokens`` tokens of it, by default all rows that are
    stored, or `ROWS` of the training length where they are made up.

    ``length`` replaces that of the config when it is not 0. ``sharding`` spreads the rows over
    devices; every process must then call. ``stop()`` is asked between batches. Raises `UserError`
    for a stride, which rows do not have, and a length that the task refuses, `Stopped`.
    """
    length = length_of(task, config, length, stride)
    found: dict[str, list] = {name: [] for name in ("asked", "right", "nats", "depth")}
    for drawn, arrays, keep in held_out(task, config, split, length, tokens, sharding, stop):
        nats, right = map(np.asarray, _answer(model, params, arrays, sharding))
        depth = drawn.get("depth", np.full(right.shape, np.nan))
        for name, z in zip(found, (drawn["targets"] >= 0, right, nats, depth)):
            found[name].append(z[:keep].reshape(keep, -1))
    return {
        **describe(task, config, split, step, length),
        **summarise(*map(np.concatenate, found.values())),
    }


def interval_of(accuracy: float, shares: np.ndarray) -> list[float]:
    """The 95 % interval of a mean over rows, of which each has its share [R]."""
    error = 1.96 * float(shares.std()) / len(shares) ** 0.5
    return [max(0.0, accuracy - error), min(1.0, accuracy + error)]


def summarise(
    asked: np.ndarray, right: np.ndarray, nats: np.ndarray, depth: np.ndarray
) -> dict[str, Any]:
    """Scores from [rows N] each: which positions ask, which are right, what they cost, and where
    the answers stand (NaN: nowhere). The interval is that of a mean over rows."""
    hits, count = (right & asked).sum(1), asked.sum(1)
    share = hits / np.maximum(count, 1)
    accuracy = float(hits.sum() / count.sum())
    where, length = depth[asked], asked.shape[1]
    distance = np.nonzero(asked)[1] - where * (length - 1)
    powers = [0, *(2**n for n in range(length.bit_length() + 1))]
    return {
        "rows": len(share),
        "asked": int(count.sum()),
        "accuracy": accuracy,
        "accuracy_95": interval_of(accuracy, share),
        "rows_right": float((hits == count).mean()),
        "nats_per_answer": float(nats[asked].sum() / count.sum()),
        "by_depth": _binned(where, right[asked], np.linspace(0, 1, DEPTHS + 1)),
        "by_distance": _binned(np.round(distance), right[asked], powers),
    }


def _binned(x: np.ndarray, right: np.ndarray, edges: Any) -> list[dict[str, float]]:
    """The share that is right for x in [low, high), the last bin closed; none for empty bins."""
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = (x >= low) & ((x < high) | ((x == high) & (high == edges[-1])))
        if inside.any():
            share = float(right[inside].mean())
            size = int(inside.sum())
            rows.append({"low": float(low), "high": float(high), "asked": size, "accuracy": share})
    return rows


def format_answers(result: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    low, high = result["accuracy_95"]
    lines = [
        f"{result['task']}, {result['split']} split: {result['rows']:,} rows of "
        f"{result['length']:,} tokens (trained on {result['trained_length']:,}), "
        f"{result['asked']:,} answers, step {result['step']}",
        f"  accuracy          {result['accuracy']:.4f}  (95 % over rows: {low:.3f} to {high:.3f})",
        f"  rows all right    {result['rows_right']:.4f}",
        f"  nats per answer   {result['nats_per_answer']:.4f}",
    ]
    if result["by_distance"]:
        lines.append("  distance   accuracy")
        for row in result["by_distance"]:
            lines.append(f"  {row['low']:>8.0f}   {row['accuracy']:.3f}")
    return "\n".join(lines)
