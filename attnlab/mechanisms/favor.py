"""Performer: softmax attention estimated by positive random features (FAVOR+)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule
from attnlab.engines import recurrent, running
from attnlab.engines.recurrent import quotient, with_one
from attnlab.errors import UserError
from attnlab.mechanisms.linear import rotated
from attnlab.refusals import refuse_bias, refuse_every_normaliser, refuse_taps
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Favor(Mechanism):
    """Softmax attention estimated by positive random features: E[φ(q)·φ(k)] = e^(q·k/√D).

        φ(z) = exp(W ẑ − ‖ẑ‖²/2) / √m,  ẑ = z D^(-1/4),    out = Σ φ(q)·φ(k) v / Σ φ(q)·φ(k)

    with the m = ``features`` rows of W orthogonal in blocks of D and as long as Gaussian ones. In
    training W is drawn anew every ``redraw`` steps (never at 0); it is kept as "statistics". Keys
    are scaled by the running maximum of each feature, which cancels, so no ε is needed. The error
    falls as m^(-1/2) while ‖q‖ and ‖k‖ stay below about D^(1/4), and hardly at all beyond.
    Rotations come before the features: rope is estimated too, and an output depends, as far as the
    estimate errs, on where both tokens are.
    Shapes: queries [B N H D], keys [B N G D], values [B N G E] -> [B N H E].
    Cost: O(N m (D + E)) time in chunks of ``chunk`` tokens, O(N m) memory; the decoding state is
    one m x (E + 1) matrix and m maxima for each kv head. Raises `UserError` for features < 1,
    redraw < 0, chunk < 1 and, when called, for biased positions and taps on logits.
    Source: Choromanski et al., arXiv 2009.14794.
    """

    features: int = 256
    redraw: int = 1000
    chunk: int = 64

    cost = Cost(time=1, memory=1, state=0)
    isotropic = False

    def __post_init__(self):
        if self.features < 1 or self.redraw < 0 or self.chunk < 1:
            raise UserError(
                f"favor: features={self.features}, redraw={self.redraw}, chunk={self.chunk}; "
                "use features >= 1, redraw >= 0, chunk >= 1"
            )

    def init(self, key: Array, dims: Dims):
        # A count of steps in f32, because parameters are differentiated.
        projection = draw_projection(key, self.features, dims.key_dim)
        return {"statistics": {"projection": projection, "age": jnp.zeros(())}}

    def initial_state(self, dims: Dims, batch: int, dtype=jnp.float32):
        heads = dims.kv_heads
        memory = recurrent.initial_state(batch, heads, self.features, dims.value_dim + 1)
        return memory, running.initial_top(batch, heads, self.features)

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        log_q, log_k = self._log_features(params, queries, keys, rule)
        memory, top = state or ((), ())
        v, repeats = keys.cleared().v, log_q.shape[2] // log_k.shape[2]
        if rule.causal:
            weight, decay, tops, top = running.rescale(log_k, keys.seg, top)
            q = sharpest(log_q + jnp.repeat(tops, repeats, 2))
            options = {"key_decay": decay, "chunk": self.chunk, "kernels": rule.kernels}
            out, memory = recurrent.attend(q, weight, v, keys.seg, memory, **options, mean=True)
        else:
            weight, tops = running.rescale_both_ways(log_k, keys.seg)
            q = sharpest(log_q + jnp.repeat(tops, repeats, 2))
            sums = recurrent.attend_both_ways(q, weight, with_one(v), keys.seg, self.chunk)
            out = quotient(sums)
        out = rule.tap("heads", out.astype(queries.q.dtype))
        aux = {"statistics": self._next_statistics(params["statistics"], key)}
        return Result(out, (memory, top) if state else state, aux)

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        log_q, log_k = self._log_features(params, queries, keys, rule)
        log_k = jnp.repeat(log_k, log_q.shape[2] // log_k.shape[2], 2)
        v = jnp.repeat(keys.cleared().v.astype(jnp.float32), log_q.shape[2] // keys.v.shape[2], 2)
        pairs = log_q[:, :, None] + log_k[:, None]  # [B N M H m]
        seen = rule.allowed(queries, keys)[..., None]
        z = jnp.where(seen, jax.nn.logsumexp(pairs, -1), MASK)
        weight = jnp.where(seen, jax.nn.softmax(z, 2), 0)
        out = jnp.einsum("bnmh,bmhe->bnhe", weight, v).astype(queries.q.dtype)
        aux = {"statistics": self._next_statistics(params["statistics"], key)}
        return Result(rule.tap("heads", out), state, aux)

    def _log_features(self, params, queries: Queries, keys: Keys, rule: Rule):
        """log φ + ½ log m of queries [B N H m] and keys [B M G m], f32."""
        refuse_every_normaliser("favor", rule)
        refuse_bias("favor", rule)
        refuse_taps("favor", rule)
        projection = jax.lax.stop_gradient(params["statistics"]["projection"])
        scale = queries.q.shape[-1] ** -0.5 if rule.scale is None else rule.scale

        def log_features(z: Array) -> Array:
            z = z * scale**0.5
            return z @ projection.T - jnp.sum(z * z, -1, keepdims=True) / 2

        q, k = rotated(queries, keys, rule)
        return log_features(q), log_features(k)

    def _next_statistics(self, statistics, key: Array | None):
        projection, age = jax.lax.stop_gradient((statistics["projection"], statistics["age"] + 1))
        if key is None or not self.redraw:
            return {"projection": projection, "age": age}
        due = age >= self.redraw
        projection = jax.lax.cond(
            due, lambda: draw_projection(key, *projection.shape), lambda: projection
        )
        return {"projection": projection, "age": jnp.where(due, 0.0, age)}

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        mapped = 2.0 * length * (dims.heads + dims.kv_heads) * dims.key_dim * self.features
        sums = dims._replace(key_dim=self.features, value_dim=dims.value_dim + 1)
        return mapped + recurrent.count_flops(sums, length, self.chunk, causal, along_axis=causal)

    @classmethod
    def examples(cls):
        return (cls(features=12, chunk=8),)


def sharpest(log_weight: Array) -> Array:
    """exp, scaled so that the largest along the last axis is 1: the scale of a query cancels."""
    return jnp.exp(log_weight - jax.lax.stop_gradient(jnp.max(log_weight, -1, keepdims=True)))


def draw_projection(key: Array, features: int, dim: int) -> Array:
    """[features dim]: blocks of ``dim`` orthogonal rows, each as long as a Gaussian row."""
    directions, lengths = jax.random.split(key)
    rows = jax.random.orthogonal(directions, dim, (-(-features // dim),))
    rows = rows.reshape(-1, dim)[:features]
    gaussian = jax.random.normal(lengths, (features, dim))
    return rows * jnp.linalg.norm(gaussian, axis=-1, keepdims=True)
