"""Softmax whose logits grow with the logarithm of the number of keys."""

import math
from dataclasses import dataclass

from attnlab.core import Normaliser
from attnlab.normalisers.ssmax import check_causal, check_length, log_count
from attnlab.registry import register


@register
@dataclass(frozen=True)
class LogN(Normaliser):
    """A fixed temperature that keeps up with the number of keys: p = softmax(z ln(n) / ln(length)).

    n = pos + 1 counts the tokens up to the query (at least 2); ``length`` is that of training, at
    which it is softmax. Nothing is learned, so a trained softmax model may be read with it.
    Folded into the queries, so that a soft cap comes after and a position bias is not scaled; any
    mechanism hosts it. Cost O(N H D). Raises `UserError` for length < 2 and for a rule that is not
    causal. Source: Su, "Entropy invariance of softmax", 2021; Chiang & Cholak, arXiv 2202.12172.
    """

    length: int = 512  # tokens at which it is softmax

    relative = False

    def __post_init__(self):
        check_length("log_n", self.length)

    def scale(self, params, pos, causal):
        check_causal("log_n", causal)
        return log_count(pos)[..., None] / math.log(self.length)

    def validate(self, dims, causal):
        check_causal("log_n", causal)
