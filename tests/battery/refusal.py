"""A combination without meaning is refused, early and by name, or it must keep every promise."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import jax
import pytest

from attnlab.core import positions
from battery.calls import cotangent_of, evaluate, outputs
from battery.cases import SOFTMAX, Case, bidirectional, draw, key_of


def verify(check: Callable[[Case], None], case: Case) -> None:
    """``check(case)``; where the mechanism refuses the case, the refusal itself is checked, and
    then the promise with rope, in the other direction, or both: the first that is accepted."""
    message = refusal(case)
    if message is None:
        return check(case)
    check_refusal(case, message)
    rope = replace(case, position=positions.get("rope")())
    others = [rope]
    if not getattr(check, "causal_only", False):
        others += [replace(z, causal=not case.causal) for z in (case, rope)]
    for other in others:
        if refusal(other) is None:
            return check(other)
    return None


def causal_only(check):
    """Marks a promise that has no meaning without an order of time."""
    check.causal_only = True
    return check


@lru_cache
def refusal(case: Case) -> str | None:
    """The one line with which the mechanism refuses this case, or None."""
    try:
        outputs.eval_shape(case, draw(case))  # traced once, for the checks that call it too
    except ValueError as error:
        return str(error)
    return None


def check_refusal(case: Case, message: str) -> None:
    """Both forms refuse with the same single line, which names the mechanism and the thing it
    cannot be combined with; and some case of the mechanism is accepted."""
    assert "\n" not in message
    assert key_of(case.mechanism) in message, message
    unusual = [case.weighing] * (case.normaliser != SOFTMAX)
    named = (case.place, "causal" if case.causal else "bidirectional", *unusual)
    assert any(word in message for word in named), f"{message!r} names none of {named}"
    for form in ("fast", "reference"):
        inputs = draw(case)
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
            jax.eval_shape(lambda z, form=form: evaluate(case, z, cotangent_of(z), form), inputs)
        assert str(error.value) == message
    plain = Case(case.mechanism, positions.get("none")())
    accepted = [c for c in (plain, bidirectional(plain)) if refusal(c) is None]
    assert accepted, f"{key_of(case.mechanism)} refuses everything"
