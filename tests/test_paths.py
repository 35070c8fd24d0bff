"""The router mixes what the paths give, and nothing else."""

import jax
import numpy as np
import pytest
from battery.calls import assert_close
from battery.cases import DIMS, Case, draw, initial

from attnlab.errors import UserError
from attnlab.mechanisms.paths import Paths
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.window import Window
from attnlab.positions.none import NoPosition

PARTS = (Window(3), Softmax())


def call(mechanism, inputs, params):
    def run(params, z):
        rule = Case(mechanism, NoPosition()).rule(inputs.params[1])
        return mechanism(params, z.queries(), z.keys(), rule, x=z.x)

    return jax.jit(run)(params, inputs)


def test_routers_that_are_zero_mix_evenly_and_those_that_are_sure_take_one_path():
    case = Case(Paths(PARTS), NoPosition())
    inputs = draw(case)
    inputs = inputs._replace(x=np.abs(inputs.x) + 0.1)
    alone = [np.asarray(call(part, inputs, {}).out) for part in PARTS]
    params = initial(case)[0]
    even = call(case.mechanism, inputs, params)
    assert_close(even.out, (alone[0] + alone[1]) / 2)
    np.testing.assert_allclose(even.aux["stats"]["entropy_of_token"], np.log(2), rtol=1e-5)
    for p in range(2):
        router = np.zeros((DIMS.width, 2), np.float32)
        router[:, p] = 1e3  # x is positive, so that every token is sure
        sure = call(case.mechanism, inputs, {**params, "router": router})
        np.testing.assert_array_equal(sure.out, alone[p])
        assert abs(float(sure.aux["stats"]["entropy_of_mean"])) < 1e-6


def test_the_kept_paths_weigh_one_together_and_the_others_still_learn():
    """With equal parts any weights that sum to one give the part itself."""
    mechanism = Paths((Softmax(),) * 3, top=2)
    inputs = draw(Case(mechanism, NoPosition()))
    params = inputs.params[0]
    assert_close(call(mechanism, inputs, params).out, call(Softmax(), inputs, {}).out)
    one = Paths(PARTS, top=1)
    inputs = draw(Case(one, NoPosition()))
    weights = jax.nn.softmax(inputs.x @ inputs.params[0]["router"], -1)
    first = (weights[..., 0] > 0.5)[..., None, None]
    alone = [np.asarray(call(part, inputs, {}).out) for part in PARTS]
    params = inputs.params[0]
    assert_close(call(one, inputs, params).out, np.where(first, *alone))
    rule = Case(one, NoPosition()).rule(inputs.params[1])

    def loss(p):
        return (one(p, inputs.queries(), inputs.keys(), rule, x=inputs.x).out ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    assert np.any(gradient["router"])


def test_numbers_of_paths_that_there_are_not_are_refused():
    with pytest.raises(UserError, match="top=3"):
        Paths(PARTS, top=3)
