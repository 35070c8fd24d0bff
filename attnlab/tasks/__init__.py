"""Tasks: one file is one task, found by its file name. See `Recipe` for what a task file offers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol

import numpy as np

from attnlab.errors import UserError
from attnlab.registry import Registry


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
        """int32 [rows, N] each: tokens, targets (-1: none), pos, seg (-1: an empty slot). A row may
        have targets of its own, [rows] or [rows, m]; tokens that are vectors are f32 [rows, N, F],
        and targets that are real f32, NaN for none."""
        ...

    def batches(
        self, start_step: int = 0, rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The same batches from a step on, prepared ahead of their use."""
        ...

    def info(self) -> dict:
        """What a report should say about the data."""
        ...


class Recipe(ABC):
    """A task before it has data: a registered frozen dataclass whose fields are those of
    ``config.task``, besides its ``name``, ``length`` and ``batch``."""

    kind: ClassVar[str]
    """How its runs are scored and reported: a file of `attnlab.kinds`."""

    @abstractmethod
    def build(self, *, seed: int, length: int, batch: int) -> Task:
        """The task, of rows of ``length`` tokens. Raises `UserError` for what cannot be."""


COMMON = {"length": 512, "batch": 16}
"""Fields that every task has, and their defaults: tokens of a row, rows of an optimizer step."""

recipes: Registry[Recipe] = Registry("attnlab.tasks", Recipe)


def build(
    config: Mapping, *, seed: int = 0, length: int | None = None, batch: int | None = None
) -> Task:
    """The task that ``config.task`` describes; length and batch default to those of the config.

    Raises `UserError` with the nearest names when there is no such task.
    """
    fields = {key: value for key, value in config.items() if key not in ("name", *COMMON)}
    length = config["length"] if length is None else length
    batch = config["batch"] if batch is None else batch
    return recipes.get(config["name"])(**fields).build(seed=seed, length=length, batch=batch)


def check_sizes(seed: int, length: int, batch: int) -> None:
    """Raises `UserError` for what no task can be built with."""
    for field, value in (("length", length), ("batch", batch)):
        if value < 1:
            raise UserError(f"task.{field}={value} must be at least 1")
    if not 0 <= seed < 1 << 32:
        raise UserError(f"seed={seed} must lie in 0..{(1 << 32) - 1}")


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
