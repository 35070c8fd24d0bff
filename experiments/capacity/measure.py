"""Writes random pairs into the memory of a head and reads them back: results.json.

python experiments/capacity/measure.py

Nothing is trained: keys are random directions, values normal. Minutes on one CPU core.
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.engines import delta, undecayed

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
DIMS = (16, 32, 64, 128)  # of keys and values
TRIALS = 32
LIMIT = 0.25
"""The relative squared error up to which a pair counts as stored."""


def hebbian(k, v, seg):
    """S = Σ k vᵀ, what linear attention without feature map remembers."""
    return undecayed.attend(k, k, v, seg)[1].memory


def delta_once(k, v, seg):
    """S ← S + k (v − Sᵀk)ᵀ, every pair once."""
    ones = jnp.ones(k.shape[:3])
    return delta.attend(k, k, v, ones, 0 * ones, seg)[1].memory


def delta_often(k, v, seg):
    """The same pairs sixteen times over, which comes near to least squares."""
    return delta_once(*(jnp.concatenate([z] * 16, 1) for z in (k, v, seg)))


RULES = {"hebbian": hebbian, "delta": delta_once, "delta, 16 passes": delta_often}


def numbers(dim: int) -> list[int]:
    """How many pairs are tried, four to an octave, from an eighth of ``dim`` to its double."""
    return sorted({max(2, round(dim * 2 ** (j / 4))) for j in range(-12, 5)})


def read_back(rule: str, dim: int, pairs: int) -> dict[str, float]:
    """The squared error of what is read over that of reading nothing, and how often the value read
    is nearer to its own than to those of other pairs."""
    keys = jax.random.split(jax.random.key(pairs), 2)
    k, v = (jax.random.normal(key, (TRIALS, pairs, 1, dim)) for key in keys)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    memory = jax.jit(RULES[rule])(k, v, jnp.zeros((TRIALS, pairs), jnp.int32))
    found = jnp.einsum("bgde,bngd->bne", memory, k, precision="highest")
    values = v[:, :, 0]
    error = jnp.mean((found - values) ** 2) / jnp.mean(values**2)
    product = jnp.einsum("bne,bme->bnm", found, values, precision="highest")
    distance = jnp.sum(values**2, -1)[:, None] - 2 * product  # less |found|², the same for all m
    nearest = jnp.mean(jnp.argmin(distance, -1) == jnp.arange(pairs))
    return {"pairs": pairs, "error": round(float(error), 4), "nearest": round(float(nearest), 4)}


def stored(rows: list[dict[str, float]]) -> int:
    """The most pairs whose error is at most `LIMIT`, and that of all fewer ones."""
    most = 0
    for row in rows:
        if row["error"] > LIMIT:
            break
        most = int(row["pairs"])
    return most


def held(claim: Mapping[str, Any], rules: Mapping[str, Any]) -> bool:
    """Whether a claim of expected.json is what was measured: the ratio of what two rules store, or
    of what one does to its dimension."""
    low, high = claim["ratio"]
    found = [each["stored"] for each in rules[claim["rule"]].values()]
    dims = [int(dim) for dim in rules[claim["rule"]]]
    over = [each["stored"] for each in rules[claim["over"]].values()] if "over" in claim else dims
    return all(low <= a / b <= high for a, b in zip(found, over, strict=True))


def main() -> None:
    rules: dict[str, Any] = {}
    for rule in RULES:
        rules[rule] = {}
        for dim in DIMS:
            rows = [read_back(rule, dim, pairs) for pairs in numbers(dim)]
            rules[rule][str(dim)] = {"stored": stored(rows), "rows": rows}
            print(rule, dim, stored(rows), flush=True)
    about = {
        "command": "python experiments/capacity/measure.py",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": {"trials": TRIALS, "relative error of a stored pair": LIMIT},
    }
    RESULTS.write_text(json.dumps(about | {"rules": rules}, indent=1) + "\n", encoding="utf-8")
    for claim in json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]:
        print(claim["what"], held(claim, rules))


if __name__ == "__main__":
    main()
