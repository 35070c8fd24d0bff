"""How far several layers of power attention and of a window reach, by gradient and by what models
learn: results.json.

python experiments/power/measure.py

Both see ten tokens: nine behind and the first, or the five nearest, those 8, 16, 32 and 64 behind,
and the first. Eight minutes on one CPU core.
"""

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import passkey
from ml_collections import ConfigDict

from attnlab.config import base
from attnlab.core import Keys, Mechanism, Queries, Rule, mechanisms
from attnlab.overrides import override
from attnlab.train import train

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
LENGTH = 128
MECHANISMS = {
    "power": {"block": 1, "window": 5, "sinks": 1},
    "window": {"window": 9, "sinks": 1},
}
LAYERS = 8  # of the reach
SIZES = {
    "task.length": 52,
    "task.size": 4,
    "task.batch": 64,
    "model.width": 64,
    "model.layers": 2,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.tied": False,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup": 50,
    "train.steps": 400,
    "train.eval_every": 0,
    "train.save_every": 0,
    "train.tensorboard": False,
    "evaluate.tokens": 2**16,
}


def build(name: str) -> Mechanism:
    return mechanisms.get(name)(**MECHANISMS[name])


def reach(mechanism: Mechanism, length: int, layers: int) -> list[int]:
    """Tokens whose input has a gradient at the output of the last one, after 1, 2, ... layers that
    add what they attend to, with random queries, keys and values."""
    pos = jnp.arange(length)[None]
    draw = jax.random.normal(jax.random.key(0), (layers, 2, 1, length, 1, 8), jnp.float32)

    def last(x, depth):
        def layer(x, each):
            number, (q, k) = each
            out = mechanism({}, Queries(q, pos, 0 * pos), Keys(k, x, pos, 0 * pos), Rule()).out
            return x + jnp.where(number < depth, out, 0.0), None

        return jnp.sum(jax.lax.scan(layer, x, (jnp.arange(layers), draw))[0][:, -1])

    slope = jax.jit(jax.grad(last))
    slopes = (slope(jnp.ones((1, length, 1, 8)), depth) for depth in range(1, layers + 1))
    return [int(jnp.sum(jnp.any(slope != 0, (0, 2, 3)))) for slope in slopes]


def config_of(name: str) -> ConfigDict:
    config = base(name, "rope", task="copy")
    fields = {f"attention.{field}": value for field, value in MECHANISMS[name].items()}
    for path, value in (SIZES | fields).items():
        override(config, path, str(value))
    return config


def learn(name: str) -> dict[str, Any]:
    """What a model repeats of four symbols, each one of 62, that stand 48 tokens back."""
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train(config_of(name), folder)
        test = json.loads((Path(folder) / "test.json").read_text(encoding="utf-8"))
    return {
        "accuracy": round(test["accuracy"], 4),
        "accuracy_95": [round(x, 4) for x in test["accuracy_95"]],
        "asked": test["asked"],
        "processor_seconds": round(time.process_time() - begun),
    }


def held(claim: dict, results: dict[str, Any]) -> bool:
    """Whether a claim of expected.json is what was measured: how far layers reach, how many symbols
    are repeated or how many passkeys found."""
    if "reach" in claim:
        return results["reach"][claim["model"]] == claim["reach"]
    found = results[claim.get("of", "models")][claim["model"]]
    low, high = claim["accuracy"]
    return low <= found["accuracy"] <= high


def main() -> None:
    found: dict[str, Any] = {
        "command": "python experiments/power/measure.py",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": SIZES | {"seed": 0},
        "mechanisms": MECHANISMS,
        "reach": {name: reach(build(name), LENGTH, LAYERS) for name in MECHANISMS},
        "models": {},
        "passkey": {"sizes": passkey.SIZES | {"growth": passkey.GROWTH}},
    }
    print(found["reach"], flush=True)
    for name in MECHANISMS:
        found["models"][name] = learn(name)
        found["passkey"][name] = passkey.find(name, MECHANISMS[name])
        print(name, found["models"][name], found["passkey"][name], flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for claim in json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]:
        print(claim["what"], held(claim, found))


if __name__ == "__main__":
    main()
