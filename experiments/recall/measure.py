"""Trains mechanisms to recall pairs and to find needles: results.json.

python experiments/recall/measure.py [NAME...]

A name is that of a mechanism; all of them by default. What stands in results.json already is not
measured again: delete its rows to do so. About a minute of one CPU core a mechanism and task.
"""

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.answers import score_answers
from attnlab.config import base, model_of
from attnlab.files import read_json, write_json
from attnlab.model import Transformer, initial_memory
from attnlab.optimizer import make_optimizer
from attnlab.overrides import override
from attnlab.step import init_state, make_step

RESULTS = Path(__file__).with_name("results.json")
FIRST = 4
"""Tokens that the first layer sees; the second layer is under test."""
NEAR = {"window": ("window",), "transformer_xl": ("segment", "memory")}
"""Options of a first layer that say how many those are; of the second kind it is 4 to 7."""
SIZES = {
    "task.length": 64,
    "task.batch": 32,
    "model.width": 64,
    "model.layers": 2,
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.head_dim": 16,
    "model.mlp": "none",
    "model.tied": False,
    "optimizer.warmup": 50,
    "optimizer.learning_rate": 1e-2,
    "evaluate.batch": 128,
    "train.steps": 1000,
}
TASKS = {
    "mqar": {"task.pairs": 4, "task.vocab": 64, "task.power": 1.0},
    "needle": {"task.keys": 4, "task.queries": 4, "task.names": 16, "task.numbers": 16},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "anchor": {"block": 4, "step": 2, "stripes": 8},
    "bigbird": {"block": 4, "window": 2, "random": 1},
    "block": {"block": 16},
    "block_topk": {"block": 4, "chosen": 2},
    "capsule": {},
    "compressive": {"segment": 8, "memory": 8, "compressed": 8},
    "conscious": {},
    "convolutional": {},
    "delta": {},
    "dynamic_mask": {"kept": 8},
    "favor": {"features": 64, "redraw": 0},
    "fenwick": {"levels": 8},
    "fixed": {"block": 8, "columns": 1},
    "gated_delta": {},
    "gated_slots": {"slots": 16},
    "han": {},
    "hierarchical": {"block": 4},
    "hourglass": {"factor": 4, "near": 4},
    "hyper": {"leaf": 16, "block": 4, "samples": 4},
    "importance": {},
    "infini": {"segment": 8},
    "infini_delta": {"segment": 8},
    "key_bias": {},
    "knn_memory": {"segment": 8, "memory": 64, "neighbours": 4},
    "landmark": {"block": 4, "chosen": 2},
    "linear": {},
    "long_short": {"segment": 4, "window": 8},
    "low_rank": {"rank": 16},
    "lsh": {"rounds": 2, "buckets": 8, "length": 8},
    "magnitude_linear": {},
    "mixture_of_heads": {},
    "ntk": {},
    "power": {"block": 4, "window": 2},
    "random_positions": {},
    "recurrent_memory": {"segment": 8, "slots": 4},
    "routing": {"clusters": 4, "length": 16},
    "sea": {"cells": 16, "kept": 8},
    "segment": {"segment": 8},
    "segment_pool": {"segment": 8},
    "segment_second": {"segment": 8},
    "slots": {"slots": 16},
    "softmax": {},
    "static": {},
    "strided": {"stride": 8},
    "switch_head": {},
    "taylor": {},
    "titans": {},
    "titans_context": {"segment": 8},
    "titans_gate": {"window": 8},
    "titans_layer": {"window": 8},
    "transformer_xl": {"segment": 8, "memory": 8},
    "uniform": {},
    "window": {"window": 16},
}
"""What differs from the defaults of a mechanism, which are made for longer rows."""
LOOK_EVERY = 100
TESTED = 256  # rows
ENOUGH = 0.99
"""Held-out accuracy at which training stops."""


def config_of(name: str, task: str) -> ConfigDict:
    # Options of a mechanism are those of all its layers: before a window stands another kind.
    first = "transformer_xl" if name == "window" else "window"
    config = base(f"{first}+{name}", "absolute", task=task)
    sizes = SIZES | TASKS[task]
    sizes |= {f"attention.{first}.{option}": FIRST for option in NEAR[first]}
    sizes |= {f"attention.{name}.{option}": value for option, value in OPTIONS[name].items()}
    for path, value in sizes.items():
        override(config, path, str(value))
    return config


def state_bytes(model: Transformer, length: int) -> int:
    """What the second layer remembers of a sequence of so many tokens."""
    memory = jax.eval_shape(lambda: initial_memory(model.architecture, model.mechanisms, 1, length))
    return sum(z.size * z.dtype.itemsize for z in jax.tree.leaves(memory[1]))


def measure(name: str, task_name: str) -> dict[str, Any]:
    begun, config = time.process_time(), config_of(name, task_name)
    task = tasks.build(config.task, seed=config.seed)
    model = model_of(config, task.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = jax.jit(lambda: init_state(model, optimizer, config))()
    step = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    options, curve = {"tokens": TESTED * config.task.length}, []
    for number in range(1, config.train.steps + 1):
        state, _ = step(state, task.batch(number - 1))
        if number % LOOK_EVERY == 0:
            seen = score_answers(model, state.params, task, config, "validation", number, **options)
            curve.append([number, round(seen["accuracy"], 4)])
            if seen["accuracy"] >= ENOUGH:
                break
    found = score_answers(model, state.params, task, config, "test", curve[-1][0], **options)
    return {
        "accuracy": round(found["accuracy"], 4),
        "accuracy_95": [round(x, 4) for x in found["accuracy_95"]],
        "curve": curve,
        "state_bytes": state_bytes(model, config.task.length),
        "parameters": sum(z.size for z in jax.tree.leaves(state.params)),
        "processor_seconds": round(time.process_time() - begun),
    }


def held(claim: dict, rows: dict[str, dict]) -> bool:
    """Whether a claim of expected.json is what was measured."""
    low, high = claim["accuracy"]
    return all(low <= rows[name][claim["task"]]["accuracy"] <= high for name in claim["of"])


def main(names: list[str]) -> None:
    rows = read_json(RESULTS)["rows"] if RESULTS.is_file() else {}
    for name in names or OPTIONS:
        for task in TASKS:
            if task in rows.setdefault(name, {"options": OPTIONS[name]}):
                continue
            rows[name][task] = row = measure(name, task)
            print(
                name, task, row["state_bytes"], row["curve"], row["processor_seconds"], flush=True
            )
            about = {
                "command": "python experiments/recall/measure.py",
                "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
                "versions": {"python": platform.python_version(), "jax": jax.__version__},
                "sizes": SIZES | {"tasks": TASKS, "tested rows": TESTED, "seed": 0},
            }
            write_json(RESULTS, about | {"rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
