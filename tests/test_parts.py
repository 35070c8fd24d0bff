"""Attention over disjoint sets of keys, merged, is attention over all, with its gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import MASK
from attnlab.engines import parts

ROWS, KEYS, E = 6, (3, 1, 4), 5


def draw():
    """Logits of each part, of which row 0 sees nothing, row 1 only the last, and values."""
    rng = np.random.default_rng(0)
    logits = [rng.standard_normal((ROWS, n)).astype(np.float32) * 3 for n in KEYS]
    seen = [np.ones((ROWS, n), bool) for n in KEYS]
    for i, each in enumerate(seen):
        each[0] = False
        each[1] = i == len(KEYS) - 1
    values = [rng.standard_normal((n, E)).astype(np.float32) for n in KEYS]
    return logits, seen, values


def softmax(z, seen, v):
    z = jnp.where(seen, z, MASK)
    top = jax.lax.stop_gradient(jnp.max(z, -1))
    weight = jnp.where(seen, jnp.exp(z - top[:, None]), 0)
    total = jnp.sum(weight, -1)
    safe = jnp.where(total > 0, total, 1)
    return weight @ v / safe[:, None], jnp.where(total > 0, top + jnp.log(safe), MASK)


def merged(logits, seen, values):
    return parts.merge(*zip(*(softmax(*each) for each in zip(logits, seen, values))))


def whole(logits, seen, values):
    return softmax(jnp.concatenate(logits, 1), np.concatenate(seen, 1), jnp.concatenate(values))


def test_merged_parts_are_the_whole_with_every_gradient():
    logits, seen, values = draw()
    weight = np.random.default_rng(1).standard_normal((ROWS, E)).astype(np.float32)

    def run(form):
        def loss(logits, values):
            out, lse = form(logits, seen, values)
            return jnp.sum(out * weight) + jnp.sum(jnp.where(lse > MASK, jnp.sin(lse), 0))

        return form(logits, seen, values), jax.grad(loss, (0, 1))(logits, values)

    for got, wanted in zip(jax.tree.leaves(run(merged)), jax.tree.leaves(run(whole))):
        np.testing.assert_allclose(got, wanted, atol=2e-6)


def test_a_row_that_sees_nothing_is_zero():
    out, lse = merged(*draw())
    assert not np.any(out[0])
    assert lse[0] == MASK
    assert np.all(lse[1:] > MASK)


def test_narrow_parts_are_summed_in_f32():
    out, lse = jnp.ones((2, 3, E), jnp.bfloat16), jnp.zeros((2, 3))
    total, _ = parts.merge(out, lse)
    gradient = jax.grad(lambda z: jnp.sum(parts.merge(z, lse)[0]))(out)
    assert total.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, np.full((2, 3, E), 0.5))
