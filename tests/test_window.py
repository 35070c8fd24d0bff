"""The window: exactly so far and no further, in a state of constant size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, documents, draw
from battery.continuation import extend, step

from attnlab.core import Rule
from attnlab.errors import UserError
from attnlab.mechanisms.window import Near, Window
from attnlab.model import Architecture, Backbone
from attnlab.positions.none import NoPosition


def case_of(window, sinks=0, causal=True):
    return Case(Window(window, sinks), NoPosition(), causal)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_receptive_field_of_L_layers_is_exactly_L_times_window_minus_one(layers):
    """Gradient of the last hidden state with respect to the embedding of each place."""
    window, N = 4, 20
    sizes = Architecture(width=16, layers=layers, heads=2, kv_heads=1, head_dim=8, mlp_width=16)
    backbone = Backbone(sizes, N, (Window(window),) * layers, NoPosition())
    places = np.arange(N, dtype=np.int32)[None]  # one row of the embedding for each

    def gradient(key):
        params = backbone.init(key, places, places, places * 0)

        def last(params):
            hidden, _ = backbone.apply(params, places, places, places * 0)
            return jnp.sum(jnp.sin(hidden[0, -1]))

        return jax.grad(last)(params)["params"]["embedding"]["embedding"]

    rows = jax.jit(gradient)(jax.random.key(0))
    reached = np.flatnonzero(np.any(np.asarray(rows) != 0, 1))
    assert reached.tolist() == list(range(N - 1 - layers * (window - 1), N))


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 0), (3, 2), (8, 1)])
def test_the_state_holds_window_minus_one_and_sinks_whatever_the_length(window, sinks):
    case = case_of(window, sinks)
    state = case.mechanism.initial_state(DIMS, 2)
    for length in (1, 3, 32):
        new = draw(case, length=length)
        _, after = step(case, new, new.keys(), state)
        assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
        needed = {*range(sinks), *range(length - window + 1, length)} & {*range(length)}
        for pos, seg in zip(after.pos, after.seg):
            held = np.asarray(pos)[np.asarray(seg) >= 0].tolist()
            assert len(held) == len(set(held)) <= window - 1 + sinks
            assert needed <= set(held)


@pytest.mark.parametrize(("window", "sinks"), [(3, 0), (3, 2), (5, 1), (1, 0)])
@pytest.mark.parametrize("pieces", [(1,) * 32, (3, 7, 1, 12, 9)])
def test_decoding_agrees_after_the_ring_has_wrapped_many_times(window, sinks, pieces):
    """32 tokens are more than six windows; documents end inside pieces."""
    case = case_of(window, sinks)
    for rows in (((32,), (32,)), ((9, 23), (1, 2, 29))):
        inputs = documents(draw(case), *rows)
        assert_close(extend(case, inputs, pieces), outputs(case, inputs, "reference"))


def test_a_new_document_forgets_the_old_one_and_its_sinks():
    case = case_of(4, sinks=2)
    old, new = draw(case, length=16), draw(case, length=16, seed=1)
    new = new._replace(seg=new.seg + 1)
    state = case.mechanism.initial_state(DIMS, 2)
    fresh, _ = step(case, new, new.keys(), state)
    _, state = step(case, old, old.keys(), state)
    after, state = step(case, new, new.keys(), state)
    assert_close(after, fresh)
    assert set(np.unique(state.seg)) <= {-1, 1}


def test_sinks_stay_visible_and_nothing_between_does():
    """Of 20 tokens the last sees 0, 1 and 17, 18, 19: by which values move its output."""
    case = case_of(3, sinks=2)
    inputs = draw(case, length=20)

    def last(v):
        queries, keys = inputs.queries(), inputs.keys()._replace(v=v)
        return jnp.sum(case.mechanism({}, queries, keys, Rule()).out[:, -1])

    moved = jax.jit(jax.grad(last))(inputs.v)
    assert np.flatnonzero(np.any(np.asarray(moved) != 0, (0, 2, 3))).tolist() == [0, 1, 17, 18, 19]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 2), (5, 0), (7, 3), (64, 2)])
@pytest.mark.parametrize("length", [1, 2, 6, 7, 24])
def test_flops_count_every_visible_pair_once(window, sinks, length, causal):
    """A sink inside the window is one key, not two."""
    tokens = draw(case_of(window), batch=1, length=length)
    rule = Rule(causal=causal).restrict(Near(window, sinks))
    pairs = int(np.sum(rule.allowed(tokens.queries(), tokens.keys())))
    per_pair = 2 * DIMS.heads * (DIMS.key_dim + DIMS.value_dim)
    assert Window(window, sinks).flops(DIMS, length, causal) == per_pair * pairs


def test_a_bidirectional_window_sees_as_far_on_both_sides():
    inputs = draw(case_of(3), batch=1)
    seen = Rule(causal=False).restrict(Near(3)).allowed(inputs.queries(), inputs.keys())
    i, j = np.indices(seen.shape[1:])
    np.testing.assert_array_equal(seen[0], abs(i - j) < 3)


@pytest.mark.parametrize("fields", [{"window": 0}, {"window": -1}, {"sinks": -1}])
def test_a_window_that_sees_nothing_is_refused(fields):
    with pytest.raises(UserError, match="window"):
        Window(**fields)
