"""The fast form computes the equations: outputs and every gradient, at any length and precision."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.mechanisms.softmax import Softmax
from battery.calls import (
    assert_close,
    assert_finite,
    cotangent_of,
    outputs_and_gradients,
    quick_outputs,
)
from battery.cases import DIMS, Case, bidirectional, draw, initial
from battery.refusal import verify

LENGTHS = (1, 2, 3, 5, 7, 13, 31, 33, 37)

ROUNDED = 2.0**-8
"""The unit roundoff of bfloat16, which has 8 significant bits."""


def check_reference(case: Case) -> None:
    """fast == reference: outputs and the gradients of parameters, q, k, v and x, in f32."""
    inputs = draw(case)
    got = outputs_and_gradients(case, inputs)
    assert_finite(got)
    assert_close(got, outputs_and_gradients(case, inputs, "reference"))


def check_bidirectional_reference(case: Case) -> None:
    """The same for an encoder: no order of time."""
    verify(check_reference, bidirectional(case))


def check_low_precision(case: Case) -> None:
    """bf16 in, bf16 out, and as close to the f32 equations on the same rounded numbers as a few
    roundings allow: rotated q and k, weights before their product with v, and the result are each
    rounded once on the way there, and again in the gradients on the way back. The few queries for
    which rounded q and k choose other keys, in the literal form too, are not asked."""
    rounded = draw(case).cast(jnp.bfloat16)
    exact = rounded.cast(jnp.float32)
    literal = [
        np.asarray(quick_outputs(case, z, "reference"), np.float32) for z in (rounded, exact)
    ]
    tolerance = 8 * ROUNDED * max(1.0, np.max(np.abs(literal[1])))
    asked = np.all(np.abs(literal[0] - literal[1]) < tolerance, (2, 3), keepdims=True)
    assert np.mean(asked) > 0.9
    cotangent = cotangent_of(exact) * asked
    got, gradient = outputs_and_gradients(case, rounded, cotangent=cotangent)
    assert got.dtype == jnp.bfloat16
    wanted, wanted_gradient = outputs_and_gradients(case, exact, "reference", cotangent)
    got, wanted = np.where(asked, got, 0), np.where(asked, wanted, 0)
    assert_close((got, gradient), (wanted, wanted_gradient), 8 * ROUNDED)


def check_limit(case: Case) -> None:
    """At the fields that `limit` names, the mechanism as initialised is softmax over all keys."""
    limit = case.mechanism.limit(37)
    if limit is None:
        return
    limited = replace(case, mechanism=limit)
    inputs = draw(limited, length=37)._replace(params=initial(limited))
    everything = replace(case, mechanism=Softmax())
    wanted = quick_outputs(everything, inputs, "reference")
    assert_close(quick_outputs(limited, inputs), wanted)


def check_any_length(case: Case) -> None:
    """Any number of tokens, a multiple of nothing, gives the first outputs of the literal form at
    the greatest length with the slots behind left empty; values may be wider than keys."""
    whole = draw(case, batch=1, length=max(LENGTHS), dims=DIMS._replace(value_dim=6))
    for length in LENGTHS:
        part = whole.tokens(lambda z, n=length: z[:, :n])
        got = quick_outputs(case, part)
        assert got.shape == (1, length, DIMS.heads, 6)
        padded = whole._replace(seg=np.where(whole.pos < length, whole.seg, -1))
        wanted = quick_outputs(case, padded, "reference")[:, :length]
        assert_close(got, wanted, what=f"length {length}")


def check_grouped_heads(case: Case) -> None:
    """G kv heads == the same kv heads repeated H / G times, for G = 1, 2, 4."""
    H = DIMS.heads
    for G in (1, 2, H):
        inputs = draw(case, dims=DIMS._replace(kv_heads=G))
        wide = draw(case, dims=DIMS._replace(kv_heads=H))
        repeated = jax.tree.map(lambda z, like: _repeated(z, like.shape), inputs, wide)
        got, wanted = quick_outputs(case, inputs), quick_outputs(case, repeated)
        assert_close(got, wanted, what=f"{G} kv heads")


def _repeated(z: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """``z`` with the axes that are too short (those of kv heads) repeated to ``shape``."""
    for axis, size in enumerate(shape):
        z = np.repeat(z, size // z.shape[axis], axis)
    return z
