"""One key that matters among n − 1 that do not: what weight each normaliser leaves it as n grows.

The key that matters has the logit m (its margin), the others 0 or Gaussian noise of a standard
deviation σ. For softmax

    p = e^m / (e^m + (n − 1) e^(σ²/2))

exactly where σ = 0, and as an estimate of the mean where it is not: noise counts as more keys. Half
of the weight is lost at n = 1 + e^m, and as long as logits are bounded p tends to 0, whatever the
model has learnt. It is the sum of the exponentials that grows with n; sums of logits do not matter.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.analysis.dilution import TOP, Rows, measure_rows
from attnlab.core import Dims, Keys, Normaliser, Queries, Rule, normalisers

LENGTHS = tuple(4**e for e in range(2, 9))
MARGINS = (4.0, 8.0)
NOISES = (0.0, 1.0)


def build(name: str, reference: int) -> Normaliser:
    """The normaliser of that name; what rescales by ln n is softmax at ``reference`` keys, and
    what keeps a number of keys keeps `TOP`."""
    cls = normalisers.get(name)
    fitting = {"length": reference, "k": TOP}
    return cls(**{f.name: fitting[f.name] for f in dataclasses.fields(cls) if f.name in fitting})


def sweep(
    names: Sequence[str] = (),
    lengths: Sequence[int] = LENGTHS,
    margins: Sequence[float] = MARGINS,
    noises: Sequence[float] = NOISES,
    *,
    samples: int = 32,
    reference: int = 256,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """A row for every normaliser (all, unless ``names`` says which), noise, margin and length: the
    means over ``samples`` draws of what `Rows` defines, and ``expected``, the ``signal`` of
    `weight`. Cost: O(samples max(lengths)) time and memory for each."""
    drawn = np.random.default_rng(seed).standard_normal((samples, max(lengths)))
    for name in names or normalisers.names():
        normaliser = build(name, reference)
        for noise in noises:
            rivals = (noise * drawn[: samples if noise else 1]).astype(np.float32)
            for n in lengths:
                rows = among(normaliser, n, rivals, margins)
                for i, margin in enumerate(margins):
                    at = slice(i * len(rivals), (i + 1) * len(rivals))
                    yield {
                        "normaliser": name,
                        "margin": margin,
                        "noise": noise,
                        "n": n,
                        "samples": len(rivals),
                        **means(rows, at),
                        "expected": weight(name, normaliser, margin, n, noise),
                    }


def means(rows: Rows, at: slice) -> dict[str, float]:
    """The mean of every statistic over some rows of [B 1 1]."""
    named = rows.named().items()
    return {name: float(np.mean(np.asarray(z, np.float64)[at])) for name, z in named}


def among(normaliser: Normaliser, n: int, rivals: np.ndarray, margins: Sequence[float]) -> Rows:
    """The `Rows` [len(margins) samples, 1, 1] of one query over n keys: logits ``rivals`` [samples
    M] for M >= n, of which the one in the middle of the n is replaced by each of ``margins``."""
    z = np.tile(rivals, (len(margins), 1))
    z[:, n // 2] = np.repeat(margins, len(rivals))
    B, M = z.shape
    pos = np.broadcast_to(np.arange(M, dtype=np.int32), (B, M))
    seg = np.where(pos < n, 0, -1)
    one = np.zeros((B, 1), np.int32)
    queries = Queries(jnp.ones((B, 1, 1, 1)), jnp.asarray(one + n - 1), jnp.asarray(one))
    logits = jnp.asarray(z)[..., None, None]
    keys = Keys(logits, logits[..., :0], jnp.asarray(pos), jnp.asarray(seg))
    params = normaliser.init(jax.random.key(0), Dims(1, 1, 1, 1, 1))
    rule = Rule(scale=1.0, normaliser=normaliser, normaliser_params=params)
    return measure_rows(queries, keys, rule, jnp.asarray(one + n // 2)[..., None])


def weight(
    name: str, normaliser: Normaliser, margin: float, n: int, noise: float = 0.0
) -> float | None:
    """The weight of the key that matters, in closed form; None where there is none known."""
    if name in FORMS and not noise:
        return FORMS[name](normaliser, margin, n)
    if name in ("softmax", "ssmax", "log_n"):
        grown = _temperature(normaliser, n)
        return _softmax(grown * margin - (grown * noise) ** 2 / 2, n)
    return None


def _softmax(margin: float, n: int) -> float:
    return 1.0 / (1.0 + (n - 1) * math.exp(-margin))


def _temperature(normaliser: Any, n: int) -> float:
    """What the logits are multiplied by; a learned one is at its start."""
    length = getattr(normaliser, "length", None)
    return 1.0 if length is None else math.log(max(n, 2)) / math.log(length)


def _scaled(normaliser: Normaliser, margin: float, n: int) -> float:
    return _softmax(_temperature(normaliser, n) * margin, n)


def _sparsemax(normaliser: Normaliser, margin: float, n: int) -> float:
    return min(1.0, margin + (1 - margin) / n)


def _entmax(normaliser: Any, margin: float, n: int) -> float | None:
    """At α = 1.5: all n keys are in the support as long as m < 2, and n τ² − m τ + m²/4 = 1 with
    the threshold −τ."""
    if normaliser.alpha != 1.5:
        return None
    if margin >= 2:
        return 1.0
    below = (-margin + math.sqrt(margin**2 - n * margin**2 + 4 * n)) / (2 * n)
    return (margin / 2 + below) ** 2


FORMS: dict[str, Callable[[Any, float, int], float | None]] = {
    "softmax": _scaled,
    "ssmax": _scaled,
    "log_n": _scaled,
    "softmax_plus_one": lambda _, m, n: 1.0 / (1.0 + n * math.exp(-m)),
    "sigmoid": lambda _, m, n: 1.0 / (1.0 + n * math.exp(-m)),
    "sparsemax": _sparsemax,
    "entmax": _entmax,
    "top_k": lambda _, m, n: _softmax(m, n),  # keys that tie with the k-th are all kept
}
"""Without noise."""
