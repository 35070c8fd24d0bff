"""The nearest point of the simplex."""

from dataclasses import dataclass

from attnlab.core import Normaliser
from attnlab.normalisers.entmax import project
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Sparsemax(Normaliser):
    """The weights nearest to the logits: p = argmin ‖p − z‖ over p >= 0, Σ p = 1, i.e. [z − τ]₊.

    `entmax` with α = 2. One key with margin m over any number of equal ones keeps at least m, all
    from m = 1 on: no dilution. dp = s (dz − Σ s dz / Σ s) with s = 1 where p > 0.
    A mechanism that attends in one pass hosts it. Shapes: z [B H N M] -> [B H N M]. No parameters;
    O(N M) a Newton step. Source: Martins & Astudillo, arXiv 1602.02068.
    """

    separable = False
    whole = True

    def weights(self, params, z, seen):
        return project(2.0, z, seen)
