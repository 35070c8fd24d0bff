"""Each group of heads is its mechanism, alone."""

import jax
import numpy as np
import pytest
from battery.calls import DRAWING, assert_close, quick_outputs
from battery.cases import DIMS, Case, draw

from attnlab.combination import greatest
from attnlab.core import positions
from attnlab.engines.head_groups import cut
from attnlab.errors import UserError
from attnlab.mechanisms.han import Han
from attnlab.mechanisms.heads import Heads
from attnlab.mechanisms.infini import Infini
from attnlab.mechanisms.routing import Routing
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.window import Window

PARTS = (Window(5), Softmax())


def call(case, inputs, **more):
    def run(z):
        params, place = z.params
        rule = case.rule(place)
        return case.mechanism(params, z.queries(), z.keys(), rule, x=z.x, **more)

    return jax.jit(run)(inputs)


def test_groups_have_the_kv_heads_that_serve_them():
    assert [g.kv for g in cut((2, 2), 2)] == [(0,), (1,)]
    assert [g.kv for g in cut((1, 3), 1)] == [(0,), (0,)]
    assert [g.kv for g in cut((1, 3), 2)] == [(0,), (0, 1, 1)]  # kv head 0 serves one of each
    assert [g.kv for g in cut((2, 4, 2), 4)] == [(0,), (1, 2), (3,)]
    assert Heads(PARTS).groups(5, 1)[0].size == 3


@pytest.mark.parametrize("place", ["alibi", "transformer_xl"])
def test_a_part_sees_the_slopes_and_parameters_of_its_own_heads(place):
    """One mechanism in all groups is that mechanism, whatever the position does per head."""
    position = positions.get(place)()
    split = Case(Heads((Softmax(),) * 2, sizes=(1, 3)), position)
    inputs = draw(split)
    whole = Case(Softmax(), position)
    same = inputs._replace(params=({}, inputs.params[1]))
    assert_close(call(split, inputs).out, call(whole, same).out)


def test_a_part_that_reads_units_is_told_them_and_no_other():
    case = Case(Heads((Han(), Window(window=5))), positions.get("none")())
    assert case.mechanism.marked
    assert not Case(Heads((Window(), Softmax())), case.position).mechanism.marked
    inputs = draw(case)
    apart = quick_outputs(case, inputs._replace(unit=np.zeros_like(inputs.unit)))
    moved = np.abs(quick_outputs(case, inputs) - apart).max((0, 1, 3)) > 1e-3
    assert moved.tolist() == [True, True, False, False]


def test_the_state_is_compact_where_all_parts_are():
    compact, mixed, whole = Heads((Window(5),) * 2), Heads(PARTS), Heads((Softmax(),) * 2)
    assert set(compact.initial_state(DIMS, 2)) == {"part_0", "part_1"}
    assert not compact.recalls
    assert mixed.recalls
    assert whole.initial_state(DIMS, 2) == ()
    assert not whole.recalls
    assert greatest(PARTS) == mixed.cost == Heads.cost


def test_training_hands_on_the_memory_of_the_parts_that_carry_alone():
    mixed = Heads((Window(5), Infini(segment=8)))
    assert mixed.carries
    assert not Heads(PARTS).carries
    carried = mixed.carried(mixed.initial_state(DIMS, 2))
    assert set(carried) == {"part_1"}
    inputs = draw(Case(mixed, positions.get("none")()))
    after = call(Case(mixed, positions.get("none")()), inputs, state=carried).state
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, carried)


def test_statistics_stand_at_the_top_and_come_back_alike():
    case = Case(Heads((Window(5), Routing(4, 5))), positions.get("none")())
    inputs = draw(case)
    params = inputs.params[0]
    assert set(params["statistics"]) == {"part_1"}
    assert "statistics" not in params["part_1"]
    aux = call(case, inputs, key=jax.random.key(DRAWING)).aux
    shapes = jax.tree.map(np.shape, aux["statistics"])
    assert shapes == jax.tree.map(np.shape, params["statistics"])
    assert float(aux["loss"]) > 0
    assert "part_1_largest_cluster" in aux["stats"]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="sizes=4 for 2 parts"):
        Heads(PARTS, sizes=(4,))
    with pytest.raises(UserError, match=r"model\.heads=4"):
        Heads(PARTS, sizes=(1, 2)).init(jax.random.key(0), DIMS)
    with pytest.raises(UserError, match=r"model\.heads=4"):
        Heads((Softmax(),) * 5).init(jax.random.key(0), DIMS)
