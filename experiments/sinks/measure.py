"""Whether heads take up an attention sink while they learn: results.json.

python experiments/sinks/measure.py

Curves that stand in results.json already are not measured again: delete them to do so. Minutes on
one CPU core, and three hours for the models of subwords.
"""

import itertools
import json
import os
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import idle
import jax
import text

from attnlab.analysis.sinks import EPSILON
from attnlab.files import read_json, write_json

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
WEIGHED_BY = ("softmax", "sigmoid", "unbiased_sigmoid", "softmax_plus_one", "key_bias")
OWN = {"unbiased_sigmoid": str(HERE / "unbiased_sigmoid.py")}
"""Normalisers of this folder."""
CURVES = {
    "idle": (idle.curve, WEIGHED_BY, (0, 1, 2)),
    "fixed": (partial(idle.curve, fixed=True), WEIGHED_BY, (0,)),
    "bytes": (partial(text.curve, kind="bytes"), ("softmax",), (0,)),
    "subwords": (partial(text.curve, kind="subwords"), WEIGHED_BY[:3], (0,)),
}
"""What learns, by what its rows are weighed, and the seeds."""


def held(claim: dict, results: dict[str, Any]) -> bool:
    """Whether a claim of expected.json is what was measured, at the last step of every seed."""
    low, high = claim["band"]
    runs = results[claim["of"]][claim["normaliser"]].values()
    return all(low <= run["curve"][-1][claim["value"]] <= high for run in runs)


def main() -> None:
    results: dict[str, Any] = {part: {} for part in CURVES}
    if RESULTS.is_file():
        results |= read_json(RESULTS)
    results |= {
        "command": "python experiments/sinks/measure.py",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "epsilon": EPSILON,
        "sizes": {
            "idle": {name: getattr(idle, name) for name in ("LENGTH", "DIM", "BATCH", "RATE")},
            **{name: kind.sizes for name, kind in text.KINDS.items()},
        },
    }
    for part, (curve, names, seeds) in CURVES.items():
        for name, seed in itertools.product(names, seeds):
            runs = results[part].setdefault(name, {})
            if str(seed) in runs:
                continue
            begun, rows = time.process_time(), []
            for row in curve(OWN.get(name, name), seed):
                rows.append(row)
                print(part, name, seed, row, flush=True)
            runs[str(seed)] = {
                "processor_seconds": round(time.process_time() - begun),
                "curve": rows,
            }
            write_json(RESULTS, results)
    for claim in json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]:
        print(claim["what"], held(claim, results))


if __name__ == "__main__":
    main()
