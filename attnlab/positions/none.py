"""No position information: the causal mask alone tells where a token stands."""

from dataclasses import dataclass

from attnlab.core import Position
from attnlab.registry import register


@register
@dataclass(frozen=True)
class NoPosition(Position):
    """Nothing is added or turned (NoPE); with a causal mask a legitimate baseline.

    Source: Haviv et al., arXiv 2203.16634; Kazemnejad et al., 2305.19466.
    """
