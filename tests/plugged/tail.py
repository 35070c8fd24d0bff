"""A window whose newest keys are handed on from batch to batch: the least that can carry."""

from dataclasses import dataclass

from attnlab.mechanisms.window import Window
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Tail(Window):
    """`Window`, across the rows of a stream."""

    carries = True
