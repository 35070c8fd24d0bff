"""Softmax attention whose queries and keys are those of the embedded tokens, in every layer."""

from dataclasses import dataclass

from attnlab.mechanisms.softmax import Softmax
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Static(Softmax):
    """Softmax attention whose queries and keys come from the embedded tokens, in every layer.

        q = norm(e) W_Q,  k = norm(e) W_K,  v = norm(x) W_V,   out = softmax(q kᵀ / √D) v

    e is what the first layer is given, x what this one is, and norm the layer's own. Who attends to
    whom thus depends on the words and their places and on no layer below; the parameters are those
    of softmax, and so is the first layer. Without the model, whoever projects has to do it so: a
    bare call is that of softmax. Shapes: queries [B N H D], keys [B M G D], values [B M G E] ->
    [B N H E]. Cost: as softmax, O(N M (D + E)) time and O(N + M) memory; decoding keeps all keys
    and values. Raises `UserError` for a tile < 1.
    Source: StaticEmbQK of "Deconstructing Attention", arXiv 2510.11602.
    """

    def source(self, x, embedded, pos):
        return embedded

    def limit(self, length: int):
        return None
