"""The loss in pieces is the loss, with its gradients, however the tokens are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab import cross_entropy as module
from attnlab.cross_entropy import cross_entropy

VOCABULARY, WIDTH = 23, 8


def arrays(length: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 4)
    x = 2 * jax.random.normal(keys[0], (2, length, WIDTH), dtype)
    table = jax.random.normal(keys[1], (VOCABULARY, WIDTH))
    targets = jax.random.randint(keys[2], (2, length), 0, VOCABULARY)
    return x, table, targets, jax.random.normal(keys[3], (2, length))


def literally(x, table, targets):
    logits = jnp.einsum("bnw,vw->bnv", x.astype(jnp.float32), table)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def both(function, x, table, targets, weight):
    def total(x, table):
        nll = function(x, table, targets)
        return jnp.sum(nll * weight), nll

    grads, nll = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, table)
    return nll, *grads


@pytest.mark.parametrize("length", [1, 7, 16])
@pytest.mark.parametrize("at_once", [1, 5 * VOCABULARY, 2**20])
def test_pieces_are_the_whole(length, at_once, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_IN_FLIGHT", at_once)
    given = arrays(length)
    for got, wanted in zip(both(cross_entropy, *given), both(literally, *given)):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_low_precision_is_that_of_the_products(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_IN_FLIGHT", 5 * VOCABULARY)
    x, table, targets, weight = arrays(16, jnp.bfloat16)
    got, wanted = (
        both(cross_entropy, x, table, targets, weight),
        both(literally, x, table, targets, weight),
    )
    assert [z.dtype for z in got] == [jnp.float32, jnp.bfloat16, jnp.float32]
    for a, b in zip(got, wanted):
        a, b = (np.asarray(z, np.float32) for z in (a, b))
        np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max())


def test_no_array_holds_all_logits():
    """Of the compiled gradient, for a vocabulary of 50,000."""
    x = jax.ShapeDtypeStruct((2, 1024, WIDTH), jnp.float32)
    table = jax.ShapeDtypeStruct((50_000, WIDTH), jnp.float32)
    targets = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    def total(x, table, targets):
        return jnp.sum(cross_entropy(x, table, targets))

    jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1)))(x, table, targets)
    assert largest(jaxpr.jaxpr) <= module.LOGITS_IN_FLIGHT * 1.05


def largest(jaxpr) -> int:
    """The most elements of one array in a jaxpr and all it calls."""
    found = [int(np.prod(v.aval.shape)) for e in jaxpr.eqns for v in e.outvars]
    inner = [largest(sub) for e in jaxpr.eqns for sub in jax.core.jaxprs_in_params(e.params)]
    return max([*found, *inner], default=0)
