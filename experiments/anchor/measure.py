"""What stripes, blocks and a window keep of a trained model's attention, and what it then loses:
results.json.

python experiments/anchor/measure.py FOLDER

Trains a small softmax model of bytes in FOLDER unless it is there already. Rows and curves that
stand in results.json are not measured again: delete them to do so.
"""

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.analysis.observed import cut, observe
from attnlab.config import base
from attnlab.core import Mechanism
from attnlab.engines import dense
from attnlab.evaluate import score
from attnlab.files import read_json, write_json
from attnlab.mechanisms.anchor import Anchor
from attnlab.mechanisms.block_topk import BlockTopK
from attnlab.mechanisms.window import Window
from attnlab.overrides import override
from attnlab.runs import Run, open_run
from attnlab.train import train

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
SIZES = {
    "task.corpus": "kjv",
    "task.length": 512,
    "task.batch": 4,
    "model.width": 64,
    "model.layers": 2,
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.head_dim": 16,
    "model.mlp_width": 176,
    "optimizer.learning_rate": 5e-3,
    "optimizer.warmup": 20,
    "train.steps": 800,
    "train.eval_every": 0,
    "train.save_every": 0,
    "train.tensorboard": False,
    "sample.tokens": 8,
}
SCORED, WINDOWS, LEAST = 16384, 16, 256
"""Held-out tokens that are scored; held-out windows in which it is counted what is kept, by queries
that see so many keys at least."""
BLOCK, STEP = 16, 4
THRESHOLDS = (-math.inf, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
BLOCKS = (1, 3, 5, 9, 16)
NEAR = (8, 40, 72, 136, 248)
EQUAL = {3: (8, 2.6, 40), 5: (40, 4.15, 72), 9: (104, 6.05, 136)}
"""Blocks of a query; stripes, a threshold and a window beside sinks that show it as many keys."""


@dataclass(frozen=True)
class Published(Anchor):
    """Stripes of a group chosen by its own queries, later ones too."""

    ago: ClassVar[int] = 0


@dataclass(frozen=True)
class Shared(Anchor):
    """Whole blocks of keys in place of single ones, by the mean of m over their keys; of the last
    block that fits, a part. Its literal form alone."""

    def _margin(self, queries, keys, rule, x):
        shown, margin = super()._margin(queries, keys, rule, x)
        blocks = margin.reshape(*margin.shape[:-1], -1, self.block)
        return shown, jnp.repeat(jnp.mean(blocks, -1), self.block, -1)


def ways() -> dict[str, list[tuple[float, Mechanism]]]:
    """What is swept, by the name of a curve: settings, and what sees as many keys as they say."""
    stripes = Anchor(BLOCK, STEP, stripes=SIZES["task.length"])
    leaking, shared = Published(**vars(stripes)), Shared(**vars(stripes))
    return {
        "stripes": [(z, replace(stripes, threshold=z)) for z in THRESHOLDS],
        "stripes, published": [(z, replace(leaking, threshold=z)) for z in THRESHOLDS[4:]],
        "blocks of a group": [(z, replace(shared, threshold=z)) for z in THRESHOLDS[4:]],
        "blocks of a query": [(z, BlockTopK(BLOCK, z)) for z in BLOCKS],
        "window": [(z, Window(z, BLOCK)) for z in NEAR],
    }


def equals(chosen: int) -> dict[str, Mechanism]:
    """What sees as many keys as ``chosen`` blocks and the own one."""
    stripes, threshold, near = EQUAL[chosen]
    most = SIZES["task.length"]
    return {
        "stripes, as many": Anchor(BLOCK, STEP, stripes, math.inf),
        "stripes": Anchor(BLOCK, STEP, most, threshold),
        "stripes, as many, published": Published(BLOCK, STEP, stripes, math.inf),
        "blocks of a group, as many": Shared(BLOCK, STEP, stripes, math.inf),
        "blocks of a query": BlockTopK(BLOCK, chosen),
        "window": Window(near, BLOCK),
    }


def kept(mechanism: Mechanism, queries, keys, rule) -> tuple[jax.Array, jax.Array]:
    """The weight of dense attention on the keys that the mechanism sees, and how many these are,
    [B H N] each."""
    probs = dense.attend(queries, keys, rule)[2]
    seen = mechanism.reference({}, queries, keys, rule).aux["probs"] > 0
    return jnp.sum(jnp.where(seen, probs, 0), -1), jnp.sum(seen, -1)


def recall(run: Run, mechanism: Mechanism) -> dict[str, float]:
    """On held-out text, of all layers, heads and queries that see `LEAST` keys or more: the mean
    and the 5th percentile of the weight that is kept; keys seen, and as a share of all visible."""
    model = observe(run.model, partial(kept, mechanism))

    @jax.jit
    def forward(params: Any, *tokens: Any) -> Any:
        found: Any = model.apply({"params": params}, *tokens)
        return found[1].aux

    task, weights, counts, shares = run.task(), [], [], []
    for batch in cut(task.documents("validation"), task.boundary, 512, WINDOWS, 4):
        far = (batch["seg"] >= 0) & (batch["pos"] + 1 >= LEAST)
        visible = (batch["pos"] + 1)[far]
        for layer in forward(run.params, batch["tokens"], batch["pos"], batch["seg"]):
            for head in range(SIZES["model.heads"]):
                weight, count = (np.asarray(z)[:, head][far] for z in layer["observed"])
                weights.append(weight)
                counts.append(count)
                shares.append(count / visible)
    weights, counts, shares = map(np.concatenate, (weights, counts, shares))
    found = {
        "keys": counts.mean(),
        "density": shares.mean(),
        "recall": weights.mean(),
        "fifth": np.percentile(weights, 5),
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def bits(run: Run, mechanism: Mechanism | None = None) -> float:
    """Bits per byte with the mechanism in place of softmax."""
    model = run.model
    if mechanism is not None:
        model = model.clone(mechanisms=(mechanism,) * len(model.mechanisms))
    length = run.config.task.length
    options = {"length": length, "stride": length, "batch": 4, "tokens": SCORED}
    found = score(model, run.params, run.task(), "validation", **options)
    return round(found.summary()["bits_per_byte"], 4)


def teacher(folder: Path) -> Run:
    """The trained model."""
    if not folder.exists():
        config = base("softmax", position="rope")
        for path, value in SIZES.items():
            override(config, path, str(value))
        train(config, folder)
    return open_run(folder)


def held(claim: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    """Whether a claim of expected.json is what was measured: by how much a number at a path lies
    above another, or above 0."""
    number, other = (reduce(_step, claim.get(name, ()), results) for name in ("path", "than"))
    low, high = claim["above_by"]
    return low <= number - (other if "than" in claim else 0) <= high


def _step(found: Any, key: str | int) -> Any:
    return found[key]


def main(folder: str) -> None:
    run = teacher(Path(folder) / "anchor")
    results: dict[str, Any] = {
        "command": "python experiments/anchor/measure.py FOLDER",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": SIZES | {"block": BLOCK, "step": STEP, "scored": SCORED, "windows": WINDOWS},
    }
    known = read_json(RESULTS) if RESULTS.exists() else {}
    results |= {name: known.get(name, {}) for name in ("softmax", "equal", "curves")}
    results["softmax"] = results["softmax"] or {"bits": bits(run)}
    for chosen in EQUAL:
        row = results["equal"].setdefault(f"{chosen} blocks", {})
        for name, mechanism in equals(chosen).items():
            if name not in row:
                row[name] = recall(run, mechanism)
                if not isinstance(mechanism, Published | Shared):
                    row[name]["bits"] = bits(run, mechanism)
                print(chosen, name, row[name], flush=True)
                write_json(RESULTS, results)
    for name, settings in ways().items():
        if name not in results["curves"]:
            curve = [{"setting": str(z)} | recall(run, mechanism) for z, mechanism in settings]
            results["curves"][name] = curve
            print(name, curve, flush=True)
            write_json(RESULTS, results)
    for claim in json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]:
        print(claim, held(claim, results))


if __name__ == "__main__":
    main(sys.argv[1])
