"""ListOps of the Long Range Arena: what does a nested list of digits evaluate to?

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]        0-9: here 5

One label a row, the value of the expression. `baselines` says what can be had without looking into
an inner list, which is more than most published figures.

Source: Tay et al., arXiv 2011.04006; the task is of Nangia and Bowman, 1804.06028.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from attnlab.errors import UserError
from attnlab.registry import register
from attnlab.tasks.synthetic.labelled import LabelledRecipe

MIN, MAX, MED, SM, CLOSE, PAD = range(10, 16)
NAMES = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "[MIN", "[MAX", "[MED", "[SM", "]"]
VOCABULARY = 16
BRANCH = 0.25
TREES = 2048  # drawn at a time
PATIENCE = 100  # draws without a single tree that fits


class Level(NamedTuple):
    """Nodes of one depth, those of a parent side by side. int [K] each: ``tree``; ``parent`` in
    the level above; ``token``, a digit or an operator; ``count`` of arguments, 0 at a digit."""

    tree: np.ndarray
    parent: np.ndarray
    token: np.ndarray
    count: np.ndarray


@register
@dataclass(frozen=True)
class ListOps(LabelledRecipe):
    """A node above ``max_depth`` (the root has depth 1) is an operator with probability 1/4, with 2
    to ``max_args`` arguments, both uniform; any other node is a uniform digit. MED is the median
    truncated, SM the sum modulo 10. An operator costs 2 tokens, "[OP" and "]", a digit one; kept
    are expressions of more than ``min_length`` tokens and fewer than the length of a row. Ids:
    digits 0-9, `MIN` `MAX` `MED` `SM` 10-13, `CLOSE` 14, `PAD` 15. Equal expressions are not
    removed; at the published lengths there are none to remove.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500

    vocab_size = VOCABULARY
    classes = 10

    def __post_init__(self):
        if self.max_depth < 1 or self.max_args < 2 or self.min_length < 0:
            raise UserError(f"{self}: use max_depth >= 1, max_args >= 2, min_length >= 0")

    def check(self, length: int) -> None:
        if length < self.min_length + 2:
            raise UserError(f"length={length}: {self} needs at least {self.min_length + 2}")
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = min(2 + self.max_args * longest, length)
        if self.min_length >= longest:
            raise UserError(f"{self}: min_length must lie in 0..{longest - 1}")

    def rows(self, rng: np.random.Generator, rows: int, length: int) -> dict[str, np.ndarray]:
        """``tokens`` int32 [rows, length]; ``seg`` int32, 0 and -1 in empty slots; ``targets``
        int32 [rows]. Raises `UserError` where no expression has such a length. Cost: O(nodes
        drawn), of which a row of the published lengths takes some 13 trees."""
        self.check(length)
        tokens = np.full((rows, length), PAD, np.int32)
        label = np.empty(rows, np.int32)
        done = idle = 0
        while done < rows:
            grown = self._grow(rng, length)
            levels = keep_trees(*grown, self.min_length, length, rows - done)
            found = len(levels[0].tree)
            idle = 0 if found else idle + 1
            if idle == PATIENCE:
                raise UserError(f"{self}: none of {idle * TREES} trees has such a length")
            if found:
                label[done : done + found] = evaluate(levels)
                write_tokens(levels, tokens[done : done + found])
            done += found
        return {"tokens": tokens, "seg": -(tokens == PAD).astype(np.int32), "targets": label}

    def _grow(self, rng: np.random.Generator, length: int) -> tuple[list[Level], np.ndarray]:
        """`TREES` trees, level by level, and their lengths; those too long grow no further."""
        lengths = np.zeros(TREES, np.int64)
        tree = np.arange(TREES)
        parent = np.zeros(TREES, np.int64)
        levels = []
        for depth in range(1, self.max_depth + 1):
            operator = (rng.random(len(tree)) < BRANCH) & (depth < self.max_depth)
            token = np.where(
                operator, rng.integers(MIN, CLOSE, len(tree)), rng.integers(10, size=len(tree))
            )
            lengths += np.bincount(tree, 1 + operator, TREES).astype(np.int64)
            count = rng.integers(2, self.max_args + 1, len(tree))
            count *= operator & (lengths < length)[tree]
            levels.append(Level(tree, parent, token, count))
            parent = np.repeat(np.arange(len(tree)), count)
            tree = tree[parent]
        return levels, lengths


def keep_trees(
    levels: list[Level], lengths: np.ndarray, above: int, below: int, most: int
) -> list[Level]:
    """The first ``most`` trees whose length is in (above, below), numbered anew."""
    kept = np.flatnonzero((lengths > above) & (lengths < below))[:most]
    number = np.full(len(lengths), -1)
    number[kept] = np.arange(len(kept))
    place, result = np.zeros(len(lengths), np.int64), []
    for level in levels:
        chosen = number[level.tree] >= 0
        tree, parent, token, count = (field[chosen] for field in level)
        result.append(Level(number[tree], place[parent], token, count))
        place = np.cumsum(chosen) - 1
    return result


def evaluate(levels: list[Level]) -> np.ndarray:
    """Values of the roots, from the leaves up."""
    values = levels[-1].token
    for level, below in zip(levels[-2::-1], levels[:0:-1]):
        arguments, values = values, level.token.copy()
        at = np.flatnonzero(level.count)
        if not len(at):
            continue
        count = level.count[at]
        start = np.cumsum(count) - count
        ranked = arguments[np.lexsort((arguments, below.parent))]
        results = {
            MIN: ranked[start],
            MAX: ranked[start + count - 1],
            MED: (ranked[start + (count - 1) // 2] + ranked[start + count // 2]) // 2,
            SM: np.add.reduceat(arguments, start) % 10,
        }
        for operator, result in results.items():
            mine = level.token[at] == operator
            values[at[mine]] = result[mine]
    return values


def write_tokens(levels: list[Level], tokens: np.ndarray) -> None:
    """Writes tree r into ``tokens[r]``: sizes from the leaves up, places from the root down."""
    sizes = [np.ones_like(levels[-1].tree)]
    for level in levels[-2::-1]:
        size = np.ones_like(level.tree)
        at = np.flatnonzero(level.count)
        if len(at):
            start = np.cumsum(level.count[at]) - level.count[at]
            size[at] = 2 + np.add.reduceat(sizes[-1], start)
        sizes.append(size)
    place = np.zeros_like(levels[0].tree)
    for level, size, inner in zip(levels, sizes[::-1], [*sizes[-2::-1], sizes[0][:0]]):
        tokens[level.tree, place] = level.token
        at = np.flatnonzero(level.count)
        tokens[level.tree[at], place[at] + size[at] - 1] = CLOSE
        before = np.cumsum(inner) - inner
        first = (np.cumsum(level.count) - level.count)[np.repeat(np.arange(len(size)), level.count)]
        place = np.repeat(place, level.count) + 1 + before - before[first]


def shallow_value(tokens: np.ndarray) -> np.ndarray:
    """The root operator applied to its direct digits alone, int [rows]; 10 where it has none, and
    a lone digit is itself. What can be said without meeting any inner list."""
    opens = np.isin(tokens, (MIN, MAX, MED, SM))
    depth = np.cumsum(opens, 1) - np.cumsum(tokens == CLOSE, 1)
    values = np.full(len(tokens), 10)
    for row, ids in enumerate(tokens):
        digits = ids[(depth[row] == (ids[0] >= MIN)) & (ids < MIN)]
        if len(digits):
            by = {MIN: np.min, MAX: np.max, MED: np.median, SM: np.sum}.get(int(ids[0]), np.sum)
            values[row] = int(by(digits)) % 10
    return values


def baselines(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> dict[str, float]:
    """Accuracy on ``test`` of the likeliest label in ``train``: overall (``majority``), given the
    root operator (``root``), given it and its direct digits (``shallow``). Only what beats the
    last has looked into an inner list."""
    root = [part["tokens"][:, 0] for part in (train, test)]
    value = [shallow_value(part["tokens"]) for part in (train, test)]
    keys = {
        "majority": [np.zeros_like(r) for r in root],
        "root": root,
        "shallow": [r * 11 + v for r, v in zip(root, value)],
    }
    return {
        name: float((likeliest(seen, train["targets"])[asked] == test["targets"]).mean())
        for name, (seen, asked) in keys.items()
    }


def likeliest(keys: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The commonest label of each key, int [VOCABULARY * 11]; of all rows for a key not seen."""
    counts = np.zeros((VOCABULARY * 11, 10), np.int64)
    np.add.at(counts, (keys, label), 1)
    counts[counts.sum(1) == 0] = np.bincount(label, minlength=10)
    return counts.argmax(1)
