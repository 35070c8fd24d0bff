"""A layer that attends densely, and shows an estimate where it looks."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Mechanism, Result
from attnlab.engines import cells, dense
from attnlab.mechanisms.sea import Sea

TOP = 8
"""Keys of the largest weights, of which it is counted how many an estimate keeps."""


@dataclass(frozen=True)
class Taught(Mechanism):
    """Softmax attention, whose output is left alone, with the parameters of ``inner``.

    Added to the loss: the cross-entropy of the dense weights relative to the scores of `Sea` over
    all visible keys, and the mean squared error of the output of `Sea`. ``aux["kept"]`` has the
    ``weight`` on the keys kept and the ``share`` of the `TOP` keys among them, [B H N], for the
    estimate and for a window of as many keys.
    """

    inner: Sea

    def init(self, key, dims):
        return self.inner.init(key, dims)

    def initial_state(self, dims, batch, dtype=jnp.float32):
        return ()

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        out, _, probs = dense.attend(queries, keys, rule)
        student = dataclasses.replace(self.inner, weight=1.0)
        score = student.estimate(params, queries, keys, rule).score
        wide, kept = cells.spread(score, queries.pos, keys.pos, student.kept)
        seen = jnp.broadcast_to(rule.allowed(queries, keys)[:, None], probs.shape)
        turned = (jnp.moveaxis(z, 1, 2) for z in (probs, wide, seen))
        loss = student.loss(*turned, queries.seg)
        got = student(params, queries, keys, rule, x=x, key=key).out
        loss += jnp.mean(jnp.square(got - jax.lax.stop_gradient(out)))
        window = seen & (queries.pos[:, :, None] - keys.pos[:, None] < student.kept)[:, None]
        found = {"estimate": _held(probs, kept & seen), "window": _held(probs, window)}
        return Result(out, state, {"loss": loss, "kept": found})


def _held(probs, kept):
    best = jax.lax.top_k(probs, min(TOP, probs.shape[-1]))[1]
    among = jnp.take_along_axis(kept, best, -1)
    weight = jnp.sum(jnp.where(kept, probs, 0), -1)
    return {"weight": weight, "share": jnp.mean(among * 1.0, -1)}
