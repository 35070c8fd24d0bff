"""Points of which some are named in order: the share of sequences that are right."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab.config import pointer_of
from attnlab.errors import UserError
from attnlab.kinds.answers import Answers
from attnlab.pointing import format_named, measures_of, mix_counts, score_named


class Pointers(Answers):
    unit, question, picture = "points", "What was found?", "examples.png"

    def make_model(self, config: ConfigDict, task: Any) -> Any:
        model = pointer_of(config, task.recipe)
        if any(mechanism.carries for mechanism in model.mechanisms):
            raise UserError(
                f"attention {config.attention.name} carries its memory from batch to batch, and "
                f"rows of task {task.name} have nothing to do with each other; choose another"
            )
        return model

    def begin(self, config: ConfigDict, task: Any, path: Path) -> None:
        super().begin(config, task, path)
        if config.model.causal:
            raise UserError(
                f"model.causal=true: the points of task {task.name} are read in both directions "
                "before one is named; set model.causal=false"
            )

    def score(self, model, params, task, config, split, step, **options):
        return score_named(model, params, task, config, split, step, **options)

    def format(self, result: dict[str, Any]) -> str:
        return format_named(result)

    def scores(self, result: Mapping[str, Any]) -> dict[str, Any]:
        shown = {key.replace("_", " "): result[key] for key in measures_of(result)}
        shown |= {"nats per answer": result["nats_per_answer"], "rows": result["rows"]}
        by_points = {f"accuracy of {r['points']}": r["accuracy"] for r in result["by_points"]}
        return shown | by_points

    def plot(self, result: dict[str, Any], path: Path) -> None:
        from attnlab.plots import plot_examples

        plot_examples(result["examples"], path)

    def probe(self, run: Any, task: Any, split: str, length: int, tokens: int) -> dict[str, Any]:
        options = {"length": length, "tokens": tokens}
        found = self.score(run.model, run.params, task, run.config, split, run.step, **options)
        return {**found, "axis": "points", "cells": mix_counts(found["by_points"])}


KIND = Pointers()
