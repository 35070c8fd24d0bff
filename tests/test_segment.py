"""Segments: exact inside, and every other token counted once outside."""

from dataclasses import replace

import numpy as np
import pytest
from battery.calls import assert_close, quick_outputs
from battery.cases import Case, draw
from battery.covering import check_covered, swapped

from attnlab.errors import UserError
from attnlab.mechanisms.segment import Segment
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.none import NoPosition

CASE = Case(Segment(8), NoPosition())


@pytest.mark.parametrize("causal", [True, False])
def test_a_uniform_query_sees_every_token_once(causal):
    check_covered(replace(CASE, causal=causal))


def test_keys_that_are_constant_in_segments_give_softmax():
    inputs = draw(CASE)
    inputs = inputs._replace(k=inputs.k[:, np.arange(32) // 8 * 8])
    wanted = quick_outputs(replace(CASE, mechanism=Softmax()), inputs, "reference")
    assert_close(quick_outputs(CASE, inputs), wanted)


def test_order_counts_inside_and_not_outside_a_segment():
    inputs = draw(CASE)
    before = quick_outputs(CASE, inputs)
    other = inputs._replace(k=swapped(inputs.k, 9, 13), v=swapped(inputs.v, 9, 13))
    after = quick_outputs(CASE, other)
    np.testing.assert_array_equal(after[:, :9], before[:, :9])
    assert np.all(np.any(np.abs(after[:, 9:13] - before[:, 9:13]) > 1e-3, (0, 2, 3)))
    assert_close(after[:, 13:], before[:, 13:])


def test_a_segment_has_tokens():
    with pytest.raises(UserError, match="segment=0"):
        Segment(0)
