"""Whether routed heads are worth more than as many local ones: results.json.

python experiments/routing/measure.py

Trains the small twins of the Routing Transformer, and the same model with a window in every head,
on the same text with as many steps. What stands in results.json already is not measured again:
delete it to do so. 6 to 22 minutes of one CPU core a run.
"""

import copy
import itertools
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from attnlab.config import base
from attnlab.files import read_json, write_json
from attnlab.overrides import load
from attnlab.runs import open_run
from attnlab.train import train

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
TWIN = HERE.parents[1] / "configs" / "papers" / "routing_transformer.py"


class Model(NamedTuple):
    """The published model whose twin it is, or none, with a window in every head; what it learns
    from; and whether all tokens are one cluster, so that its routed heads see everything."""

    data: str | None
    steps: int
    corpus: str = "kjv"
    tokenizer: str = "bytes"
    seeds: tuple[int, ...] = (0,)
    everything: bool = False


CODE = {"steps": 600, "corpus": "sympy", "tokenizer": "bpe:4096"}
MODELS = {
    "one of four heads of the last layer": Model("pg19", 500),
    "two of four heads of every layer": Model("enwik8", 500),
    "none": Model(None, 500),
    "one of four heads of the last layer, 1500 steps": Model("pg19", 1500),
    "two of four heads of every layer, 1500 steps": Model("enwik8", 1500),
    "none, 1500 steps": Model(None, 1500),
    "one of four heads of the last layer, code": Model("pg19", **CODE, seeds=(0, 1)),
    "none, code": Model(None, **CODE, seeds=(0, 1)),
    "one that sees everything, code": Model("pg19", **CODE, everything=True),
}
"""By which heads route."""


def config_of(name: str, seed: int) -> ConfigDict:
    """That of a twin, or one that differs from it in its attention alone."""
    chosen = MODELS[name]
    config = load(f"{TWIN}:size=scaled,data={chosen.data or 'enwik8'},corpus={chosen.corpus}")
    config.task.tokenizer = chosen.tokenizer
    if chosen.data is None:
        window = config.attention.window.window
        attention = base("window").attention
        config = ConfigDict(copy.deepcopy({**config.to_dict(), "attention": attention.to_dict()}))
        config.attention.window = window
    if chosen.everything:
        config.attention.routing.clusters = 1
        config.attention.routing.length = config.task.length
    config.seed = seed
    config.train.steps = chosen.steps
    config.train.eval_every = config.train.save_every = 0
    config.train.tensorboard = False
    config.evaluate.tokens = 2**16
    config.sample.tokens = 8
    return config


def measure(name: str, seed: int) -> dict[str, Any]:
    """Bits per byte of held-out text after training, parameters, and seconds of the processor."""
    begun, config = time.process_time(), config_of(name, seed)
    with tempfile.TemporaryDirectory() as folder:
        train(config, folder)
        found = read_json(Path(folder) / "validation.json")
        parameters = sum(leaf.size for leaf in jax.tree.leaves(open_run(folder).params))
    return {
        "bits_per_byte": round(found["bits_per_byte"], 4),
        "parameters": parameters,
        "steps": config.train.steps,
        "processor_seconds": round(time.process_time() - begun),
    }


def held(claim: dict[str, Any], runs: dict[str, dict[str, Any]]) -> bool:
    """Whether a claim of expected.json is what was measured, with every seed."""
    low, high = claim["above_by"]
    what, than = (runs[claim[name]] for name in ("what", "than"))
    gaps = (what[seed]["bits_per_byte"] - than[seed]["bits_per_byte"] for seed in than)
    return what.keys() == than.keys() and all(low <= gap <= high for gap in gaps)


def main() -> None:
    runs: dict[str, dict[str, Any]] = read_json(RESULTS)["models"] if RESULTS.is_file() else {}
    for seed, name in itertools.product((0, 1), MODELS):
        if seed not in MODELS[name].seeds or str(seed) in runs.setdefault(name, {}):
            continue
        runs[name][str(seed)] = measure(name, seed)
        print(name, seed, runs[name][str(seed)], flush=True)
        write_json(RESULTS, described(runs))
    for claim in json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]:
        print(claim["what"], "than", claim["than"], held(claim, runs))


def described(runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "python experiments/routing/measure.py",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "models": runs,
    }


if __name__ == "__main__":
    main()
