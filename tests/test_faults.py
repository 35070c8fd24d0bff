"""The test of the test: each check fails on a mechanism with the fault it is there for."""

from dataclasses import replace

import pytest
from battery import (
    agreement,
    causality,
    continuation,
    cost,
    experiment,
    faults,
    isolation,
    taps,
    transforms,
    weighing,
)
from battery.cases import Case, small
from battery.faults import Absolutist, Boastful, Deaf, Faulty, Forgetful, Narrow, Refusing, Unequal
from battery.refusal import refusal, verify

from attnlab.core import positions

CAUGHT = (
    (faults.looks_ahead, causality.check_causality),
    (faults.looks_ahead, causality.check_model_causality),
    (faults.normalises_over_all, causality.check_causality),
    (faults.adds_global_mean, causality.check_causality),
    (faults.ranks_among_all, causality.check_causality),
    (faults.halves_gradient, agreement.check_reference),
    (faults.forgets_own_input, agreement.check_reference),
    (faults.forgets_own_input, experiment.check_learning),
    (faults.rounds_off, agreement.check_reference),
    (faults.widens, agreement.check_low_precision),
    (faults.drops_remainder, agreement.check_any_length),
    (faults.tiles_heads, agreement.check_grouped_heads),
    (faults.merges_documents, isolation.check_packing),
    (faults.merges_documents, isolation.check_bidirectional_packing),
    (faults.touches_empty_slots, isolation.check_empty_slots),
    (faults.averages_when_blind, isolation.check_keys_all_hidden),
    (faults.centres_batch, isolation.check_batch_rows),
    (faults.divides_by_batch, transforms.check_transforms),
    (faults.divides_by_batch, transforms.check_pmap),
    (faults.ignores_taps, taps.check_head_ablation),
    (faults.ignores_taps, taps.check_observation),
    (faults.counts_from_start, experiment.check_shift),
)

CAUGHT_CLASSES = (
    (Forgetful(window=5), continuation.check_extension),
    (Forgetful(window=5), continuation.check_model_extension),
    (Absolutist(), experiment.check_shift),
    (Narrow(), agreement.check_limit),
    (Boastful(), cost.check_declared_growth),
    (Unequal(), transforms.check_equal_values),
)

FAILURE = (AssertionError, pytest.fail.Exception)


def case_of(mechanism, place="rope"):
    return Case(mechanism, positions.get(place)())


def weighed(mechanism, name):
    return replace(case_of(mechanism), normaliser=small(name))


def name_of(thing):
    return getattr(thing, "__name__", type(thing).__name__).removeprefix("check_")


@pytest.mark.parametrize(("fault", "check"), CAUGHT, ids=name_of)
def test_a_fault_is_caught(fault, check):
    with pytest.raises(FAILURE):
        check(case_of(Faulty(fault=fault)))


@pytest.mark.parametrize(("mechanism", "check"), CAUGHT_CLASSES, ids=name_of)
def test_a_faulty_class_is_caught(mechanism, check):
    with pytest.raises(FAILURE):
        check(case_of(mechanism))


@pytest.mark.parametrize("check", dict.fromkeys(check for _, check in CAUGHT), ids=name_of)
def test_the_sound_control_passes(check):
    check(case_of(Faulty()))


@pytest.mark.parametrize("name", ["ssmax", "sparsemax"])
@pytest.mark.parametrize("deaf", [Faulty(fault=faults.ignores_normaliser), Deaf()], ids=name_of)
def test_a_normaliser_that_is_ignored_is_caught(deaf, name):
    with pytest.raises(FAILURE):
        verify(weighing.check_weighing, weighed(deaf, name))


@pytest.mark.parametrize("name", ["ssmax", "sparsemax"])
def test_the_sound_control_hosts_every_normaliser(name):
    weighing.check_weighing(weighed(Faulty(), name))


@pytest.mark.parametrize("fault", [faults.refuses_without_a_name, faults.refuses_everything])
def test_a_refusal_must_name_both_and_leave_something(fault):
    with pytest.raises(FAILURE):
        verify(agreement.check_reference, case_of(Refusing(fault=fault)))


def test_a_refusal_must_come_from_both_forms():
    with pytest.raises(FAILURE):
        verify(agreement.check_reference, case_of(Faulty(fault=faults.refuses_bias), "alibi"))


def test_a_named_refusal_stands_for_the_promise():
    refusing = Refusing(fault=faults.refuses_bias)
    assert "alibi" in refusal(case_of(refusing, "alibi"))
    assert refusal(case_of(refusing, "rope")) is None
    verify(agreement.check_reference, case_of(refusing, "alibi"))
