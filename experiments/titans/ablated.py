"""Titans without its momentum, without its forgetting, or without both."""

from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.engines.momentum import Gates
from attnlab.errors import UserError
from attnlab.mechanisms.titans import Titans
from attnlab.registry import register

NEVER = -1e9
"""The logarithm of a gate that is shut."""
WITHOUT = ("", "momentum", "forgetting", "both")


@register
@dataclass(frozen=True)
class Ablated(Titans):
    """The memory of `Titans`, with η = 0 (``without="momentum"``), α = 0 (``"forgetting"``) or both
    (``"both"``), which is the delta rule. Raises `UserError` for anything else but ``""``."""

    without: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.without not in WITHOUT:
            raise UserError(f"ablated: without={self.without!r}; use one of {WITHOUT}")

    def _gates(self, params, x):
        step, carry, decay = super()._gates(params, x)
        if self.without in ("momentum", "both"):
            carry = jnp.full_like(carry, NEVER)
        if self.without in ("forgetting", "both"):
            decay = jnp.zeros_like(decay)
        return Gates(step, carry, decay)
