"""Attention over the answers of a memory, and nothing else."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import Case, draw

from attnlab.core import positions
from attnlab.errors import UserError
from attnlab.mechanisms.titans_layer import TitansLayer

WINDOW, SLOTS = 5, 2
CASE = Case(TitansLayer(window=WINDOW, persistent=SLOTS, chunk=8), positions.get("none")())


def test_of_a_memory_that_learns_nothing_only_the_learned_tokens_are_seen():
    """Every answer is 0, so that every logit is, and every value of a token."""
    inputs = draw(CASE)
    params, place = inputs.params
    shut = {"write": 0 * params["memory"]["write"], "write_bias": np.full(2, -1e9, np.float32)}
    params = params | {"memory": params["memory"] | shut}
    got = outputs(CASE, inputs._replace(params=(params, place)))
    value = np.repeat(params["persistent"]["value"], 2, 1)
    seen = SLOTS + np.minimum(np.arange(32) + 1, WINDOW)
    wanted = np.sum(value, 0) / seen[:, None, None]
    assert_close(got, np.broadcast_to(wanted, got.shape))


def test_every_later_token_knows_the_first():
    inputs = draw(CASE, batch=1)
    before = outputs(CASE, inputs)
    v = inputs.v.copy()
    v[:, 3] += 1
    moved = np.any(outputs(CASE, inputs._replace(v=v)) != before, (0, 2, 3))
    assert moved.tolist() == [i >= 3 for i in range(32)]


def test_sizes_that_make_no_sense_are_refused_by_its_name():
    with pytest.raises(UserError, match="titans_layer"):
        TitansLayer(window=0)
