"""Levels: a partition of what is visible, exact where keys do not vary, sharper with the block."""

from dataclasses import replace

import numpy as np
import pytest
from battery.calls import assert_close, quick_outputs
from battery.cases import Case, draw
from battery.covering import check_covered

from attnlab.errors import UserError
from attnlab.mechanisms.hierarchical import Hierarchical
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.none import NoPosition

CASE = Case(Hierarchical(4), NoPosition())


@pytest.mark.parametrize("causal", [True, False])
def test_a_uniform_query_sees_every_token_once(causal):
    check_covered(replace(CASE, mechanism=Hierarchical(2), causal=causal))


@pytest.mark.parametrize("causal", [True, False])
def test_keys_that_are_constant_in_groups_give_softmax(causal):
    case = replace(CASE, causal=causal)
    inputs = draw(case)
    inputs = inputs._replace(k=inputs.k[:, np.arange(32) // 16 * 16])
    wanted = quick_outputs(replace(case, mechanism=Softmax()), inputs, "reference")
    assert_close(quick_outputs(case, inputs), wanted)


def test_the_error_falls_with_the_block_and_is_0_for_two_blocks():
    inputs = draw(CASE, length=64)
    wanted = quick_outputs(replace(CASE, mechanism=Softmax()), inputs, "reference")
    errors = []
    for block in (2, 8, 32):
        got = quick_outputs(replace(CASE, mechanism=Hierarchical(block)), inputs)
        errors.append(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    assert errors[0] > 1.1 * errors[1] > 0.05
    assert errors[2] < 1e-5


@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_block_can_be_halved(block):
    with pytest.raises(UserError, match=f"block={block}"):
        Hierarchical(block)
