"""Recurrent memory: a few slots, rewritten after every segment."""

import jax
import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, draw

from attnlab.core import Rule
from attnlab.engines import dense, segments
from attnlab.errors import UserError
from attnlab.mechanisms.recurrent_memory import RecurrentMemory
from attnlab.positions.rope import Rope


def case_of(segment: int, slots: int) -> Case:
    return Case(RecurrentMemory(segment, slots), Rope())


def test_no_slots_are_attention_inside_blocks():
    """T5."""
    case = case_of(6, 0)
    inputs = draw(case)
    rule = Rule(position=Rope()).restrict(segments.own(6))
    wanted, *_ = dense.attend(inputs.queries(), inputs.keys(), rule)
    assert_close(outputs(case, inputs), wanted)


def test_the_slots_carry_what_is_many_segments_back():
    """Every later token depends on the first, through five rewritings; its own segment aside, no
    token depends on the last token of a segment before that segment is over."""
    case = case_of(5, 2)
    inputs = draw(case, batch=1, length=30)
    before = np.asarray(outputs(case, inputs))
    for j in (0, 9):
        v = inputs.v.copy()
        v[:, j] += 1
        moved = np.any(np.asarray(outputs(case, inputs._replace(v=v))) != before, (0, 2, 3))
        assert moved.tolist() == [i >= j for i in range(30)]


@pytest.mark.slow
def test_slots_are_rewritten_from_where_they_start_not_from_what_they_were():
    """Closed writing (W = 0): every segment reads the learned slots again."""
    case = case_of(4, 3)
    inputs = draw(case, length=12)
    (params, *rest) = inputs.params
    params = params | {name: 0 * params[name] for name in ("to_key", "to_value")}
    closed = inputs._replace(params=(params, *rest))
    alone = closed.tokens(lambda z: z[:, 8:])
    assert_close(np.asarray(outputs(case, closed))[:, 8:], outputs(case, alone))


def test_segments_count_from_the_first_token_that_was_seen():
    """A document that is entered in its middle, as an evaluation window does."""
    case = case_of(5, 2)
    inputs = draw(case)
    later = inputs._replace(pos=inputs.pos + 3)
    assert_close(outputs(case, later), outputs(case, inputs))


def test_parameters_have_the_declared_shapes():
    params = RecurrentMemory(segment=8, slots=5).init(jax.random.key(0), DIMS)
    H, G, D, E = DIMS.heads, DIMS.kv_heads, DIMS.key_dim, DIMS.value_dim
    assert jax.tree.map(np.shape, params) == {
        "key": (5, G, D),
        "value": (5, G, E),
        "query": (5, H, D),
        "to_key": (H, E, G, D),
        "to_value": (H, E, G, E),
    }
    assert RecurrentMemory(slots=0).init(jax.random.key(0), DIMS) == {}


@pytest.mark.parametrize("fields", [{"segment": 0}, {"slots": -1}])
def test_sizes_without_meaning_are_refused(fields):
    with pytest.raises(UserError, match="recurrent_memory"):
        RecurrentMemory(**fields)
