"""Gates of heads: their sum, their limit, their balance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close
from battery.cases import DIMS, Case, draw

from attnlab.errors import UserError
from attnlab.mechanisms.mixture_of_heads import MixtureOfHeads, measure_balance
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.none import NoPosition


def run(mechanism, inputs, params):
    def call(params, z):
        rule = Case(mechanism, NoPosition()).rule(inputs.params[1])
        return mechanism(params, z.queries(), z.keys(), rule, x=z.x)

    return jax.jit(call)(params, inputs)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_uniform_routers_that_choose_all_heads_are_softmax_attention(shared):
    mechanism = MixtureOfHeads(shared=shared, top=4 - shared)
    inputs = draw(Case(mechanism, NoPosition()))
    params = jax.tree.map(np.zeros_like, inputs.params[0])
    assert_close(run(mechanism, inputs, params).out, run(Softmax(), inputs, {}).out)


def test_gates_of_a_token_sum_to_the_heads_that_are_on():
    """Shared gates to α_1 S and chosen ones to α_2 κ, where α_1 + α_2 = 2."""
    mechanism = MixtureOfHeads(shared=2, top=1)
    inputs = draw(Case(mechanism, NoPosition()))
    gates, _ = mechanism._gates(inputs.params[0], jnp.asarray(inputs.x), inputs.queries())
    np.testing.assert_array_equal(np.sum(gates[..., 2:] > 0, -1), 1)
    total = np.sum(gates[..., :2], -1) / 2 + np.sum(gates[..., 2:], -1)
    np.testing.assert_allclose(total, 2, rtol=1e-5)


def test_balance_is_one_where_all_are_used_alike_and_the_number_of_heads_where_one_is():
    E, full = 4, jnp.ones((1, 8), bool)
    uniform, turns = jnp.full((1, 8, E), 1 / E), jnp.eye(E)[np.arange(8) % E][None]
    alone = jnp.eye(E)[np.zeros(8, int)][None]
    np.testing.assert_allclose(measure_balance(uniform, turns, full), (1, 1 / E))
    np.testing.assert_allclose(measure_balance(alone, alone, full), (E, 1))
    half = jnp.arange(8)[None] < 4  # empty slots do not count
    np.testing.assert_allclose(measure_balance(uniform, turns, half), (1, 1 / E))


def test_heads_that_leave_too_few_to_choose_from_are_refused():
    with pytest.raises(UserError, match="leave 1 to choose top=2"):
        MixtureOfHeads(shared=3).init(jax.random.key(0), DIMS)
    with pytest.raises(UserError, match="top=0"):
        MixtureOfHeads(top=0)
