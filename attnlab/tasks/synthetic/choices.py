"""Random choices as functions of uniform numbers, all rows at once."""

import numpy as np


def pick(u: np.ndarray, n: int) -> np.ndarray:
    """Uniform integers in 0 .. n - 1, of the shape of ``u`` in [0, 1)."""
    return (u * n).astype(np.int32)


def shuffle(u: np.ndarray, n: int) -> np.ndarray:
    """0 .. n - 1 in each row [R n], of which the first K columns are drawn uniformly without
    replacement, in the order of the draw. ``u`` [R K]; the other columns hold what is left, in no
    random order. Fisher-Yates: O(K) steps over all rows."""
    rows = np.arange(len(u))
    deck = np.tile(np.arange(n, dtype=np.int32), (len(u), 1))
    for i in range(u.shape[1]):
        j = i + pick(u[:, i], n - i)
        deck[rows, i], deck[rows, j] = deck[rows, j], deck[rows, i]
    return deck


def choose_weighted(u: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    """k of 0 .. n - 1 without replacement, each next one with a chance proportional to its weight
    among those left, in the order of the draw: [R k]. ``u`` [R n], ``weights`` [n].

    Exponential clocks: the one of rate w rings at -ln(1 - u) / w, and the first k to ring are
    chosen. It is Gumbel-top-k with e to the power of minus everything.
    """
    return np.argsort(-np.log1p(-u) / weights, axis=1)[:, :k].astype(np.int32)


def place(items: np.ndarray, size: int) -> np.ndarray:
    """Where items of ``size`` tokens begin among items of one token: [R n].

    ``items`` [R n] holds their numbers, all different, in a row of items of both kinds.
    """
    rank = np.argsort(np.argsort(items, axis=1), axis=1)
    return items + (size - 1) * rank
