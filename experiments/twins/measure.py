"""Times a training step of the small twin of every published model: results.json.

python experiments/twins/measure.py [NAME ...]

On one CPU core: pin the process to one, as `taskset -c 0` does. The time of the processor is taken,
so that other work on the machine matters little. Prints the twins that take longer than
expected.json allows.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from attnlab import tasks
from attnlab.kinds import kind_of
from attnlab.optimizer import make_optimizer
from attnlab.overrides import load
from attnlab.step import init_state, make_step

HERE = Path(__file__).parent
PAPERS = HERE.parents[1] / "configs" / "papers"
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
STEPS = 5  # after the first, which compiles


def measure(name: str) -> dict[str, Any]:
    """Seconds of the processor for a step (the median), and what the whole run comes to."""
    config = load(f"{PAPERS / name}.py:size=scaled")
    task: Any = tasks.build(config.task, seed=config.seed)
    model = kind_of(config).make_model(config, task)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = jax.jit(partial(init_state, model, optimizer, config))()
    step = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    batches, seconds = task.batches(), []
    for _ in range(STEPS + 1):
        batch, begun = next(batches), time.process_time()
        state, _ = jax.block_until_ready(step(state, batch))
        seconds.append(time.process_time() - begun)
    a_step = statistics.median(seconds[1:])
    return {
        "config": f"configs/papers/{name}.py:size=scaled",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "steps": config.train.steps,
        "tokens a step": config.task.batch * config.task.length,
        "seconds to compile": round(seconds[0] - a_step, 1),
        "seconds a step": round(a_step, 2),
        "minutes": round(a_step * config.train.steps / 60, 1),
    }


def outside(twins: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The twins that take longer than they may, or were not measured."""
    most = expected["most minutes"]
    names = sorted(path.stem for path in PAPERS.glob("*.py"))
    return [n for n in names if n not in twins or not 0 < twins[n]["minutes"] <= most]


def main(names: Sequence[str]) -> None:
    results: dict[str, Any] = {"twins": {}}
    if RESULTS.exists():
        results |= json.loads(RESULTS.read_text(encoding="utf-8"))
    results |= {
        "command": "python experiments/twins/measure.py",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    for name in names or sorted(path.stem for path in PAPERS.glob("*.py")):
        results["twins"][name] = measure(name)
        print(name, results["twins"][name], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    print("\n".join(outside(results["twins"], expected)) or "as expected")


if __name__ == "__main__":
    main(sys.argv[1:])
