"""A normaliser does what it says inside a mechanism, or the mechanism says that it cannot."""

from dataclasses import replace

import numpy as np

from battery.agreement import check_reference
from battery.calls import outputs_and_gradients
from battery.cases import SOFTMAX, Case, draw


def check_weighing(case: Case) -> None:
    """fast == reference with the normaliser, and neither is what softmax gives: nothing is
    accepted and then ignored."""
    check_reference(case)
    plain = replace(case, normaliser=SOFTMAX)
    weighed, _ = outputs_and_gradients(case, draw(case))
    usual, _ = outputs_and_gradients(plain, draw(plain))
    assert np.any(np.abs(weighed - usual) > 1e-3), f"normaliser {case.weighing} has no effect"
