"""Adapts a frozen model of one text to another by a prefix, kept as sums or written out:
results.json.

python experiments/ntk/measure.py FOLDER [WAY ...]

Trains a small model in FOLDER unless it is there already, freezes it, and trains nothing but what a
mechanism adds to it. Rates are chosen on the validation split, numbers are those of the test split;
every way is written down when it is done.
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from attnlab.config import base
from attnlab.evaluate import score
from attnlab.mechanisms.ntk import of_prefix
from attnlab.optimizer import learn_only, make_optimizer
from attnlab.overrides import override
from attnlab.runs import Run, open_run
from attnlab.step import init_state, make_step
from attnlab.tensors import open_tensors
from attnlab.train import train
from attnlab.transfer import export_run, import_file

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
FROM, TO = "kjv", "shakespeare"
SIZES = {
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
LEARNING = {"optimizer.learning_rate": 5e-3, "optimizer.warmup": 20, "train.steps": 800}
ADAPTING = {"optimizer.warmup": 20, "optimizer.weight_decay": 0.0, "train.steps": 150}
PREFIX = str(HERE / "prefix.py")
WAYS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "nothing": ("softmax", {}, ()),
    "ntk": ("ntk", {}, (0.5, 5.0, 50.0)),
    "prefix of 8": (PREFIX, {"attention.length": 8}, (0.02, 0.1)),
    "all parameters": ("softmax", {}, (0.005,)),
}
"""The mechanism, its options, and the rates that are tried."""
SCORED = 16384  # tokens


def config_of(attention: str, corpus: str, changes: Mapping[str, Any]) -> ConfigDict:
    config = base(attention, position="rope")
    for path, value in (SIZES | {"task.corpus": corpus} | dict(changes)).items():
        override(config, path, str(value))
    return config


def learned(params: Any) -> dict[str, int]:
    """The paths of what is learned, with their sizes: the parameters of a mechanism, or all where
    it has none."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = {jax.tree_util.keystr(path): leaf.size for path, leaf in leaves}
    return {path: size for path, size in sizes.items() if "['mechanism']" in path} or sizes


def adapt(run: Run) -> Any:
    """The parameters of a run after training what is `learned`."""
    task, config, own = run.task(), run.config, learned(run.params)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    optimizer = learn_only(optimizer, own.__contains__)
    state = init_state(run.model, optimizer, config)._replace(params=run.params)
    step = jax.jit(make_step(run.model, optimizer, config))
    for _, batch in zip(range(config.train.steps), task.batches()):
        state, _ = step(state, batch)
    return state.params


def bits(run: Run, params: Any, split: str) -> float:
    """Bits per byte of the first tokens of a split."""
    length = run.config.task.length
    options = {"length": length, "stride": length // 2, "batch": 32, "tokens": SCORED}
    found = score(run.model, params, run.task(), split, **options)
    return round(found.summary()["bits_per_byte"], 4)


def opened(file: Path, attention: str, changes: Mapping[str, Any]) -> Run:
    """The model of a file with another mechanism, about to read the other text."""
    config = config_of(attention, TO, ADAPTING | dict(changes))
    with tempfile.TemporaryDirectory() as place:
        import_file(open_tensors(file), Path(place) / "run", config, allow_partial=True)
        return open_run(Path(place) / "run")


def summed(params: Any, like: Any) -> Any:
    """The sums of every layer's prefix, as parameters of `ntk`: nothing is learned again."""
    layers = {}
    for name, layer in like["backbone"].items():
        layers[name] = layer
        if "attention" in layer:
            prefix = params["backbone"][name]["attention"]["mechanism"]
            own = {"mechanism": of_prefix(prefix["keys"], prefix["values"])}
            layers[name] = layer | {"attention": layer["attention"] | own}
    return like | {"backbone": layers}


def measure(way: str, file: Path) -> dict[str, dict]:
    """What a way makes of the model in ``file``, and of the sums of its prefix if it has one."""
    attention, changes, rates = WAYS[way]
    start, found = time.process_time(), {}
    run = opened(file, attention, changes)
    best, params = (None, run.params)
    for rate in rates:
        tried = opened(file, attention, changes | {"optimizer.learning_rate": rate})
        adapted = adapt(tried)
        found[rate] = bits(tried, adapted, "validation")
        if found[rate] == min(found.values()):
            best, params = rate, adapted
    numbers = sum(learned(params).values()) if rates else 0
    result = {"test": bits(run, params, "test"), "parameters": numbers, "rate": best}
    result |= {"validation": {str(rate): value for rate, value in found.items()}}
    result |= {"processor seconds": round(time.process_time() - start)}
    if attention != PREFIX:
        return {way: result}
    sums = opened(file, "ntk", {})
    kept = bits(sums, summed(params, sums.params), "test")
    return {way: result, f"{way}, its sums": {"test": kept}}


def held(claim: Mapping[str, Any], models: Mapping[str, Any]) -> bool:
    """Whether a claim of expected.json is what was measured: by how many bits one lies below
    another."""
    low, high = claim["below_by"]
    return low <= models[claim["than"]]["test"] - models[claim["what"]]["test"] <= high


def main(folder: str, names: Sequence[str]) -> None:
    file = Path(folder) / "first.safetensors"
    if not file.exists():
        train(config_of("softmax", FROM, LEARNING), Path(folder) / "first")
        export_run(Path(folder) / "first", file)
    models: dict[str, dict] = {}
    if RESULTS.exists():
        models = json.loads(RESULTS.read_text(encoding="utf-8"))["models"]
    about = {
        "command": "python experiments/ntk/measure.py FOLDER",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": SIZES | {"first": LEARNING, "then": ADAPTING, "scored tokens": SCORED},
    }
    for way in names or WAYS:
        models |= measure(way, file)
        print(way, models[way], flush=True)
        results = about | {"models": models}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for claim in json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]:
        print(claim["what"], "below", claim["than"], held(claim, models))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
