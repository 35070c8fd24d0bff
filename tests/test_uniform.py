"""Uniform attention is the mean so far, and what softmax gives to queries of 0."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, draw

from attnlab.errors import UserError
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.uniform import Uniform
from attnlab.positions.none import NoPosition


def test_it_is_the_mean_of_the_values_so_far():
    case = Case(Uniform(chunk=8), NoPosition())
    inputs = draw(case, batch=1)
    count = np.arange(1, inputs.v.shape[1] + 1)[:, None, None]
    means = np.cumsum(inputs.v[0], 0) / count
    assert_close(outputs(case, inputs)[0], np.repeat(means, DIMS.heads // DIMS.kv_heads, 1))


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_softmax_of_queries_that_ask_for_nothing(causal):
    case = Case(Uniform(chunk=8), NoPosition(), causal)
    inputs = draw(case)
    wanted = outputs(Case(Softmax(), NoPosition(), causal), inputs._replace(q=0 * inputs.q))
    assert_close(outputs(case, inputs), wanted)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(UserError, match="uniform"):
        Uniform(chunk=0)
