"""Whether routed heads are worth more than as many local ones: results.json.

python experiments/routing/measure.py

Trains the small twins of the Routing Transformer, and the same model with a window in every head,
on the same text with as many steps. What stands in results.json already is not measured again:
delete it to do so. 6 to 22 minutes of one CPU core a run.
"""

import copy
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

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
MODELS = {
    "one of four heads of the last layer": ("pg19", 500),
    "two of four heads of every layer": ("enwik8", 500),
    "none": (None, 500),
    "one of four heads of the last layer, 1500 steps": ("pg19", 1500),
    "none, 1500 steps": (None, 1500),
}
"""Which heads route: the published model whose twin that is, and steps."""
SEEDS = (0,)


def config_of(name: str, seed: int) -> ConfigDict:
    """That of a twin, or one that differs from it in its attention alone."""
    data, steps = MODELS[name]
    config = load(f"{TWIN}:size=scaled,data={data or 'enwik8'}")
    if data is None:
        window = config.attention.window.window
        attention = base("window").attention
        config = ConfigDict(copy.deepcopy({**config.to_dict(), "attention": attention.to_dict()}))
        config.attention.window = window
    config.seed = seed
    config.train.steps = steps
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
    for seed in SEEDS:
        for name in MODELS:
            if str(seed) in runs.setdefault(name, {}):
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
