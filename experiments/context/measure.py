"""What context is worth on text, in bits per byte: windows, blocks, and memory of earlier segments:
results.json.

python experiments/context/measure.py

Trains one small model per entry, on the same text and with the same budget, and scores each on the
same held-out bytes. The model with a memory is scored a second time without it.
"""

import dataclasses
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from attnlab.config import base
from attnlab.evaluate import score
from attnlab.overrides import override
from attnlab.runs import Run, open_run
from attnlab.train import train

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
SIZES = {
    "task.corpus": "kjv",
    "model.width": 64,
    "model.layers": 2,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup": 20,
    "train.steps": 350,
    "train.eval_every": 0,
    "train.save_every": 0,
    "train.tensorboard": False,
    "sample.tokens": 8,
}
WINDOWS = {"task.length": 256, "task.batch": 8}
SEGMENTS = {"task.length": 64, "task.batch": 16, "task.packing": "stream"}
ENTRIES: dict[str, tuple[str, dict]] = {
    "full, 256": ("softmax", WINDOWS),
    "window, 32": ("window", WINDOWS | {"attention.window": 32}),
    "block, 32": ("block", WINDOWS | {"attention.block": 32}),
    "segment, 64": ("block", SEGMENTS | {"attention.block": 64}),
    "segment, 64, with memory, 64": (
        "transformer_xl",
        SEGMENTS | {"attention.segment": 64, "attention.memory": 64},
    ),
}
DROPPED = "the same, read without its memory"
SCORED = 65536  # tokens of the validation split


def config_of(attention: str, changes: dict) -> ConfigDict:
    config = base(attention, position="alibi")
    for path, value in (SIZES | changes).items():
        override(config, path, str(value))
    return config


def bits(run: Run, **changes: int) -> float:
    """Bits per byte of a run, with ``changes`` to the options of its mechanism."""
    model, length = run.model, run.config.task.length
    changed = (dataclasses.replace(mechanism, **changes) for mechanism in model.mechanisms)
    model = model.clone(mechanisms=tuple(changed))
    options = {"length": length, "stride": length, "batch": 4096 // length, "tokens": SCORED}
    found = score(model, run.params, run.task(), "validation", **options)
    return round(found.summary()["bits_per_byte"], 4)


def measure() -> dict[str, float]:
    found = {}
    for label, (attention, changes) in ENTRIES.items():
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            train(config_of(attention, changes), folder)
            run = open_run(folder)
            found[label] = bits(run)
            if attention == "transformer_xl":
                found[DROPPED] = bits(run, memory=0)
        print(label, found[label], f"{time.monotonic() - start:.0f} s", flush=True)
    return found


def held(claim: dict, found: dict[str, float]) -> bool:
    """Whether a claim of expected.json is what was measured."""
    low, high = claim["above_by"]
    return low <= found[claim["what"]] - found[claim["than"]] <= high


def main() -> None:
    found = measure()
    results = {
        "command": "python experiments/context/measure.py",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": SIZES | {"windows": WINDOWS, "segments": SEGMENTS, "evaluated tokens": SCORED},
        "bits_per_byte": found,
    }
    claims = json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]
    results["held"] = {f"{c['what']} against {c['than']}": held(c, found) for c in claims}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results["held"], indent=1))


if __name__ == "__main__":
    main()
