"""Rotary positions, interpolated: a longer text in the phases that were trained."""

from dataclasses import dataclass

from attnlab.core import Position
from attnlab.positions.rope import frequencies, refuse_odd, refuse_shrinking, turn
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Interpolated(Position):
    """RoPE with positions divided by ``factor``: the phases that were trained, closer together.

    φ_t = (pos / factor) base^(−2t / D), else as `rope`; without some training on longer text it
    harms short distances too. Shapes and cost as `rope`; at factor 1 it is `rope`. Raises
    `UserError` for factor < 1 or an odd head size. Source: Chen et al., arXiv 2306.15595.
    """

    factor: float = 4.0  # length wanted / length trained
    base: float = 10_000.0

    def __post_init__(self):
        refuse_shrinking("interpolated", self.factor)

    def rotate(self, params, z, pos, side):
        return turn(z, pos, frequencies(self.base, z.shape[-1]) / self.factor)

    def validate(self, dims):
        refuse_odd("interpolated", dims)
