"""The usual exponential weights."""

from dataclasses import dataclass

from attnlab.core import Normaliser
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Softmax(Normaliser):
    """Exponential weights that sum to one: p = e^z / Σ e^z.

    With bounded logits each weight tends to 0 as the visible keys grow in number. Shapes: z
    [B H N M] -> [B H N M]. No parameters; free. Source: Vaswani et al., arXiv 1706.03762.
    """
