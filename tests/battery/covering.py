"""What a uniform query sees: every visible token, and each exactly once."""

import jax
import numpy as np

from battery.calls import assert_close, attend
from battery.cases import DIMS, Case, documents, draw


def check_covered(case: Case) -> None:
    """A query of 0 gives the exact mean of all visible values, and e^lse is their number, in packed
    documents that begin anywhere. Learned parameters are 0."""
    drawn = draw(case)
    zero = jax.tree.map(np.zeros_like, drawn.params)
    inputs = documents(drawn._replace(params=zero, q=0 * drawn.q), (13, 19), (20, 10))
    inputs = inputs._replace(pos=inputs.pos + np.array([[3], [0]], np.int32))
    call = jax.jit(lambda z: attend(case, z)[::2])
    out, aux = call(inputs)
    seen = (inputs.seg[:, :, None] == inputs.seg[:, None]) & (inputs.seg >= 0)[:, None]
    if case.causal:
        seen &= inputs.pos[:, None] <= inputs.pos[:, :, None]
    count = np.sum(seen, -1)
    full = inputs.seg >= 0
    lse = np.where(full[:, None], aux["lse"], 0)
    assert_close(np.exp(lse), np.where(full, count, 1)[:, None].repeat(DIMS.heads, 1), what="count")
    mean = np.einsum("bnm,bmge->bnge", seen, inputs.v) / np.maximum(count, 1)[..., None, None]
    assert_close(out, np.repeat(mean, DIMS.heads // DIMS.kv_heads, 2), what="mean")


def swapped(z: np.ndarray, a: int, b: int) -> np.ndarray:
    """[B N ...] with tokens a and b exchanged."""
    order = np.arange(z.shape[1])
    order[[a, b]] = b, a
    return z[:, order]
