"""Language modelling: bits per byte of held-out documents."""

import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab.config import model_of
from attnlab.data import tokenizers
from attnlab.decode import check_prompt, prompt_ids
from attnlab.evaluate import format_scores, score_split
from attnlab.kinds import Kind
from attnlab.needle import measure_recall

SAMPLES = 32
"""Windows with a planted string."""


class Text(Kind):
    has_text = True

    def make_model(self, config: ConfigDict, task: Any) -> Any:
        if task is None:
            return model_of(config, tokenizers.size_of(config.task.tokenizer))
        return model_of(config, task.vocab_size, task.tokenizer)

    def open(self, config: ConfigDict, path: Path) -> tuple[Any, Any]:
        tokenizer = tokenizers.load(path)
        return model_of(config, tokenizer.vocab_size, tokenizer), tokenizer

    def begin(self, config: ConfigDict, task: Any, path: Path) -> None:
        check_prompt(prompt_ids(config.sample.prompt, task.tokenizer), config.task.length)
        task.tokenizer.save(path)

    def describe_loss(self, task: Any, loss: float) -> dict[str, float]:
        return {"bits_per_byte": loss / math.log(2) / task.bytes_per_token}

    def score(self, model, params, task, config, split, step, **options):
        return score_split(model, params, task, config, split, step, **options)

    def format(self, result: dict[str, Any]) -> str:
        return format_scores(result)

    def plot(self, result: dict[str, Any], path: Path) -> None:
        from attnlab.plots import plot_contexts

        name = f"{result['split']}, {result['length']} tokens"
        plot_contexts({name: result["loss_by_context"]}, path)

    def probe(self, run: Any, task: Any, split: str, length: int, tokens: int) -> dict[str, Any]:
        model, params, config = run.model, run.params, run.config
        found = score_split(
            model, params, task, config, split, run.step, length=length, tokens=tokens
        )
        batch = max(1, config.evaluate.batch * config.task.length // length)
        samples = min(SAMPLES, max(1, tokens // length))
        recall = measure_recall(
            model, params, task, length=length, split=split, samples=samples, batch=batch
        )
        cells = [
            {"at": row["distance"], "accuracy": row["accuracy"]} for row in recall["distances"]
        ]
        return {**found, "recall": recall, "axis": "distance", "cells": cells}

    def finish(self, run, config, task, model, params, step, **scoring) -> None:
        from attnlab.report import finish

        finish(run, config, task, model, params, step, **scoring)


KIND = Text()
