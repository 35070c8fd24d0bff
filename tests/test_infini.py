"""Infini-attention: what the matrix recalls, exactly."""

import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, draw
from battery.continuation import step

from attnlab.core import Rule
from attnlab.engines import dense, segments
from attnlab.errors import UserError
from attnlab.mechanisms.infini import Infini
from attnlab.mechanisms.infini_delta import InfiniDelta
from attnlab.positions.none import NoPosition

ALL = (Infini(segment=4), Infini(segment=4, update="delta"), InfiniDelta(segment=4))


def case_of(mechanism) -> Case:
    return Case(mechanism, NoPosition())


def gated(inputs, value: float):
    """``inputs`` with every gate at sigmoid(value)."""
    return inputs._replace(
        params=({"gate": np.full(DIMS.heads, value, np.float32)}, *inputs.params[1:])
    )


def keyed(inputs, numbers):
    """Token i has the key and the query of number ``numbers[i]``, whose features are one-hot."""
    hot = np.eye(DIMS.key_dim, dtype=np.float32)[np.asarray(numbers)]
    features = np.where(hot, 0, -60).astype(np.float32)[None, :, None]
    return inputs._replace(
        q=np.broadcast_to(features, inputs.q.shape), k=np.broadcast_to(features, inputs.k.shape)
    )


@pytest.mark.parametrize("mechanism", ALL, ids=repr)
def test_a_closed_gate_is_attention_inside_blocks(mechanism):
    case = case_of(mechanism)
    inputs = gated(draw(case), -np.inf)
    rule = Rule().restrict(segments.own(4))
    wanted, *_ = dense.attend(inputs.queries(), inputs.keys(), rule)
    assert_close(outputs(case, inputs), wanted)


@pytest.mark.parametrize("mechanism", ALL, ids=repr)
def test_an_open_gate_retrieves_orthogonal_keys_exactly(mechanism):
    """T5: eight keys in two segments, asked for in the third in another order."""
    case = case_of(mechanism)
    order = [3, 1, 7, 4]
    inputs = keyed(gated(draw(case, length=12), np.inf), [*range(8), *order])
    got = np.asarray(outputs(case, inputs))[:, 8:]
    assert_close(got, np.repeat(inputs.v[:, order], DIMS.heads // DIMS.kv_heads, 2))


@pytest.mark.parametrize("mechanism", ALL, ids=repr)
def test_the_first_segment_is_local_whatever_the_gate(mechanism):
    case = case_of(mechanism)
    inputs = draw(case)
    opened, closed = (np.asarray(outputs(case, gated(inputs, g))) for g in (np.inf, -np.inf))
    np.testing.assert_array_equal(opened[:, :4], closed[:, :4])
    assert np.all(np.any(opened[:, 4:] != closed[:, 4:], (2, 3)))


@pytest.mark.parametrize(("mechanism", "wanted"), list(zip(ALL, (2.0, 1.5, 3.0))), ids=repr)
def test_a_key_written_again_in_a_later_segment(mechanism, wanted):
    """T6: 1, then 3. Linear recalls the mean, the published delta half the new value, since its
    normaliser has grown with the second write; the one that overwrites recalls 3."""
    case = case_of(mechanism)
    inputs = gated(draw(case, length=9), np.inf)
    inputs = keyed(inputs, [0, 1, 2, 3, 0, 4, 5, 6, 0])
    v = np.zeros_like(inputs.v)
    v[:, 0], v[:, 4] = 1, 3
    got = np.asarray(outputs(case, inputs._replace(v=v)))[:, 8]
    assert_close(got, np.full_like(got, wanted))


def test_the_last_of_equal_keys_in_one_segment_wins():
    case = case_of(InfiniDelta(segment=4))
    inputs = keyed(gated(draw(case, length=5), np.inf), [0, 0, 1, 0, 0])
    got = np.asarray(outputs(case, inputs))[:, 4]
    assert_close(got, np.repeat(inputs.v[:, 3], DIMS.heads // DIMS.kv_heads, 1))


@pytest.mark.parametrize("mechanism", ALL, ids=repr)
def test_the_memory_is_f32_and_does_not_saturate(mechanism):
    """A thousand equal keys in bf16, each of value 1: the count is exact, where bf16 would stop
    growing at 256."""
    case = case_of(mechanism)
    inputs = keyed(draw(case, length=1000), [0] * 1000)
    inputs = inputs._replace(v=np.ones_like(inputs.v)).cast(jnp.bfloat16)
    state = mechanism.initial_state(DIMS, 2, jnp.bfloat16)
    out, state = step(case, inputs, inputs.keys(), state)
    assert out.dtype == jnp.bfloat16
    assert state.past.dtype == state.now.dtype == jnp.float32
    np.testing.assert_array_equal((state.past + state.now)[:, :, 0, -1], 1000)


def test_gates_start_mostly_local():
    for mechanism in (Infini(), InfiniDelta()):
        gate = mechanism.init(None, DIMS)["gate"]
        assert gate.shape == (DIMS.heads,)
        assert np.all(1 / (1 + np.exp(-np.asarray(gate))) < 0.2)


def test_fields_without_meaning_are_refused():
    for mechanism in (Infini, InfiniDelta):
        with pytest.raises(UserError, match="segment=0"):
            mechanism(segment=0)
    with pytest.raises(UserError, match="did you mean 'delta'"):
        Infini(update="detla")
