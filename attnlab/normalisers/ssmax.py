"""Scalable softmax: a temperature that falls as the visible keys grow in number."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from attnlab.core import Array, Normaliser
from attnlab.errors import UserError
from attnlab.registry import register


def log_count(pos: Array) -> Array:
    """ln max(n, 2) of the n = pos + 1 tokens of a document up to each query: f32, shape of ``pos``.

    The true position, not what a pattern leaves of the keys, so that decoding equals training.
    """
    return jnp.log(jnp.maximum(pos + 1, 2).astype(jnp.float32))


def check_causal(name: str, causal: bool) -> None:
    """Raises `UserError` where there is no order of time to count in."""
    if not causal:
        raise UserError(
            f"normaliser {name} counts the tokens up to each query, so it cannot be bidirectional; "
            "use softmax or entmax, or model.causal=true"
        )


def check_length(name: str, length: int) -> None:
    """Raises `UserError` for a length whose logarithm cannot divide."""
    if length < 2:
        raise UserError(f"normaliser {name}: length={length}; use length >= 2")


@register
@dataclass(frozen=True)
class Ssmax(Normaliser):
    """A learned temperature that keeps up with the number of keys: p = softmax(s_h ln(n) z).

    n = pos + 1 counts the tokens up to the query (at least 2) and s_h is learned per head; at first
    s_h = 1 / ln(length), which is softmax for a query that sees ``length`` tokens. One key with
    margin m over n − 1 equal ones keeps the weight n^(s m) / (n^(s m) + n − 1), which tends to 1
    where m > 1 / s and to 0 where m < 1 / s.
    Folded into the queries, so that a soft cap comes after and a position bias is not scaled; any
    mechanism hosts it. Parameters: s [H] per layer, no weight decay. Cost O(N H D). Raises
    `UserError` for length < 2 and for a rule that is not causal.
    Source: Nakanishi, arXiv 2501.19399.
    """

    length: int = 512  # tokens at which it starts as softmax

    relative = False

    def __post_init__(self):
        check_length("ssmax", self.length)

    def init(self, key, dims):
        return {"scale": jnp.full((dims.heads,), 1.0 / math.log(self.length))}

    def scale(self, params, pos, causal):
        check_causal("ssmax", causal)
        return params["scale"] * log_count(pos)[..., None]

    def validate(self, dims, causal):
        check_causal("ssmax", causal)
