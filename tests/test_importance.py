"""Importance: every token has one weight, whoever asks."""

import numpy as np
import pytest
from battery.calls import assert_close, assert_finite, outputs, outputs_and_gradients
from battery.cases import DIMS, Case, draw

from attnlab.errors import UserError
from attnlab.mechanisms.importance import Importance
from attnlab.mechanisms.uniform import Uniform
from attnlab.positions.none import NoPosition

CASE = Case(Importance(chunk=8), NoPosition())


def test_it_is_the_weighted_mean_so_far():
    inputs = draw(CASE, batch=1)
    k, v = (np.repeat(z[0], DIMS.heads // DIMS.kv_heads, 1) for z in (inputs.k, inputs.v))
    q = inputs.q[0]
    weight = np.exp(np.sum(q / (1 + np.exp(-q)) * k, -1) * DIMS.key_dim**-0.5)[..., None]
    assert_close(outputs(CASE, inputs)[0], np.cumsum(weight * v, 0) / np.cumsum(weight, 0))


def test_keys_of_nothing_weigh_alike():
    inputs = draw(CASE)
    wanted = outputs(Case(Uniform(chunk=8), NoPosition()), inputs)
    assert_close(outputs(CASE, inputs._replace(k=0 * inputs.k)), wanted)


def test_both_ways_all_tokens_see_the_same_mean():
    out = outputs(Case(Importance(chunk=8), NoPosition(), causal=False), draw(CASE))
    assert_close(out, np.broadcast_to(out[:, :1], out.shape))


def test_scores_of_a_thousand_have_finite_gradients():
    """And those that the literal form has; a gradient of keys is as large as queries are."""
    inputs, size = draw(CASE), np.float32(3000)
    large = inputs._replace(q=inputs.q * size)
    out, gradient = outputs_and_gradients(CASE, large)
    assert_finite((out, gradient))
    wanted, wanted_gradient = outputs_and_gradients(CASE, large, "reference")
    assert_close(out, wanted)
    assert_close(gradient[1], wanted_gradient[1], what="queries")
    assert_close(gradient[2] / size, wanted_gradient[2] / size, what="keys")
    assert_close(gradient[3], wanted_gradient[3], what="values")


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(UserError, match="importance"):
        Importance(chunk=0)
