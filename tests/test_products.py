"""The products of attention are einsums, and so are their gradients, in either order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import products

ROWS = (1, 37, products.LARGE - 1, products.LARGE, products.LARGE + 3)
EQUATIONS = {
    "scores": "bnd,bmd->bnm",
    "mixed": "bnd,bdm->bnm",
    "collected": "bnd,bnm->bdm",
}


def draw(name: str, rows: int, dtype):
    shapes = {
        "scores": ((2, rows, 5), (2, 7, 5)),
        "mixed": ((2, rows, 7), (2, 7, 5)),
        "collected": ((2, rows, 7), (2, rows, 5)),
    }
    normal = np.random.default_rng(rows).standard_normal
    return tuple(jnp.asarray(normal(shape), dtype) for shape in shapes[name])


def both(function, a, b):
    """The product, and the gradient of a sum of its squares."""

    def total(a, b):
        out = function(a, b)
        return jnp.sum(out * out), out

    gradient, out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(a, b)
    return out, *gradient


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", EQUATIONS)
def test_products_and_gradients_are_those_of_einsum(name, rows):
    a, b = draw(name, rows, jnp.float32)
    got = both(getattr(products, name), a, b)
    wanted = both(lambda a, b: jnp.einsum(EQUATIONS[name], a, b), a, b)
    for found, expected in zip(got, wanted):
        size = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("rows", [37, products.LARGE])
@pytest.mark.parametrize("name", EQUATIONS)
def test_sums_of_low_precision_are_f32_and_gradients_as_their_numbers(name, rows):
    a, b = draw(name, rows, jnp.bfloat16)
    out, d_a, d_b = both(getattr(products, name), a, b)
    assert (out.dtype, d_a.dtype, d_b.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    exact = both(
        lambda a, b: jnp.einsum(EQUATIONS[name], a, b), *(z.astype(jnp.float32) for z in (a, b))
    )
    np.testing.assert_allclose(out, exact[0], rtol=0, atol=1e-4 * float(jnp.abs(exact[0]).max()))
    for found, expected in zip((d_a, d_b), exact[1:]):
        size = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0, atol=0.02 * size)


@pytest.mark.parametrize(("wide", "first"), [(7, (2, 5)), (3, (2, 3))])
def test_the_narrow_array_comes_first_and_turned(wide, first):
    """What makes it fast, from `LARGE` rows on: the sum is along the last axis of the first."""

    def first_operand(rows):
        p, x = jnp.zeros((2, rows, wide)), jnp.zeros((2, rows, 5))
        equations = jax.make_jaxpr(products.collected)(p, x).jaxpr.eqns
        (dot,) = (e for e in flat(equations) if e.primitive.name == "dot_general")
        return dot.invars[0].aval.shape

    few, many = products.LARGE - 1, products.LARGE
    assert first_operand(few) == (2, few, wide)
    assert first_operand(many) == (*first, many)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 37, 5), (2, 3, 4, 5)])
def test_a_projection_and_its_gradients_are_those_of_a_product(shape):
    normal = np.random.default_rng(0).standard_normal
    x, kernel = jnp.asarray(normal(shape), jnp.float32), jnp.asarray(normal((5, 7)), jnp.float32)
    for found, expected in zip(both(products.projected, x, kernel), both(jnp.matmul, x, kernel)):
        size = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * size)


def test_a_projection_keeps_low_precision():
    x, kernel = jnp.ones((2, 5), jnp.bfloat16), jnp.ones((5, 7), jnp.bfloat16)
    assert [z.dtype for z in both(products.projected, x, kernel)] == [jnp.bfloat16] * 3


def test_the_gradient_of_a_kernel_is_taken_with_the_tokens_first():
    def gradient(x, kernel):
        return jax.grad(lambda kernel: jnp.sum(products.projected(x, kernel)))(kernel)

    x, kernel = jnp.ones((6, 5)), jnp.ones((5, 7))
    equations = flat(jax.make_jaxpr(gradient)(x, kernel).jaxpr.eqns)
    dots = [e for e in equations if e.primitive.name == "dot_general"]
    assert [z.aval.shape for z in dots[-1].invars] == [(6, 5), (6, 7)]


def flat(equations):
    for equation in equations:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from flat(inner.eqns)
