"""A trained run, opened to be read: its config, model, parameters and tokenizer."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from attnlab.checkpoint import Checkpoints
from attnlab.config import from_json
from attnlab.errors import UserError
from attnlab.kinds import kind_of
from attnlab.model import Transformer
from attnlab.sharding import reading
from attnlab.step import init_params
from attnlab.workdir import Workdir


class Run(NamedTuple):
    """``params`` are those that the run evaluates (the average where one is kept); ``tokenizer``
    is None where the task is not text."""

    path: Path
    config: ConfigDict
    model: Transformer
    params: Any
    step: int
    tokenizer: Any

    def task(self) -> Any:
        """The task the run was trained on."""
        from attnlab import tasks

        return tasks.build(self.config.task, seed=self.config.seed)

    def need_text(self) -> None:
        """Raises `UserError` for a run that has read no text."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.path} was trained on task {self.config.task.name}, which is no text; "
                "attnlab evaluate scores it"
            )


def open_run(path: str | Path, step: int | None = None) -> Run:
    """The newest sound checkpoint of the run in ``path``, or that of ``step``.

    Raises `UserError` where there is no run, no checkpoint yet, or not that step; `DataError` where
    none is sound.
    """
    workdir = Workdir.existing(path)
    file = workdir.path / "config.json"
    config = from_json(file.read_text(encoding="utf-8"), str(file))
    model, tokenizer = kind_of(config).open(config, workdir.path)
    here, _ = reading()
    shapes = jax.eval_shape(lambda: init_params(model, config.seed))
    like = jax.tree.map(lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=here), shapes)
    part = "average" if config.optimizer.ema else "params"
    with Checkpoints(workdir.checkpoints) as checkpoints:
        if not checkpoints.found():
            raise UserError(f"no checkpoint in {workdir.path} yet; train it first")
        found, state, _ = checkpoints.read({part: like}, step)
    return Run(workdir.path, config, model, state[part], found, tokenizer)
