"""The hourglass: every token counted once, and groups that share what they find."""

from dataclasses import replace

import numpy as np
import pytest
from battery.calls import assert_close, quick_outputs
from battery.cases import Case, draw
from battery.covering import check_covered, swapped

from attnlab.errors import UserError
from attnlab.mechanisms.hourglass import Hourglass
from attnlab.positions.none import NoPosition

CASE = Case(Hourglass(factor=4, near=1), NoPosition())


@pytest.mark.parametrize("causal", [True, False])
def test_a_uniform_query_sees_every_token_once(causal):
    check_covered(replace(CASE, causal=causal))


def test_order_inside_a_far_group_does_not_count():
    """Group 2 is positions 5..8; tokens from 12 on see it as one."""
    inputs = draw(CASE)
    before = quick_outputs(CASE, inputs)
    other = inputs._replace(k=swapped(inputs.k, 5, 8), v=swapped(inputs.v, 5, 8))
    after = quick_outputs(CASE, other)
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert np.any(np.abs(after[:, 5:8] - before[:, 5:8]) > 1e-3)
    assert_close(after[:, 8:], before[:, 8:])
    apart = inputs._replace(k=swapped(inputs.k, 5, 9), v=swapped(inputs.v, 5, 9))
    assert np.any(np.abs(quick_outputs(CASE, apart)[:, 16:] - before[:, 16:]) > 1e-3)


@pytest.mark.parametrize("field", ["factor", "near"])
def test_sizes_are_positive(field):
    with pytest.raises(UserError, match=f"{field}=0"):
        Hourglass(**{field: 0})
