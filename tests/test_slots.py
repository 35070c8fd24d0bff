"""Slots: running means of keys and values that are attended to in place of the tokens."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, draw
from battery.continuation import extend

from attnlab.core import MASK
from attnlab.errors import UserError
from attnlab.mechanisms.slots import Slots
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.rope import Rope


def one_hot(length, slots):
    """Inputs x = e_t and weights W such that token t writes to slot t and to no other."""
    case = Case(Slots(slots=slots, chunk=8), Rope())
    dims = DIMS._replace(width=length)
    inputs = draw(case, length=length, dims=dims)
    x = np.broadcast_to(np.eye(length, dtype=np.float32), inputs.x.shape)
    write = np.where(np.eye(length, slots) > 0, np.float32(0), np.float32(MASK))
    write = np.broadcast_to(write[:, None], (length, DIMS.kv_heads, slots))
    return case, inputs._replace(x=x, params=({"write": write}, inputs.params[1]))


def test_a_slot_for_every_token_is_softmax_attention():
    """Rope included: keys are turned where they are written."""
    case, inputs = one_hot(16, 18)
    wanted = outputs(
        Case(Softmax(), Rope()), inputs._replace(params=({}, inputs.params[1])), "reference"
    )
    assert_close(outputs(case, inputs), wanted)
    assert_close(outputs(case, inputs, "reference"), wanted)


def test_one_slot_is_the_weighted_mean_so_far():
    case = Case(Slots(slots=1, chunk=8), Rope())
    inputs = draw(case, batch=1)
    write = np.einsum("nw,wg->ng", inputs.x[0], inputs.params[0]["write"][..., 0])
    weight = np.exp(write)[..., None]
    means = np.cumsum(weight * inputs.v[0], 0) / np.cumsum(weight, 0)
    wanted = np.repeat(means, DIMS.heads // DIMS.kv_heads, 1)[None]
    assert_close(outputs(case, inputs), wanted)


@pytest.mark.slow
def test_writes_of_any_strength_keep_their_digits():
    """Log weights of thousands, and decoding that agrees."""
    case = Case(Slots(slots=3, chunk=8), Rope())
    inputs = draw(case)
    inputs = inputs._replace(x=inputs.x * np.float32(3000))
    wanted = outputs(case, inputs)
    assert_close(wanted, outputs(case, inputs, "reference"))
    assert_close(extend(case, inputs, (16, 16)), wanted)


@pytest.mark.parametrize("fields", [{"slots": 0}, {"chunk": 0}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(UserError, match="slots"):
        Slots(**fields)
