"""Rotary positions extended band by band (YaRN)."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from attnlab.core import Array, Position
from attnlab.errors import UserError
from attnlab.positions.rope import frequencies, refuse_odd, refuse_shrinking, turn
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Yarn(Position):
    """RoPE for ``factor`` times the ``original`` length: slow phases interpolated, fast ones kept.

    θ'_t = (1 − γ_t) θ_t + γ_t θ_t / factor, and z is multiplied by 0.1 ln(factor) + 1, with
        γ_t = clip((t − low) / (high − low), 0, 1), low = ⌊f(fast)⌋, high = ⌈f(slow)⌉,
        f(r) = D ln(original / 2πr) / (2 ln base): the t whose phase turns r times in ``original``.
    Shapes and cost as `rope`; at factor 1 it is `rope`. The model is meant to be trained further
    for a few hundred steps. Raises `UserError` for factor < 1, original < 1, fast < slow or an odd
    head size. Source: Peng et al., arXiv 2309.00071.
    """

    factor: float = 4.0  # length wanted / length trained
    original: int = 512  # length trained, in tokens
    base: float = 10_000.0
    fast: float = 32.0  # turns within the original length from which a phase is kept
    slow: float = 1.0  # turns up to which a phase is interpolated in full

    def __post_init__(self):
        refuse_shrinking("yarn", self.factor)
        if self.original < 1 or not 0 < self.slow <= self.fast:
            raise UserError(
                f"position yarn: original={self.original}, fast={self.fast:g}, "
                f"slow={self.slow:g}; use original >= 1 and fast >= slow > 0"
            )

    def rotate(self, params, z, pos, side):
        magnitude = 0.1 * math.log(self.factor) + 1.0
        turned = turn(z.astype(jnp.float32), pos, self.frequencies(z.shape[-1]))
        return (turned * magnitude).astype(z.dtype)

    def frequencies(self, size: int) -> Array:
        """θ' for heads of ``size``, f32 [size / 2]."""
        low, high = self.band(size)
        ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
        theta = frequencies(self.base, size)
        return theta * (1 - ramp + ramp / self.factor).astype(np.float32)

    def band(self, size: int) -> tuple[int, int]:
        """``low`` and ``high``, within the indices that heads of ``size`` have."""

        def index(turns: float) -> float:
            wavelengths = math.log(self.original / (2 * math.pi * turns))
            return size * wavelengths / (2 * math.log(self.base))

        low, high = math.floor(index(self.fast)), math.ceil(index(self.slow))
        return max(low, 0), min(high, size - 1)

    def validate(self, dims):
        refuse_odd("yarn", dims)
