"""Time and memory of one gradient by length, for every mechanism: results.json.

python experiments/growth/measure.py

Every point is a process of its own, so that its peak of resident memory is that of one gradient;
what a process needs at 64 tokens is subtracted. Time is the time that processors spent, over all
threads, compilation apart: the least of three gradients, or of as many as ten seconds allow. It
does not depend on what else the machine does, as the time on the wall would.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax

from attnlab.core import Keys, Queries, Rule, mechanisms
from attnlab.progress import peak_memory

RESULTS = Path(__file__).with_name("results.json")
EXPECTED = Path(__file__).with_name("expected.json")
LENGTHS = (1024, 2048, 4096, 8192, 16384)
LONGEST = {"softmax, literal": 4096}
HEADS, SIZE = 4, 64


def measure(name: str, length: int) -> dict[str, float]:
    """One point: processor seconds of a gradient with respect to q, k, v; peak bytes."""
    key, _, literal = name.partition(", ")
    mechanism = mechanisms.get(key)()
    call = mechanism.reference if literal else mechanism
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, length, HEADS, SIZE))
    pos = jax.numpy.arange(length)[None]

    def loss(q, k, v):
        out = call({}, Queries(q, pos, pos * 0), Keys(k, v, pos, pos * 0), Rule()).out
        return jax.numpy.sum(out * out)

    gradient = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
    seconds, begun = [], time.monotonic()
    while len(seconds) < 3 and time.monotonic() < begun + 10:
        start = time.process_time()
        jax.block_until_ready(gradient(q, k, v))
        seconds.append(time.process_time() - start)
    return {"seconds": min(seconds), "bytes": peak_memory()}


def measure_apart(name: str, length: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    words = [sys.executable, __file__, name, str(length)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return json.loads(subprocess.check_output(words, env=environment))


def measure_all() -> dict:
    """All points, and the exponents between the two longest of each name."""
    points, exponents = {}, {}
    for name in json.loads(EXPECTED.read_text())["exponents"]:
        lengths = [n for n in LENGTHS if n <= LONGEST.get(name, LENGTHS[-1])]
        base = measure_apart(name, 64)["bytes"]
        points[name] = []
        for length in lengths:
            point = measure_apart(name, length)
            point["bytes"] -= base
            points[name].append({"length": length, **point})
            print(name, length, point, flush=True)
        exponents[name] = {key: growth(points[name], key) for key in ("seconds", "bytes")}
    about = {
        "command": "python experiments/growth/measure.py",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": {"batch": 1, "heads": HEADS, "head_dim": SIZE, "dtype": "float32"},
    }
    return {**about, "points": points, "exponents": exponents}


def growth(points: list[dict], key: str) -> float:
    """log2 of the last step: the lengths double."""
    low, high = points[-2][key], points[-1][key]
    return round(float(jax.numpy.log2(high / low)), 2)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        RESULTS.write_text(json.dumps(measure_all(), indent=2) + "\n", encoding="utf-8")
