"""A router that mixes the outputs of several mechanisms, token by token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.combination import Combination
from attnlab.core import Array, Dims, Result, mechanisms
from attnlab.engines import segments
from attnlab.errors import UserError
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Paths(Combination):
    """Every token mixes the outputs of several mechanisms: out = Σ_p softmax(x W_r)_p A_p(q, k, v).

    Written ``attention=paths:window:routing:infini``; the options of a part are typed after its
    name, ``--config.attention.window.window=128``, and ``paths`` alone is ``paths:window:softmax``.
    All parts see the same queries, keys and values. W_r [width P] starts at 0, where every path
    weighs 1 / P. With ``top`` = κ > 0 only the κ heaviest paths of a token are kept, their weights
    made to sum to one; the gradient is that of the whole mixture. All paths are computed either
    way. ``aux["stats"]`` has the entropy of a token's weights and of their mean.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E], x [B N width] -> [B N H E].
    Cost: the sum of the parts. Raises `UserError` for ``top`` out of range; what a part refuses,
    the whole does. Source: gates over branches of one attention, Yuan et al., arXiv 2502.11089.
    """

    top: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.top <= len(self.parts):
            raise UserError(f"paths: top={self.top}; use 0 (all) to {len(self.parts)}, the parts")

    def init(self, key, dims):
        router = jnp.zeros((dims.width, len(self.parts)))
        return {**super().init(key, dims), "router": router}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        return self._attend(lambda part: part, params, queries, keys, rule, state, x, key)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        return self._attend(lambda part: part.reference, params, queries, keys, rule, state, x, key)

    def _attend(self, form, params, queries, keys, rule, state, x, key):
        assert x is not None, "the router reads the block's input"
        handed = ((queries, keys, segments.part_of(rule)),) * len(self.parts)
        outs, state, aux = self.call_parts(form, params, handed, state, x, key)
        weights = jax.nn.softmax(_product(x, params["router"]), -1)
        kept = _keep(weights, self.top) if self.top else weights
        shares = [kept[..., p, None, None] * z.astype(jnp.float32) for p, z in enumerate(outs)]
        stats = {**aux.get("stats", {}), **_entropies(weights, queries.seg >= 0)}
        out = sum(shares[1:], shares[0]).astype(queries.q.dtype)
        return Result(rule.tap("heads", out), state, {**aux, "stats": stats})

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        mixing = 2.0 * length * len(self.parts) * (dims.width + dims.heads * dims.value_dim)
        return super().flops(dims, length, causal) + mixing

    @classmethod
    def examples(cls):
        window, softmax, infini, routing = map(
            mechanisms.get, ("window", "softmax", "infini", "routing")
        )
        return (
            cls((window(window=5), softmax())),
            cls(
                (window(window=5), routing(clusters=4, length=5, decay=0.9), infini(segment=8)),
                top=2,
            ),
        )


def _product(x: Array, w: Array) -> Array:
    """x W in f32: what is chosen should not hang on a rounding."""
    return jnp.matmul(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)


def _keep(weights: Array, top: int) -> Array:
    """The ``top`` heaviest of the last axis, made to sum to one; the gradient passes straight
    through to ``weights``."""
    _, chosen = jax.lax.top_k(weights, top)
    kept = jnp.sum(jax.nn.one_hot(chosen, weights.shape[-1]), -2) * weights
    kept /= jnp.sum(kept, -1, keepdims=True)
    return jax.lax.stop_gradient(kept) + (weights - jax.lax.stop_gradient(weights))


def _entropies(weights: Array, full: Array) -> dict[str, Array]:
    """Of a token's weights on average, and of the average weights: nats, ``weights`` [B N P]."""

    def entropy(p: Array) -> Array:
        return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), -1)

    weights, count = jax.lax.stop_gradient(weights), jnp.maximum(jnp.sum(full), 1)
    mean = jnp.sum(jnp.where(full[..., None], weights, 0), (0, 1)) / count
    each = jnp.sum(jnp.where(full, entropy(weights), 0)) / count
    return {"entropy_of_token": each, "entropy_of_mean": entropy(mean)}
