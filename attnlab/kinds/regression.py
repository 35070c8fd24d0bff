"""Linear regression in context: the squared error left, of that of predicting 0."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab.config import regressor_of
from attnlab.errors import UserError
from attnlab.in_context import format_examples, score_examples
from attnlab.kinds.answers import Answers


class Regression(Answers):
    def make_model(self, config: ConfigDict, task: Any) -> Any:
        return regressor_of(config, task.recipe.features)

    def begin(self, config: ConfigDict, task: Any, path: Path) -> None:
        super().begin(config, task, path)
        if not config.model.causal:
            raise UserError(
                f"model.causal=false: the answers of task {task.name} stand in its rows, each "
                "after its question; set model.causal=true"
            )

    def describe_loss(self, task: Any, loss: float) -> dict[str, float]:
        return {"squared_error": loss}

    def score(self, model, params, task, config, split, step, **options):
        return score_examples(model, params, task, config, split, step, **options)

    def format(self, result: dict[str, Any]) -> str:
        return format_examples(result)

    def plot(self, result: dict[str, Any], path: Path) -> None:
        from attnlab.plots import plot_regression

        plot_regression(result["by_examples"], path)

    def probe(self, run: Any, task: Any, split: str, length: int, tokens: int) -> dict[str, Any]:
        options = {"length": length, "tokens": tokens}
        found = self.score(run.model, run.params, task, run.config, split, run.step, **options)
        return {**found, "axis": "examples", "cells": []}

    def finish(self, run, config, task, model, params, step, **scoring) -> None:
        from attnlab.report_examples import finish

        results = {}
        for split in ("validation", "test"):
            tokens = config.evaluate.tokens if split == "validation" else 0
            results[split] = self.score(
                model, params, task, config, split, step, tokens=tokens, **scoring
            )
        finish(run, config, task.info(), results, step)


KIND = Regression()
