"""What counts FLOPs counts what runs: loops as often as they turn, nothing that is not needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.counting import count
from jax import lax

A, B = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)
ONCE = 2 * 3 * 4 * 5
SQUARE = np.ones((4, 4), np.float32)


def test_a_product_counts_two_for_a_multiply_add():
    assert count(lambda a, b: jnp.exp(a @ b), A, B) == ONCE


def test_a_batch_counts_each():
    batch = np.ones((7, 3, 4), np.float32)
    assert count(lambda a, b: jnp.einsum("xnd,dm->xnm", a, b), batch, B) == 7 * ONCE


def test_a_gradient_counts_its_two_products():
    assert count(jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), (0, 1)), A, B) == 3 * ONCE


def test_what_a_checkpoint_does_again_counts_again():
    again = jax.checkpoint(lambda a, b: jnp.sin(a @ b))
    assert count(jax.grad(lambda a, b: jnp.sum(again(a, b) ** 2), (0, 1)), A, B) == 4 * ONCE


def test_what_no_result_needs_does_not_count():
    assert count(lambda a, b: (a @ b, a + 1)[1], A, B) == 0


def test_a_scan_counts_every_turn():
    def scan(a, b):
        return lax.scan(lambda carry, x: (carry + x @ b, carry), a @ b, jnp.stack([a] * 6))[0]

    assert count(scan, A, B) == 7 * ONCE


def test_a_loop_counts_the_turns_that_its_data_make():
    @jax.jit
    def power(z, times):
        return lax.fori_loop(0, times, lambda i, z: z @ SQUARE, z)

    def rows(times):
        return lax.map(lambda n: power(SQUARE, n), times)

    assert count(rows, np.asarray([2, 0, 5], np.int32)) == 7 * 2 * 4**3


@pytest.mark.parametrize("chosen", [False, True])
def test_a_branch_counts_if_it_is_taken(chosen):
    def either(yes, z):
        return lax.cond(yes, lambda: z @ z @ z, lambda: z @ z)

    assert count(either, np.bool_(chosen), SQUARE) == (1 + chosen) * 2 * 4**3


def test_a_custom_gradient_counts_what_stands_in_it():
    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, d: (d @ kept[1].T, kept[0].T @ d))
    assert count(product, A, B) == ONCE
    assert count(jax.grad(lambda a, b: jnp.sum(product(a, b) ** 2), (0, 1)), A, B) == 3 * ONCE


def test_a_convolution_counts_its_taps():
    line, taps = np.ones((1, 10, 6), np.float32), np.ones((3, 1, 6), np.float32)

    def convolve(line, taps):
        names = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            line, taps, (1,), "SAME", dimension_numbers=names, feature_group_count=6
        )

    assert count(convolve, line, taps) == 2 * 10 * 6 * 3


def test_a_triangular_solve_counts_half_a_product():
    def solve(z):
        return jax.scipy.linalg.solve_triangular(SQUARE, z, lower=True)

    assert count(solve, B) == 4 * 4 * 5
