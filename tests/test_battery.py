"""Every registered mechanism keeps every promise with every position; see `battery`."""

import pytest
from battery import (
    agreement,
    causality,
    continuation,
    cost,
    experiment,
    isolation,
    taps,
    transforms,
)
from battery.cases import every, one_each
from battery.refusal import verify

EVERY_PAIR = (agreement.check_reference, causality.check_causality)
"""Checked on all examples with all positions; the rest on all examples with positions in turn,
and on all pairs when slow tests are selected."""

IN_TURN = (
    agreement.check_bidirectional_reference,
    agreement.check_low_precision,
    agreement.check_limit,
    agreement.check_any_length,
    agreement.check_grouped_heads,
    causality.check_model_causality,
    continuation.check_extension,
    continuation.check_model_extension,
    isolation.check_packing,
    isolation.check_bidirectional_packing,
    isolation.check_empty_slots,
    isolation.check_keys_all_hidden,
    isolation.check_batch_rows,
    transforms.check_equal_values,
    transforms.check_transforms,
    transforms.check_pmap,
    transforms.check_sharding,
    taps.check_head_ablation,
    taps.check_observation,
    cost.check_declared_growth,
    experiment.check_learning,
    experiment.check_shift,
    experiment.check_config,
)


def promise(check) -> str:
    return check.__name__.removeprefix("check_")


def cases():
    """All pairs; those that are not taking their turn are left to slow runs."""
    turn = set(one_each())
    return [c if c in turn else pytest.param(c, marks=pytest.mark.slow) for c in every()]


@pytest.mark.parametrize("case", every(), ids=str)
@pytest.mark.parametrize("check", EVERY_PAIR, ids=promise)
def test_every_pair(check, case):
    verify(check, case)


@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("check", IN_TURN, ids=promise)
def test_in_turn(check, case):
    verify(check, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", one_each(), ids=str)
def test_measured_memory(case):
    verify(cost.check_measured_memory, case)
