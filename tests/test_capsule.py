"""Routing by agreement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close

from attnlab.errors import UserError
from attnlab.mechanisms.capsule import Capsule, route, squash

VOTES = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4, 3, 8), np.float32))


def test_one_output_is_the_squashed_sum():
    assert_close(route(VOTES[:, :, :1], 3), squash(VOTES[:, :, :1].sum(1)))


def test_one_iteration_is_the_squashed_mean_over_outputs():
    assert_close(route(VOTES, 1), squash(VOTES.sum(1) / 3))


def test_couplings_follow_the_equations_literally():
    b = np.zeros((5, 4, 3))
    y = b
    for _ in range(3):
        c = np.exp(b) / np.exp(b).sum(-1, keepdims=True)
        s = np.einsum("nij,nije->nje", c, VOTES)
        size = np.linalg.norm(s, axis=-1, keepdims=True)
        y = size**2 / (1 + size**2) * s / size
        b = b + np.einsum("nije,nje->nij", VOTES, y)
    assert_close(route(VOTES, 3), y)


def test_votes_that_agree_outweigh_votes_that_do_not():
    """Three of four heads vote alike for output 0 and at odds for output 1: more iterations make
    output 0 longer."""
    agreed = np.zeros((1, 4, 2, 8), np.float32)
    agreed[0, :3, 0, 0] = 1
    agreed[0, :, 1] = np.eye(8, dtype=np.float32)[:4] * 0.5
    lengths = [float(np.linalg.norm(route(jnp.asarray(agreed), n)[0, 0])) for n in (1, 3)]
    assert lengths[0] < lengths[1]


def test_nothing_stays_nothing_with_a_gradient_of_zero():
    np.testing.assert_array_equal(squash(jnp.zeros((2, 8))), 0)
    np.testing.assert_array_equal(jax.grad(lambda s: squash(s).sum())(jnp.zeros((2, 8))), 0)
    assert np.all(np.linalg.norm(squash(100 * VOTES), axis=-1) < 1)


def test_no_iteration_is_refused():
    with pytest.raises(UserError, match="iterations=0"):
        Capsule(iterations=0)
