"""What surrounds the arithmetic of a training step: input, dispatch, compilation: overhead.json.

python experiments/benchmarks/overhead.py
"""

import itertools
import json
import platform
import statistics
import sys
import time
from pathlib import Path

from attnlab import large_pages

if __name__ == "__main__":
    large_pages.use()  # as the command line does

from attnlab import tasks
from attnlab.bench.command import default_config
from attnlab.bench.subjects import build
from attnlab.config import put
from attnlab.overrides import load
from attnlab.provenance import find_commit, find_versions

RESULTS = Path(__file__).with_name("overhead.json")
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
LAYERS = (2, 6, 12, 24)
BATCHES = 200


def time_input() -> float:
    """Tokens a second that the input pipeline of configs/quickstart.py makes when nobody trains."""
    config = load(str(QUICKSTART))
    task = tasks.build(config.task, seed=config.seed)
    batches = task.batches()
    next(batches)
    begun = time.perf_counter()
    tokens = sum(b["tokens"].size for b in itertools.islice(batches, BATCHES))
    seconds = time.perf_counter() - begun
    batches.close()
    return tokens / seconds


def model(layers: int, width: int, batch: int):
    config = default_config()
    for field, value in (("layers", layers), ("width", width), ("heads", 4)):
        put(config, f"model.{field}", value)
    put(config, "task.batch", batch)
    return config


def time_dispatch() -> float:
    """Seconds of a training step with next to nothing to compute: one layer of width 16, 8 tokens;
    the median of 100."""
    subject = build(model(1, 16, 1), "train", 8)
    subject.call()
    seconds = []
    for _ in range(100):
        begun = time.perf_counter()
        subject.call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def time_compilation(layers: int) -> float:
    """Seconds to trace and compile a training step of so many layers of width 256."""
    return build(model(layers, 256, 1), "train", 256).compiling


if __name__ == "__main__":
    found = {
        "command": ["python", "experiments/benchmarks/overhead.py"],
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {"python": platform.python_version(), **find_versions()},
        "git": find_commit(),
        "input_tokens_per_second": time_input(),
        "dispatch_seconds": time_dispatch(),
        "compile_seconds": {layers: time_compilation(layers) for layers in LAYERS},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    json.dump(found, sys.stdout, indent=1)
