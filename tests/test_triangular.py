"""Triangular systems: by substitution and by products, and which of the two a process uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.engines import delta, momentum, triangular

FORMS = {"substituted": triangular.substituted, "multiplied": triangular.multiplied}


def system(kind: str, C: int):
    """A [2 3 C C] with NaN where it is not to be read, and R [2 3 C 5]."""
    draw = np.random.default_rng(C)
    keys = draw.standard_normal((2, 3, C, 8))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    A = {"random": keys @ keys.swapaxes(-1, -2), "alike": np.full((2, 3, C, C), 2.0)}[kind]
    A = np.where(np.tri(C, k=-1), A, np.nan if kind == "random" else 3.0)
    return A.astype(np.float32), draw.standard_normal((2, 3, C, 5)).astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("C", [1, 2, 7, 64])
@pytest.mark.parametrize("kind", ["random", "alike"])
def test_both_forms_solve(kind, C, transposed, form):
    A, rhs = system(kind, C)
    whole = np.eye(C) + np.where(np.tri(C, k=-1), A, 0).astype(np.float64)
    wanted = np.linalg.solve(whole.swapaxes(-1, -2) if transposed else whole, rhs)
    got = FORMS[form](jnp.asarray(A), jnp.asarray(rhs), transposed)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_both_forms_have_the_same_gradients():
    A, rhs = system("random", 7)

    def loss(A, rhs, form):
        return jnp.sum(jnp.sin(FORMS[form](A, rhs)))

    A = np.where(np.tri(7, k=-1), A, 0)
    got, wanted = (jax.grad(loss, (0, 1))(A, rhs, form) for form in FORMS)
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_threads_of_one_pool_do_not_wait_for_each_other():
    """LAPACK's solver, as jax calls it on a CPU, takes a thread and waits for others of its pool:
    a backward pass, which solves twice at once, may wait for ever, and so may eight devices."""
    shape = jax.ShapeDtypeStruct((1, 128, 1, 4), jnp.float32)
    gate, seg = (jax.ShapeDtypeStruct(z, t) for z, t in (((1, 128, 1), "f4"), ((1, 128), "i4")))
    gates = momentum.Gates(gate, gate, gate)

    def program(function, *arguments):
        def loss(*tokens):
            return jnp.sum(function(*tokens)[0])

        return jax.jit(jax.grad(loss)).lower(*arguments).as_text()

    assert "trsm" not in program(delta.attend, shape, shape, shape, gate, gate, seg)
    assert "trsm" not in program(momentum.attend, shape, shape, shape, gates, seg)


def test_other_devices_substitute(monkeypatch):
    A, rhs = system("random", 7)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "trsm" in jax.jit(lambda *z: triangular.solve(*z)).lower(A, rhs).as_text()
