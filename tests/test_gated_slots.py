"""Gated slots: means with an exponential memory, read as keys are."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, draw

from attnlab.errors import UserError
from attnlab.mechanisms.gated_slots import GatedSlots
from attnlab.positions.none import NoPosition


def test_it_is_the_recurrence_of_its_paper():
    """Slot by slot and token by token: K̃ ← α K̃ + (1 − α) kᵀ, and so for values."""
    case = Case(GatedSlots(slots=3, damping=2.0, chunk=8), NoPosition())
    inputs = draw(case, batch=1)
    got, gate = outputs(case, inputs), inputs.params[0]["gate"]
    for h in range(DIMS.heads):
        g = h * DIMS.kv_heads // DIMS.heads
        keys, values = np.zeros((3, DIMS.key_dim)), np.zeros((3, DIMS.value_dim))
        for t in range(inputs.q.shape[1]):
            alpha = (1 / (1 + np.exp(-inputs.x[0, t] @ gate[:, g]))) ** 0.5
            keys = alpha[:, None] * keys + np.outer(1 - alpha, inputs.k[0, t, g])
            values = alpha[:, None] * values + np.outer(1 - alpha, inputs.v[0, t, g])
            z = keys @ inputs.q[0, t, h] / DIMS.key_dim**0.5
            p = np.exp(z - z.max())
            assert_close(got[0, t, h], p / p.sum() @ values)


def test_a_closed_gate_keeps_and_an_open_one_replaces():
    """α = 0 is the newest value alone; α = 1 never writes."""
    case = Case(GatedSlots(slots=3, chunk=8), NoPosition())
    inputs = draw(case)._replace(x=np.ones((2, 32, DIMS.width), np.float32))

    def with_gate(value):
        gate = np.full_like(inputs.params[0]["gate"], value)
        return outputs(case, inputs._replace(params=({"gate": gate}, inputs.params[1])))

    newest = np.repeat(inputs.v, DIMS.heads // DIMS.kv_heads, 2)
    assert_close(with_gate(-1e4), newest)
    assert not np.any(with_gate(1e4))


@pytest.mark.parametrize("fields", [{"slots": 0}, {"damping": 0.0}, {"chunk": 0}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(UserError, match="gated_slots"):
        GatedSlots(**fields)
