"""Teaches the estimates of `sea` where a trained model looks, and puts `sea` in its place:
results.json.

python experiments/sea/measure.py FOLDER

Trains the teacher in FOLDER unless it is there already: it is the model that experiments/ntk trains
first. Bits per byte of the model with other mechanisms in place of softmax, before and after all
parameters are trained on, and how much of the weight of softmax the estimates keep.
"""

import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from taught import TOP, Taught

from attnlab.analysis.observed import cut
from attnlab.config import base
from attnlab.evaluate import score
from attnlab.mechanisms.sea import Sea
from attnlab.optimizer import learn_only, make_optimizer
from attnlab.overrides import override
from attnlab.runs import Run, open_run
from attnlab.step import init_state, make_step
from attnlab.tensors import open_tensors
from attnlab.train import train
from attnlab.transfer import export_run, import_file

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
SIZES = {
    "task.corpus": "kjv",
    "task.length": 128,
    "task.batch": 16,
    "model.width": 64,
    "model.layers": 2,
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.head_dim": 16,
    "model.mlp_width": 176,
    "train.eval_every": 0,
    "train.save_every": 0,
    "train.tensorboard": False,
    "sample.tokens": 8,
}
TEACHER = {"optimizer.learning_rate": 5e-3, "optimizer.warmup": 20, "train.steps": 800}
TEACHING = TEACHER | {"task.batch": 8, "train.steps": 150}
TUNING = TEACHING | {"optimizer.learning_rate": 1e-3, "train.steps": 60}
CELLS, KEPT = 32, (4, 8, 16)
TAUGHT = 8
"""Keys kept while the estimates are taught."""
UNTAUGHT = f"sea, {TAUGHT} keys, not taught"
SEA = {"attention.cells": CELLS, "attention.kept": TAUGHT}
PLACED: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "linear": ("linear", {}),
    f"window of {TAUGHT}": ("window", {"attention.window": TAUGHT}),
    UNTAUGHT: ("sea", SEA),
}
SCORED = 16384  # tokens of the validation split
COUNTS = {
    "cells": CELLS,
    "keys kept while taught": TAUGHT,
    "top keys": TOP,
    "scored tokens": SCORED,
}
WINDOWS = 16  # of that split, in which it is counted what estimates keep


def config_of(attention: str, *changes: Mapping[str, Any]) -> ConfigDict:
    config = base(attention, position="rope")
    for path, value in dict(item for z in (SIZES, *changes) for item in z.items()).items():
        override(config, path, str(value))
    return config


def placed(file: Path, attention: str, *changes: Mapping[str, Any]) -> Run:
    """The teacher with another mechanism, about to be trained."""
    with tempfile.TemporaryDirectory() as place:
        config = config_of(attention, *changes)
        import_file(open_tensors(file), Path(place) / "run", config, allow_partial=True)
        return open_run(Path(place) / "run")


def trained(run: Run, learned: Callable[[str], bool] = lambda path: True) -> Any:
    """The parameters of a run after the steps of its config."""
    task, config = run.task(), run.config
    optimizer = learn_only(make_optimizer(config.optimizer, config.train.steps), learned)
    state = init_state(run.model, optimizer, config)._replace(params=run.params)
    step = jax.jit(make_step(run.model, optimizer, config))
    for _, batch in zip(range(config.train.steps), task.batches()):
        state, _ = step(state, batch)
    return state.params


def bits(run: Run, params: Any, **changes: int) -> float:
    """Bits per byte with ``changes`` to the options of the mechanism."""
    layers = tuple(Sea(**(vars(z) | changes)) if changes else z for z in run.model.mechanisms)
    length = run.config.task.length
    options = {"length": length, "stride": length, "batch": 8, "tokens": SCORED}
    model = run.model.clone(mechanisms=layers)
    found = score(model, params, run.task(), "validation", **options)
    return round(found.summary()["bits_per_byte"], 4)


def looked_at(run: Run, params: Any, kept: int) -> dict[str, float]:
    """On held-out text, means over layers, heads and queries with at least four times ``kept`` keys
    in sight: the weight of dense attention on the keys that the estimates keep, and the share of
    the `TOP` keys of the largest weight; the same for a window of as many, and for as many at
    random."""
    inner = Sea(**(vars(run.model.mechanisms[0]) | {"kept": kept}))
    model = run.model.clone(mechanisms=(Taught(inner),) * len(run.model.mechanisms))
    forward = jax.jit(lambda p, *tokens: model.apply({"params": p}, *tokens)[1].aux)
    task, sums = run.task(), {}
    documents, length = task.documents("validation"), run.config.task.length
    for batch in cut(documents, task.boundary, length, WINDOWS, 8):
        far = (batch["seg"] >= 0) & (batch["pos"] + 1 >= 4 * kept)
        chance = (kept / (batch["pos"] + 1))[far]
        sums.setdefault("either, at random", []).append(chance.mean())
        for layer in forward(params, batch["tokens"], batch["pos"], batch["seg"]):
            for who, values in layer["kept"].items():
                for name, value in values.items():
                    seen = np.asarray(value)[np.broadcast_to(far[:, None], value.shape)]
                    sums.setdefault(f"{name}, {who}", []).append(seen.mean())
    return {name: round(float(np.mean(each)), 4) for name, each in sums.items()}


def teach(file: Path) -> Iterator[tuple[str, dict]]:
    """What estimates keep before and after they are taught, and bits per byte with them."""
    run = placed(file, "sea", TEACHING, SEA)
    yield UNTAUGHT, {"keeps": looked_at(run, run.params, TAUGHT)}
    layers = tuple(Taught(z) for z in run.model.mechanisms)
    teaching = run._replace(model=run.model.clone(mechanisms=layers))
    params = trained(teaching, lambda path: "mechanism" in path)
    for kept in KEPT:
        placing = {"placed": bits(run, params, kept=kept)}
        yield f"sea, {kept} keys", placing | {"keeps": looked_at(run, params, kept)}
    tuning = placed(file, "sea", TUNING, SEA)._replace(params=params)
    yield f"sea, {TAUGHT} keys", {"tuned": bits(run, trained(tuning))}


def place(file: Path) -> Iterator[tuple[str, dict]]:
    """Bits per byte with mechanisms that nothing was taught."""
    for label, (attention, changes) in PLACED.items():
        run = placed(file, attention, TUNING, changes)
        yield label, {"placed": bits(run, run.params), "tuned": bits(run, trained(run))}


def held(claim: Mapping[str, Any], models: Mapping[str, Any]) -> bool:
    """Whether a claim of expected.json is what was measured: by how many bits one model lies below
    another at a ``stage``, or by how much of what it ``keeps`` it lies above something else."""
    what = models[claim["what"]]
    if "keeps" in claim:
        low, high = claim["above_by"]
        return low <= what["keeps"][claim["keeps"]] - what["keeps"][claim["than"]] <= high
    low, high = claim["below_by"]
    return low <= models[claim["than"]][claim["stage"]] - what[claim["stage"]] <= high


def main(folder: str) -> None:
    file = Path(folder) / "first.safetensors"
    if not file.exists():
        train(config_of("softmax", TEACHER), Path(folder) / "first")
        export_run(Path(folder) / "first", file)
    models: dict[str, dict] = {}
    about = {
        "command": "python experiments/sea/measure.py FOLDER",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": SIZES | {"teacher": TEACHER, "teaching": TEACHING, "tuning": TUNING} | COUNTS,
    }
    for label, numbers in itertools.chain(teach(file), place(file)):
        models[label] = models.get(label, {}) | numbers
        print(label, numbers, flush=True)
        RESULTS.write_text(json.dumps(about | {"models": models}, indent=1) + "\n", "utf-8")
    for claim in json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]:
        print(claim, held(claim, models))


if __name__ == "__main__":
    main(sys.argv[1])
