"""What the tasks of one kind have in common: their model, their score, what is shown of a run.

One file is one kind: ``attnlab/kinds/answers.py`` serves the tasks whose `Recipe.kind` is
"answers".
"""

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab.tasks import recipes


class Kind(ABC):
    """Asked by training, by evaluation and by every command that opens a run."""

    has_text: bool = False
    """Whether a run reads text, in which a string can be planted."""

    @abstractmethod
    def make_model(self, config: ConfigDict, task: Any) -> Any:
        """The model that learns the task; where the data of a text are missing (None), one of the
        same size."""

    @abstractmethod
    def open(self, config: ConfigDict, path: Path) -> tuple[Any, Any]:
        """The model of the run in ``path``, without its data, and its tokenizer or None."""

    @abstractmethod
    def begin(self, config: ConfigDict, task: Any, path: Path) -> None:
        """What is checked, and written into ``path``, before a run begins. Raises `UserError`."""

    @abstractmethod
    def describe_loss(self, task: Any, loss: float) -> dict[str, float]:
        """A loss in nats per target as it is shown while training, by its name."""

    @abstractmethod
    def score(
        self,
        model: Any,
        params: Any,
        task: Any,
        config: ConfigDict,
        split: str,
        step: int,
        **options: Any,
    ) -> dict[str, Any]:
        """The scores of a split as JSON, one of `attnlab.scores.HEADLINES` among them; options
        ``length``, ``stride``, ``tokens``, ``sharding`` and ``stop`` as for
        `attnlab.evaluate.score`."""

    @abstractmethod
    def format(self, result: dict[str, Any]) -> str:
        """A result for a terminal."""

    @abstractmethod
    def plot(self, result: dict[str, Any], path: Path) -> None:
        """A result as a PNG."""

    @abstractmethod
    def probe(self, run: Any, task: Any, split: str, length: int, tokens: int) -> dict[str, Any]:
        """The headline at a length, from about ``tokens`` tokens, and ``cells``: the ``accuracy``
        of recall ``at`` points of the ``axis``. JSON; see `attnlab.suite`."""

    @abstractmethod
    def finish(
        self,
        run: Any,
        config: ConfigDict,
        task: Any,
        model: Any,
        params: Any,
        step: int,
        **scoring: Any,
    ) -> None:
        """Scores, pictures and report of a run at its last step; marks it as finished."""


def kind_of(config: ConfigDict) -> Kind:
    """The kind of the task that a config names."""
    name = recipes.get(config.task.name).kind
    return importlib.import_module(f"{__name__}.{name}").KIND
