"""Rotary positions with a larger base: slow phases are stretched, fast ones kept."""

from dataclasses import dataclass

from attnlab.core import Position
from attnlab.errors import UserError
from attnlab.positions.rope import frequencies, refuse_odd, refuse_shrinking, turn
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Ntk(Position):
    """RoPE with a larger base: the slowest phase is stretched by ``factor``, the fastest is kept.

    base' = base factor^(D / (D − 2)), hence θ'_t = θ_t factor^(−2t / (D − 2)); extends a trained
    model without more training. Shapes and cost as `rope`; at factor 1 it is `rope`. Raises
    `UserError` for factor < 1 or a head size that is odd or 2. Source: "NTK-aware" scaling as
    written down by Peng et al., arXiv 2309.00071.
    """

    factor: float = 4.0  # length wanted / length trained
    base: float = 10_000.0

    def __post_init__(self):
        refuse_shrinking("ntk", self.factor)

    def rotate(self, params, z, pos, side):
        D = z.shape[-1]
        return turn(z, pos, frequencies(self.base * self.factor ** (D / (D - 2)), D))

    def validate(self, dims):
        refuse_odd("ntk", dims)
        if dims.key_dim == 2:
            raise UserError("position ntk: head size 2 has a single phase; use 4 or more")
