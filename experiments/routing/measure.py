"""Whether routed heads are worth more than as many local ones: results.json.

python experiments/routing/measure.py

Trains the small twins of the Routing Transformer, and the same model with a window in every head,
on the same text with as many steps; smaller ones, by what one head sees (`worth.py`); and some that
look for a passkey (`needles.py`). What stands in results.json already is not measured again: delete
it to do so. 5 to 22 minutes of one CPU core a run.
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
import needles
import worth
from ml_collections import ConfigDict

from attnlab.config import base
from attnlab.files import read_json, write_json
from attnlab.overrides import load
from attnlab.runs import open_run
from attnlab.train import train

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
DESCRIBED = {
    "command": "python experiments/routing/measure.py",
    "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
}
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
PASSKEY = {"two of four heads of every layer": "enwik8", "none": None}
SEEDS = {name: chosen.seeds for name, chosen in (MODELS | worth.FOURTH).items()}


def twin_of(chosen: Model) -> ConfigDict:
    """That of a twin, or one that differs from it in its attention alone."""
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
    config.train.steps = chosen.steps
    config.train.eval_every = config.train.save_every = 0
    config.train.tensorboard = False
    config.evaluate.tokens = 2**16
    config.sample.tokens = 8
    return config


def config_of(name: str, seed: int) -> ConfigDict:
    if name in MODELS:
        config = twin_of(MODELS[name])
    else:
        config = worth.config_of(name, twin_of(Model("enwik8", 0)))
    config.seed = seed
    return config


def find(name: str, seed: int) -> dict[str, Any]:
    """What a shrunk twin finds (`needles.py`)."""
    twin = twin_of(Model(PASSKEY[name], 0))
    twin.seed = seed
    return needles.find(twin)


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


PARTS = {"models": (SEEDS, measure), "passkey": (dict.fromkeys(PASSKEY, (0, 1)), find)}


def held(claim: dict[str, Any], results: dict[str, Any]) -> bool:
    """Whether a claim of expected.json is what was measured, with every seed."""
    low, high = claim["above_by"]
    runs, value = results[claim.get("of", "models")], claim.get("value", "bits_per_byte")
    what, than = (runs[claim[name]] for name in ("what", "than"))
    gaps = (what[seed][value] - than[seed][value] for seed in than)
    return what.keys() == than.keys() and all(low <= gap <= high for gap in gaps)


def main() -> None:
    results: dict[str, Any] = read_json(RESULTS) if RESULTS.is_file() else {}
    for part, (seeds, measured) in PARTS.items():
        for seed, name in itertools.product((0, 1), seeds):
            runs = results.setdefault(part, {}).setdefault(name, {})
            if seed not in seeds[name] or str(seed) in runs:
                continue
            runs[str(seed)] = measured(name, seed)
            print(part, name, seed, runs[str(seed)], flush=True)
            write_json(RESULTS, results | DESCRIBED)
    for claim in json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]:
        print(claim["what"], "than", claim["than"], held(claim, results))


if __name__ == "__main__":
    main()
