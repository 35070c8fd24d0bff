"""Every registered mechanism keeps every promise with every position; see `battery`."""

from functools import partial

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
    weighing,
)
from battery.cases import (
    as_shipped,
    first_of_each,
    key_of,
    one_each,
    pairs,
    weighed,
    weighed_in_turn,
)
from battery.refusal import verify

ALWAYS = (
    agreement.check_reference,
    causality.check_causality,
    continuation.check_extension,
)
"""Checked on the first example of every mechanism with the positions in turn, the first one on the
other examples too; the first two also on `HOSTS` with every position, and one of the two on every
other pair when slow tests are selected."""

CHEAP = (
    isolation.check_packing,
    isolation.check_empty_slots,
    isolation.check_batch_rows,
    cost.check_declared_growth,
    cost.check_declared_state,
    experiment.check_config,
)
"""Checked on the first example of every mechanism: they share what `ALWAYS` has compiled."""

TURNS = (
    agreement.check_any_length,
    agreement.check_bidirectional_reference,
    agreement.check_grouped_heads,
    agreement.check_limit,
    agreement.check_low_precision,
    causality.check_model_causality,
    continuation.check_model_extension,
    experiment.check_learning,
    experiment.check_shift,
    isolation.check_bidirectional_packing,
    isolation.check_keys_all_hidden,
    taps.check_head_ablation,
    taps.check_observation,
    transforms.check_equal_values,
    transforms.check_pmap,
    transforms.check_sharding,
    transforms.check_transforms,
)
"""The mechanisms take turns: each check runs on the first example of one in `SHARE` of them. When
slow tests are selected, these and all others run on every example of every mechanism."""

SHARE = 16

WEIGHED = (
    causality.check_causality,
    continuation.check_extension,
    isolation.check_packing,
    isolation.check_empty_slots,
    isolation.check_keys_all_hidden,
    experiment.check_learning,
    experiment.check_shift,
)
"""Shared out among the normalisers of a mechanism, its first example, when slow tests are selected:
every mechanism meets every check, and so does every normaliser."""

HOSTS = ("softmax", "window")
"""The mechanisms with which every position is always checked."""


def promise(check) -> str:
    return check.__name__.removeprefix("check_")


def cases(cases, quick):
    """The cases as parameters; those not in ``quick`` are slow. One worker takes all of a
    mechanism: its checks share what they compile."""
    return [
        pytest.param(
            case,
            id=str(case),
            marks=[pytest.mark.xdist_group(key_of(case.mechanism))]
            + [pytest.mark.slow] * (case not in quick),
        )
        for case in cases
    ]


@pytest.mark.parametrize("case", cases(one_each(), one_each()))
def test_reference(case):
    verify(agreement.check_reference, case)


@pytest.mark.parametrize("case", cases(one_each(), first_of_each()))
@pytest.mark.parametrize("check", [*ALWAYS[1:], *CHEAP], ids=promise)
def test_first(check, case):
    verify(check, case)


def turn(number):
    """The cases whose turn a check is, by its number among `TURNS`."""
    return [c for i, c in enumerate(first_of_each()) if (i + number) % SHARE == 0]


@pytest.mark.parametrize(
    ("check", "case"),
    [
        pytest.param(check, *case.values, id=f"{promise(check)}-{case.id}", marks=case.marks)
        for number, check in enumerate(TURNS)
        for case in cases(one_each(), turn(number))
    ],
)
def test_turns(check, case):
    verify(check, case)


def hosted():
    """The pairs that are always checked."""
    return [c for c in pairs() if key_of(c.mechanism) in HOSTS]


def paired(number):
    """The pairs that a check is done for, by its number among two: those of `HOSTS`, and of the
    others every second one, which is another for the next mechanism."""
    every, always = pairs(), hosted()
    kinds = len(every) // len(first_of_each())
    turns = [(i // kinds + i) % 2 for i in range(len(every))]
    return [case for turn, case in zip(turns, every) if turn == number or case in always]


@pytest.mark.parametrize(
    ("check", "case"),
    [
        pytest.param(check, *case.values, id=f"{promise(check)}-{case.id}", marks=case.marks)
        for number, check in enumerate(ALWAYS[:2])
        for case in cases(paired(number), hosted())
    ],
)
def test_every_pair(check, case):
    verify(check, case)


@pytest.mark.parametrize("case", cases(weighed(), weighed_in_turn()[::6]))
def test_normalisers(case):
    verify(weighing.check_weighing, case)


def share(number):
    """The cases that a check is done for, by its number among `WEIGHED`: one of every mechanism,
    the next normaliser for the next mechanism."""
    every = weighed()
    kinds = len(every) // len(first_of_each())
    turns = [(i // kinds + i) % len(WEIGHED) for i in range(len(every))]
    return [case for turn, case in zip(turns, every) if turn == number]


@pytest.mark.parametrize(
    ("check", "case"),
    [
        pytest.param(check, *case.values, id=f"{promise(check)}-{case.id}", marks=case.marks)
        for number, check in enumerate(WEIGHED)
        for case in cases(share(number), [])
    ],
)
def test_normalisers_further(check, case):
    verify(check, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(first_of_each(), []))
def test_measured_memory(case):
    verify(cost.check_measured_memory, case)


@pytest.mark.parametrize("case", cases(as_shipped(), as_shipped()))
def test_counted_flops(case):
    verify(cost.check_counted_flops, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(as_shipped(), []))
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_counted_flops_at_three_lengths(kv_heads, case):
    for length in cost.LENGTHS:
        verify(partial(cost.check_counted_flops, length=length, kv_heads=kv_heads), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(as_shipped(), []))
def test_counted_gradients(case):
    verify(cost.check_counted_gradient, case)
