"""FAVOR+: positive features whose products are, on average, the exponential of the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs, quick_outputs
from battery.cases import Case, documents, draw, initial

from attnlab.errors import UserError
from attnlab.mechanisms.favor import Favor, draw_projection
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.none import NoPosition
from attnlab.positions.rope import Rope


def test_rows_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones():
    rows = np.asarray(draw_projection(jax.random.key(0), 20, 8))
    assert rows.shape == (20, 8)
    for block in (rows[:8], rows[8:16], rows[16:]):
        gram = block @ block.T
        assert_close(gram, np.diag(np.diag(gram)))
    many = np.asarray(draw_projection(jax.random.key(1), 4096, 8))
    assert abs(np.mean(np.sum(many**2, 1)) - 8) < 0.3
    assert np.max(np.abs(np.mean(many, 0))) < 0.1, "directions are uniform: no sign is preferred"


@pytest.mark.parametrize("position", [NoPosition(), Rope()], ids=["none", "rope"])
@pytest.mark.slow
def test_the_error_falls_with_the_number_of_features(position):
    """At ‖q‖, ‖k‖ below D^(1/4), sixteen times the features give about a quarter of the error, and
    rope is estimated along with the rest."""
    errors, whole = [], Case(Softmax(), position)
    for features in (16, 256, 4096):
        case = Case(Favor(features=features, chunk=32), position)
        inputs = draw(case)._replace(params=initial(case))
        inputs = inputs._replace(q=inputs.q * 0.5, k=inputs.k * 0.5)
        wanted = quick_outputs(whole, inputs._replace(params=({}, inputs.params[1])), "reference")
        error = np.asarray(quick_outputs(case, inputs) - wanted)
        errors.append(np.linalg.norm(error) / np.linalg.norm(wanted))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.05


@pytest.mark.slow
def test_more_features_help_little_where_norms_are_large():
    """The variance grows as e^(|q + k|²): with vectors eight times as long, sixteen times the
    features still leave more than half of the error."""
    errors, plain = [], Case(Softmax(), NoPosition())
    for features in (64, 1024):
        case = Case(Favor(features=features, chunk=32), NoPosition())
        inputs = draw(case)._replace(params=initial(case))
        inputs = inputs._replace(q=inputs.q * 4, k=inputs.k * 4)
        wanted = quick_outputs(plain, inputs._replace(params=({}, inputs.params[1])), "reference")
        errors.append(np.linalg.norm(np.asarray(quick_outputs(case, inputs) - wanted)))
    assert errors[1] > errors[0] / 2


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_any_chunk_gives_the_literal_form(chunk):
    case = Case(Favor(features=12, chunk=chunk), NoPosition())
    inputs = draw(case)
    assert_close(quick_outputs(case, inputs), quick_outputs(case, inputs, "reference"))


@pytest.mark.parametrize("causal", [True, False])
def test_no_norm_overflows_and_no_row_is_lost(causal):
    """Feature exponents of hundreds: still the weighted mean that the dense form computes."""
    case = Case(Favor(features=12, chunk=8), NoPosition(), causal)
    inputs = documents(draw(case), (13, 14), (20,))
    for q, k in ((1, 1), (10, 10), (30, 1), (1, 30)):
        large = inputs._replace(q=inputs.q * np.float32(q), k=inputs.k * np.float32(k))
        ones = large._replace(v=np.ones_like(large.v))
        full = np.broadcast_to(inputs.seg[..., None, None] >= 0, large.q.shape)
        np.testing.assert_allclose(outputs(case, ones), full, atol=1e-5)
        wanted = outputs(case, large, "reference")
        np.testing.assert_allclose(outputs(case, large), wanted, atol=2e-3)


def test_projections_are_drawn_anew_when_due_and_only_with_a_key():
    case = Case(Favor(features=8, redraw=3), NoPosition())
    inputs = draw(case)._replace(params=initial(case))

    @jax.jit
    def step(statistics, key):
        params, rule = {"statistics": statistics}, case.rule(inputs.params[1])
        result = case.mechanism(params, inputs.queries(), inputs.keys(), rule, key=key)
        return result.aux["statistics"]

    (params, _), seen = inputs.params, []
    statistics = params["statistics"]
    for number in range(7):
        after = step(statistics, jax.random.key(number))
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, statistics)
        seen.append(bool(np.any(after["projection"] != statistics["projection"])))
        statistics = after
    assert seen == [False, False, True, False, False, True, False]
    kept = step(statistics | {"age": jnp.float32(100)}, None)
    np.testing.assert_array_equal(kept["projection"], statistics["projection"])


@pytest.mark.parametrize("fields", [{"features": 0}, {"redraw": -1}, {"chunk": 0}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(UserError, match="favor"):
        Favor(**fields)
