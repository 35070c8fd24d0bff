"""Synthetic tasks of recall: the share of answers that are right."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.answers import format_answers, score_answers
from attnlab.config import model_of
from attnlab.errors import UserError
from attnlab.kinds import Kind

SCORES = (
    ("accuracy", "accuracy"),
    ("rows all right", "rows_right"),
    ("nats per answer", "nats_per_answer"),
    ("answers", "asked"),
    ("rows", "rows"),
)


class Answers(Kind):
    unit, question, picture = "tokens", "How far back?", "distance.png"
    """See `attnlab.report_answers.Shown`."""

    def make_model(self, config: ConfigDict, task: Any) -> Any:
        return model_of(config, task.vocab_size)

    def open(self, config: ConfigDict, path: Path) -> tuple[Any, Any]:
        return self.make_model(config, tasks.build(config.task, seed=config.seed)), None

    def begin(self, config: ConfigDict, task: Any, path: Path) -> None:
        if config.train.dilution_every:
            raise UserError(
                f"train.dilution_every={config.train.dilution_every}: looks at held-out text, and "
                f"task {task.name} has none; use 0"
            )

    def describe_loss(self, task: Any, loss: float) -> dict[str, float]:
        return {"nats_per_answer": loss}

    def score(self, model, params, task, config, split, step, **options):
        return score_answers(model, params, task, config, split, step, **options)

    def format(self, result: dict[str, Any]) -> str:
        return format_answers(result)

    def scores(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return {name: result[key] for name, key in SCORES}

    def plot(self, result: dict[str, Any], path: Path) -> None:
        from attnlab.plots import plot_distances

        name = f"{result['split']}, {result['length']} tokens"
        plot_distances({name: result["by_distance"]}, path)

    def probe(self, run: Any, task: Any, split: str, length: int, tokens: int) -> dict[str, Any]:
        options = {"length": length, "tokens": tokens}
        found = self.score(run.model, run.params, task, run.config, split, run.step, **options)
        cells = [
            {"at": (row["low"] + row["high"]) / 2, "accuracy": row["accuracy"]}
            for row in found["by_depth"]
        ]
        return {**found, "axis": "depth", "cells": cells}

    def finish(self, run, config, task, model, params, step, **scoring) -> None:
        from attnlab.report_answers import finish

        results = {}
        for split in ("validation", "test"):
            tokens = config.evaluate.tokens if split == "validation" else 0
            results[split] = self.score(
                model, params, task, config, split, step, tokens=tokens, **scoring
            )
        finish(run, config, task.info(), results, step, self)


KIND = Answers()
