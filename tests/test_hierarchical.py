"""Levels: a partition of what is visible, exact where keys do not vary, sharper with the block."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from battery.calls import assert_close, quick_outputs
from battery.cases import Case, documents, draw
from battery.covering import check_covered

from attnlab.errors import UserError
from attnlab.mechanisms.hierarchical import Hierarchical, Neighbours
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.none import NoPosition

CASE = Case(Hierarchical(4), NoPosition())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [2, 4, 6, 12, 32])
def test_a_uniform_query_sees_every_token_once(block, causal):
    check_covered(replace(CASE, mechanism=Hierarchical(block), causal=causal))


@pytest.mark.parametrize("causal", [True, False])
def test_values_of_1_give_1_whatever_is_asked(causal):
    """In packed documents of odd lengths, and 0 in empty slots."""
    case = replace(CASE, causal=causal)
    inputs = documents(draw(case), (13, 14), (20,))
    ones = inputs._replace(v=np.ones_like(inputs.v))
    full = np.broadcast_to(inputs.seg[..., None, None] >= 0, inputs.q.shape)
    assert_close(quick_outputs(case, ones), full)


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


@pytest.mark.parametrize("size", [4, 8, 12])
def test_halves_of_blocks_are_reached_if_and_only_if_they_are_seen(size):
    pattern, pos = Neighbours(size), np.arange(6 * size)
    seen = pattern.visible(pos[:, None], pos[None])
    halves = pos.reshape(-1, size // 2)
    for q in halves:
        for k in halves:
            wanted = bool(np.any(seen[q][:, k]))
            assert pattern.reaches(q[0], q[-1], k[0], k[-1]) == wanted


def test_nothing_that_is_seen_is_out_of_reach():
    pattern, pos = Neighbours(8), np.arange(48)
    seen, ends = pattern.visible(pos[:, None], pos[None]), np.arange(0, 48, 3)
    for q_low, q_high, k_low, k_high in itertools.product(ends, repeat=4):
        if q_low < q_high and k_low < k_high and np.any(seen[q_low:q_high, k_low:k_high]):
            assert pattern.reaches(q_low, q_high - 1, k_low, k_high - 1)


@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_block_can_be_halved(block):
    with pytest.raises(UserError, match=f"block={block}"):
        Hierarchical(block)
