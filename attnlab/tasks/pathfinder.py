"""Pathfinder of the Long Range Arena: are two discs in an image joined by one dashed curve?"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from attnlab.errors import UserError, did_you_mean
from attnlab.registry import register
from attnlab.tasks.stored import PAD, Images
from attnlab.tasks.stored.pool import draw_pool
from attnlab.tasks.synthetic.curves import Geometry, grow_distractors, grow_pairs
from attnlab.tasks.synthetic.grid import ink
from attnlab.tasks.synthetic.labelled import LabelledRecipe

SEGMENTS = {"easy": 6, "intermediate": 9, "hard": 14}
GEOMETRY = {
    shape.size**2: shape
    for shape in (
        Geometry(32, 2, (1,), 0.5, 7, 1.5, 1.0, 20),
        Geometry(64, 3, (1.5,), 1.0, 12, 2, 1.4, 28),
        Geometry(128, 5, (2, 3), 1.5, 20, 3, 1.8, 35),
    )
}
"""By pixels of an image."""
CONTRAST = 1.5  # of dashes before the reduction; discs have 1
TOGETHER = 2**19  # pixels of the images that are drawn at once


@register
@dataclass(frozen=True)
class Pathfinder(LabelledRecipe):
    """Label 1 if the two discs mark both ends of one curve, 0 if ends of two curves; fair coin. A
    row is an image, line by line, a token 0..255 for each pixel: a length of 1,024 (32 x 32), 4,096
    or 16,384 (128 x 128, Path-X of the arena).

    Two dashed curves of ``difficulty`` dashes (easy 6, intermediate 9, hard 14) begin some pixels
    apart and grow in turn, see `attnlab.tasks.synthetic.curves`; where one gets stuck, the image is
    begun anew. Distractors are curves of a third of the dashes. The label decides where the discs
    go and nothing else, so that without them nothing tells the classes apart.

    Training goes through ``pool`` images (160,000 as published), held-out splits have an eighth of
    that each. They are drawn once, some 2 ms each of 32 x 32 and 13 ms of 128 x 128, the same for
    every seed, and kept with the corpora.

    Differs from the published images: curves keep gap + thickness + 1.5 pixels from each other and
    from discs, so that every image has a readable answer; size 64 is ours, in between. Raises
    `UserError` for another length or difficulty. Source: Linsley et al., arXiv 1805.08315; settings
    of Tay et al., 2011.04006.
    """

    difficulty: Literal["easy", "intermediate", "hard"] = "hard"
    pool: int = 160_000

    vocab_size = PAD + 1
    classes = 2
    revision = 1

    def __post_init__(self):
        if self.difficulty not in SEGMENTS:
            hint = did_you_mean(self.difficulty, SEGMENTS)
            raise UserError(f"pathfinder: no difficulty {self.difficulty!r}; {hint}")
        if self.pool < 1:
            raise UserError(f"pathfinder: pool={self.pool} must be at least 1")

    def build(self, *, seed: int, length: int, batch: int) -> Images:
        self.check(length)
        return Images(
            self, 2, lambda: draw_pool(self, length), seed=seed, length=length, batch=batch
        )

    def check(self, length: int) -> None:
        if length not in GEOMETRY:
            sizes = ", ".join(map(str, GEOMETRY))
            raise UserError(f"length={length}: a pathfinder image has one of {sizes} pixels")

    def rows(self, rng: np.random.Generator, rows: int, length: int) -> dict[str, np.ndarray]:
        """``tokens`` int32 [rows, length] of an image, ``seg`` 0, ``targets`` int32 [rows]."""
        self.check(length)
        step = TOGETHER // length
        parts = [self._draw(rng, min(step, rows - n), length) for n in range(0, rows, step)]
        images = [np.zeros((0, length), np.uint8), *(part[0] for part in parts)]
        labels = [np.zeros(0, np.int64), *(part[1] for part in parts)]
        tokens = np.concatenate(images).astype(np.int32)
        targets = np.concatenate(labels).astype(np.int32)
        return {"tokens": tokens, "seg": np.zeros_like(tokens), "targets": targets}

    def _draw(self, rng: np.random.Generator, rows: int, length: int) -> tuple:
        """uint8 [rows length] and labels [rows]."""
        shape, segments = GEOMETRY[length], SEGMENTS[self.difficulty]
        gap = rng.choice(shape.gaps, rows).astype(float)
        pair = grow_pairs(rng, shape, gap, segments)
        short, drawn = grow_distractors(rng, shape, pair[0].field, gap, segments // 3)
        label, first = rng.integers(2, size=(2, rows))
        every = np.arange(rows)
        long = np.stack([curve.dashes for curve in pair], 1)  # [rows 2 segments 2]
        last = np.where(label, first, 1 - first)
        discs = np.stack([long[every, first, 0, 0], long[every, last, -1, 1]], 1)
        images = ink(
            shape.grid,
            np.concatenate([long.reshape(rows, -1, 2), short], 1),
            np.concatenate([np.ones((rows, 2 * segments), bool), drawn], 1),
            discs,
            thickness=shape.thickness,
            radius=shape.radius,
            contrast=CONTRAST,
        )
        return images.reshape(rows, -1), label
