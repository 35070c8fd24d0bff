"""Rows with a label each: the share of labels that are right."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab.config import classifier_of
from attnlab.errors import UserError
from attnlab.kinds.answers import Answers
from attnlab.model import Classifier


class Classes(Answers):
    form = Classifier

    def make_model(self, config: ConfigDict, task: Any) -> Any:
        return classifier_of(config, task.vocab_size, task.classes, self.form)

    def begin(self, config: ConfigDict, task: Any, path: Path) -> None:
        super().begin(config, task, path)
        if config.model.causal:
            raise UserError(
                f"model.causal=true: a row of task {task.name} is read in both directions before "
                "it is labelled; set model.causal=false"
            )


KIND = Classes()
