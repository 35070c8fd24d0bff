"""Batches of synthetic rows whose splits share no instance, however few instances there are.

Streams that differ are not enough: where a task has a hundred different rows, all splits would meet
all of them. So the content of a row decides: SHA-256 of its tokens modulo 10 is 0 for test, 1 for
validation, else train, for every seed and task. A row is drawn from its stream until it falls into
the split asked for, 1.25 times for train and 10 times for the others on average; given the split,
its distribution is that of the task. A row is all of its tokens: one that differs in a filler or in
length is another instance.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from attnlab.errors import UserError
from attnlab.tasks.synthetic import SPLITS, Synthetic, rng_of

ATTEMPTS = 500  # a tenth of all instances is missed as often by chance once in 1e22 rows


def split_of(tokens: np.ndarray) -> np.ndarray:
    """The index in `SPLITS` of the split of each row of [rows length ...]: [rows]."""
    rows = np.ascontiguousarray(tokens, "<f4" if tokens.dtype.kind == "f" else "<i4")
    digests = [hashlib.sha256(row).digest() for row in rows]
    tenths = np.array([int.from_bytes(digest[:8], "big") % 10 for digest in digests], np.intp)
    train, validation, test = range(len(SPLITS))
    return np.array([test, validation, *[train] * 8])[tenths]


def draw(
    task: Synthetic, length: int, *, seed: int, split: str, step: int, rows: Sequence[int]
) -> dict[str, np.ndarray]:
    """The rows with the numbers ``rows`` of the batch of a step, as `Synthetic.rows` returns them.

    Each is a function of (task, length, seed, split, step, its number) alone. Raises `UserError`
    for what the task refuses and for a split without instances.
    """
    task.check(length)
    streams = [rng_of(seed, split, step, row) for row in rows]
    width, wanted = task.width(length), SPLITS.index(split)
    batch = task.form(np.zeros((len(streams), width)), length)
    pending = np.arange(len(streams))
    for _ in range(ATTEMPTS):
        if not len(pending):
            return batch
        drawn = task.form(np.stack([streams[i].random(width) for i in pending]), length)
        found = split_of(drawn["tokens"]) == wanted
        for name, values in drawn.items():
            batch[name][pending[found]] = values[found]
        pending = pending[~found]
    raise UserError(
        f"split={split}: none of {ATTEMPTS} rows of {task} of length={length} belongs to it; "
        "a larger vocabulary or length has more different rows"
    )
