"""Experts behind sigmoids that do not compete."""

import jax
import numpy as np
import pytest
from battery.calls import assert_close
from battery.cases import DIMS, Case, draw

from attnlab.errors import UserError
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.switch_head import SwitchHead
from attnlab.positions.none import NoPosition


def run(mechanism, inputs, params):
    def call(params, z):
        rule = Case(mechanism, NoPosition()).rule(inputs.params[1])
        return mechanism(params, z.queries(), z.keys(), rule, x=z.x)

    return jax.jit(call)(params, inputs)


@pytest.mark.parametrize(("experts", "top"), [(1, 1), (3, 2)])
def test_experts_that_do_nothing_are_softmax_attention(experts, top):
    """V = O = 1 and constant gates σ(0) = 1/2: the output is that of softmax, times (top / 2)²."""
    mechanism = SwitchHead(experts, top)
    inputs = draw(Case(mechanism, NoPosition()))
    params = jax.tree.map(np.zeros_like, inputs.params[0])
    for name in ("values", "outputs"):
        params[name] = np.broadcast_to(np.eye(8, dtype=np.float32), params[name].shape)
    wanted = run(Softmax(), inputs, {}).out * (top / 2) ** 2
    assert_close(run(mechanism, inputs, params).out, wanted)


def test_experts_that_are_not_chosen_have_no_say():
    mechanism = SwitchHead(experts=2, top=1)
    inputs = draw(Case(mechanism, NoPosition()))
    inputs = inputs._replace(x=np.abs(inputs.x) + 0.1)
    params = {name: np.array(z) for name, z in inputs.params[0].items()}
    params["output_scores"][..., 0], params["output_scores"][..., 1] = 1, -1
    before = run(mechanism, inputs, params).out
    params["outputs"][:, 1] += 100
    np.testing.assert_array_equal(run(mechanism, inputs, params).out, before)
    params["outputs"][:, 0] += 1
    assert np.any(run(mechanism, inputs, params).out != before)


def test_scores_start_as_unit_vectors():
    params = SwitchHead().init(jax.random.key(0), DIMS)
    for name, axis in (("value_scores", 1), ("output_scores", 0)):
        np.testing.assert_allclose(np.linalg.norm(params[name], axis=axis), 1, rtol=1e-5)


def test_numbers_of_experts_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="top=5, experts=4"):
        SwitchHead(top=5)
