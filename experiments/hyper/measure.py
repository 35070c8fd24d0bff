"""Time of `hyper` beside `softmax` by length, and where they cross: results.json.

python experiments/hyper/measure.py

One `attnlab bench` for each mode, one core; leaves runs/hyper/MODE/bench.jsonl. Ratios are of
seconds of the processor, which other work on the machine changes least.
"""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
BENCH = "--attention=softmax,hyper --lengths=1k,2k,4k,8k --threads=1 --repeats=3"
MODES = ("fwdbwd", "fwd")
KEPT = ("label", "length", "cpu", "wall", "peak", "flops", "device", "versions", "git", "command")


def seconds(row: Mapping[str, Any]) -> float:
    """Of the processor, the median of the calls."""
    return row["cpu"]["median"]


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Seconds of softmax for one of hyper, by length."""
    found = {(row["label"].partition(" ")[0], row["length"]): seconds(row) for row in rows}
    lengths = sorted({row["length"] for row in rows})
    return {n: round(found["softmax", n] / found["hyper", n], 4) for n in lengths}


def crossover(ratio: Mapping[int, float]) -> float:
    """The length from which on hyper is the faster one, between the two measured ones around it
    on logarithmic scales; infinite where it never is, 0 where it always is."""
    lengths = sorted(ratio)
    slower = [n for n in lengths if ratio[n] < 1]
    if not slower or slower[-1] == lengths[-1]:
        return math.inf if slower else 0.0
    low, high = slower[-1], lengths[lengths.index(slower[-1]) + 1]
    a, b = math.log(ratio[low]), math.log(ratio[high])
    return round(low * (high / low) ** (-a / (b - a)))


def held(claim: Mapping[str, Any], modes: Mapping[str, Any]) -> bool:
    """Whether a claim of expected.json is what was measured: a crossover, or a ratio at a length,
    within its bounds."""
    mode, (low, high) = modes[claim["mode"]], claim["between"]
    value = mode["ratio"][claim["length"]] if "length" in claim else mode["crossover"]
    return low <= value <= high


def recorded(path: Path) -> dict[str, Any]:
    """What a bench.jsonl says."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [{k: v for k, v in json.loads(z).items() if k in KEPT} for z in lines]
    rows = [row for row in rows if "length" in row]  # not what a product of matrices reaches
    ratio = ratios(rows)
    return {
        "ratio": {str(n): r for n, r in ratio.items()},
        "crossover": crossover(ratio),
        "rows": rows,
    }


def main(modes: Sequence[str]) -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"modes": {}}
    found["command"] = "python experiments/hyper/measure.py"
    found["hardware"] = f"1 of {os.cpu_count()} CPU cores, {platform.machine()}"
    for mode in modes:
        out = Path("runs/hyper") / mode
        words = [*BENCH.split(), f"--mode={mode}", f"--out={out}"]
        subprocess.run([sys.executable, "-m", "attnlab", "bench", *words], check=True)
        found["modes"][mode] = recorded(out / "bench.jsonl")
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(mode, found["modes"][mode]["ratio"], found["modes"][mode]["crossover"])


if __name__ == "__main__":
    main(sys.argv[1:] or MODES)
