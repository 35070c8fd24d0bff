"""What a config may not say: names, ranges, and sizes that do not fit each other.

Everything here is checked before data are opened or anything is compiled. What only a mechanism or
a position can know about itself, it says itself when it is built.
"""

import itertools
import math
from collections.abc import Iterable

from ml_collections import ConfigDict

from attnlab.config import CHOICES, architecture_of, flat, mechanisms_of, normaliser_of, position_of
from attnlab.errors import UserError, did_you_mean

POSITIVE = (
    "task.length",
    "task.batch",
    "model.width",
    "model.layers",
    "model.heads",
    "model.kv_heads",
    "optimizer.learning_rate",
    "optimizer.accumulate",
    "train.log_every",
    "train.keep",
    "evaluate.batch",
)
FRACTION = ("optimizer.final_fraction", "sample.top_p")
BELOW_ONE = ("model.dropout", "optimizer.b1", "optimizer.b2", "optimizer.ema")
"""Zero is legal, one is not. Every number of these sections that is in no list is >= 0."""

SECTIONS = ("task", "model", "optimizer", "train", "evaluate", "sample")


def validate(config: ConfigDict) -> None:
    """Raises `UserError`, one line with the nearest legal values, for the first thing wrong."""
    _check_choices(config)
    _check_ranges(config)
    _check_sizes(config)
    _check_carrying(config)
    dims = architecture_of(config).dims
    position_of(config).validate(dims)
    normaliser_of(config).validate(dims, config.model.causal)


def _check_choices(config: ConfigDict) -> None:
    for path, choices in CHOICES.items():
        value = flat(config).get(path)
        if value is not None and value not in choices:
            raise UserError(f"{path}={value}: {did_you_mean(value, choices)}")


def _check_ranges(config: ConfigDict) -> None:
    for path, value in flat(config).items():
        if path.partition(".")[0] not in SECTIONS or type(value) not in (int, float):
            continue
        if not math.isfinite(value):
            legal = "finite"
        elif path in POSITIVE and value <= 0:
            legal = "> 0"
        elif path in FRACTION and not 0 <= value <= 1:
            legal = "between 0 and 1"
        elif path in BELOW_ONE and not 0 <= value < 1:
            legal = ">= 0 and < 1"
        elif value < 0:
            legal = ">= 0"
        else:
            continue
        raise UserError(f"{path}={value}: must be {legal}")


def _check_sizes(config: ConfigDict) -> None:
    model, optimizer = config.model, config.optimizer
    if model.head_dim == 0 and model.width % model.heads:
        heads = _nearest(model.heads, _divisors(model.width))
        width = _nearest(model.width, _multiples(model.width, model.heads))
        raise UserError(
            f"model.heads={model.heads} does not divide model.width={model.width}; use heads of "
            f"{heads}, a width of {width}, or set model.head_dim"
        )
    if model.heads % model.kv_heads:
        heads = _nearest(model.kv_heads, _divisors(model.heads))
        raise UserError(
            f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}; "
            f"use {heads}"
        )
    if config.task.batch % optimizer.accumulate:
        parts = _nearest(optimizer.accumulate, _divisors(config.task.batch))
        raise UserError(
            f"optimizer.accumulate={optimizer.accumulate} does not divide "
            f"task.batch={config.task.batch}; use {parts}"
        )
    if not 0 <= config.evaluate.stride <= (config.evaluate.length or config.task.length):
        raise UserError(
            f"evaluate.stride={config.evaluate.stride}: must be at most the evaluated length, "
            f"{config.evaluate.length or config.task.length}; 0 takes that length"
        )
    if not config.sample.top_p:
        raise UserError("sample.top_p=0.0: leaves no token to draw; 1.0 turns it off")


def _check_carrying(config: ConfigDict) -> None:
    """What memory that is handed on from batch to batch asks of the rows."""
    names = itertools.cycle(config.attention.name.split("+"))
    name = next((name for m, name in zip(mechanisms_of(config), names) if m.carries), None)
    if name is None:
        return
    if config.task.get("packing", "stream") != "stream":
        raise UserError(
            f"task.packing={config.task.packing}: attention {name} carries its memory from "
            "batch to batch, so a row must read on where it stopped; use task.packing=stream"
        )
    stride, length = config.evaluate.stride, config.evaluate.length or config.task.length
    if stride not in (0, length):
        raise UserError(
            f"evaluate.stride={stride}: attention {name} carries its memory from window to "
            f"window, which read every token once; use 0 or the length, {length}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _multiples(near: int, of: int) -> list[int]:
    return [n for n in (near // of * of, near // of * of + of) if n]


def _nearest(wanted: int, legal: Iterable[int]) -> str:
    """The legal values on either side of the wanted one."""
    legal = sorted(legal)
    below, above = [n for n in legal if n < wanted][-1:], [n for n in legal if n > wanted][:1]
    return " or ".join(map(str, below + above))
