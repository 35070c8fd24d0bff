"""Tasks: one file is one task, found by its file name. See `Task` for what a task offers.

A task file defines ``build(config, *, seed, length, batch) -> Task``; `config` is ``config.task``
and ``config.task.name`` is the file's name.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from attnlab.errors import UserError, did_you_mean


class Task(Protocol):
    """What trains a model: batches that are a pure function of (seed, step), row by row."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """int32 [rows, N] each: tokens, targets, pos, seg (-1 marks an empty slot)."""
        ...

    def batches(
        self, start_step: int = 0, rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The same batches from a step on, prepared ahead of their use."""
        ...

    def info(self) -> dict:
        """What a report should say about the data."""
        ...


def names() -> list[str]:
    """Every task that can be built."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build(
    config: Mapping, *, seed: int = 0, length: int | None = None, batch: int | None = None
) -> Task:
    """The task named by ``config.name``; length and batch default to those of the config.

    Raises `UserError` with the nearest names when there is no such task.
    """
    name = config["name"]
    if name not in names():
        raise UserError(f"no task {name!r}; {did_you_mean(name, names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    length = config["length"] if length is None else length
    batch = config["batch"] if batch is None else batch
    return module.build(config, seed=seed, length=length, batch=batch)


def process_rows(batch: int, process: int, processes: int) -> slice:
    """The rows of a global batch that process `process` of `processes` reads.

    Raises `UserError` when the batch does not divide.
    """
    if batch % processes:
        raise UserError(
            f"task.batch={batch} does not divide among {processes} processes; "
            f"choose a multiple of {processes}"
        )
    share = batch // processes
    return slice(process * share, (process + 1) * share)
