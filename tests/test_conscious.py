"""A bottleneck of few elements: what is read, by whom, and how the choice learns."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, evaluate, outputs
from battery.cases import DIMS, Case, draw

from attnlab.engines import ranks
from attnlab.errors import UserError
from attnlab.mechanisms.conscious import Conscious, Gradient
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.none import NoPosition

MODES: tuple[Gradient, ...] = ("masked", "straight_through")
LENGTH, ELEMENTS = 32, 3
ONE_HEAD = DIMS._replace(heads=1, kv_heads=1)


def case_of(gradient: Gradient, elements: int = ELEMENTS) -> Case:
    return Case(Conscious(elements, gradient), NoPosition())


def telling(case: Case, dims=DIMS):
    """Inputs of one row whose values tell tokens apart: the first 32 entries of an output are the
    weights themselves."""
    inputs = draw(case, batch=1, dims=dims._replace(value_dim=40))
    inputs.v[..., :LENGTH] = np.eye(LENGTH)[None, :, None]
    return inputs


def logits(inputs) -> np.ndarray:
    """z [H N M] of the only row, -inf for later keys."""
    q, k = inputs.q[0], np.repeat(inputs.k[0], inputs.q.shape[2] // inputs.k.shape[2], 1)
    z = np.einsum("nhd,mhd->hnm", q, k) / 8**0.5
    return np.where(np.tri(LENGTH, dtype=bool), z, -np.inf)


def elements(inputs, number: int = ELEMENTS) -> list[np.ndarray]:
    """The keys that every query reads, by the equations."""
    total = logits(inputs).sum(0)
    return [np.sort(np.argsort(-total[i])[: min(number, i + 1)]) for i in range(LENGTH)]


@pytest.mark.parametrize("gradient", MODES)
def test_all_heads_read_the_same_elements_each_with_its_own_softmax(gradient):
    case = case_of(gradient)
    inputs = telling(case)
    weights, z = np.asarray(outputs(case, inputs))[0, ..., :LENGTH], logits(inputs)
    for i, wanted in enumerate(elements(inputs)):
        for h in range(DIMS.heads):
            np.testing.assert_array_equal(np.flatnonzero(weights[i, h]), wanted)
            p = np.exp(z[h, i, wanted])
            assert_close(weights[i, h, wanted], p / p.sum())


@pytest.mark.parametrize("gradient", MODES)
def test_one_element_is_hard_attention(gradient):
    case = case_of(gradient, 1)
    inputs = draw(case, batch=1, dims=ONE_HEAD)
    best = logits(inputs)[0].argmax(-1)
    np.testing.assert_array_equal(outputs(case, inputs)[0, :, 0], inputs.v[0, best, 0])


@pytest.mark.parametrize("gradient", MODES)
def test_as_many_elements_as_keys_is_softmax_with_its_gradients(gradient):
    inputs, cotangent = draw(case_of(gradient)), np.ones((2, LENGTH, 4, 8), np.float32)
    run = jax.jit(evaluate, static_argnums=0)
    wanted = run(Case(Softmax(), NoPosition()), inputs, cotangent)
    assert_close(run(case_of(gradient, LENGTH), inputs, cotangent), wanted)
    few, _ = run(case_of(gradient), inputs, cotangent)
    assert np.max(np.abs(few - wanted[0])) > 0.1


@pytest.mark.parametrize("gradient", MODES)
def test_nothing_but_its_elements_reaches_an_output(gradient):
    """Values of all others are replaced, and their keys by others that stay behind."""
    case = case_of(gradient)
    inputs = draw(case, batch=1, dims=ONE_HEAD)
    last = np.asarray(outputs(case, inputs))[0, -1]
    others = np.setdiff1d(np.arange(LENGTH), elements(inputs)[-1])
    k, v = inputs.k.copy(), inputs.v.copy()
    k[0, others] = -inputs.q[0, -1, 0] * np.arange(1, len(others) + 1)[:, None, None]
    v[0, others] *= 1e6
    np.testing.assert_array_equal(outputs(case, inputs._replace(k=k, v=v))[0, -1], last)
    v[0, elements(inputs)[-1][0]] += 1
    assert np.any(outputs(case, inputs._replace(k=k, v=v))[0, -1] != last)


def slopes(case: Case, inputs, row: int = LENGTH - 1):
    """Gradients of q, k, v of a random sum over what one query reads."""
    cotangent = np.zeros((*inputs.q.shape[:3], inputs.v.shape[-1]), np.float32)
    cotangent[0, row] = np.random.default_rng(0).standard_normal(cotangent.shape[2:])
    gradient = jax.jit(evaluate, static_argnums=0)(case, inputs, cotangent)[1]
    return [np.asarray(z) for z in gradient[1:4]]


def test_masked_keys_that_were_not_chosen_learn_nothing():
    case = case_of("masked")
    inputs = draw(case, batch=1)
    chosen = np.isin(np.arange(LENGTH), elements(inputs)[-1])
    q, k, v = slopes(case, inputs)
    assert np.any(q)
    for z in (k, v):
        assert not np.any(z[0, ~chosen])
        assert np.all(np.any(z[0, chosen], (1, 2)))


def test_straight_through_the_logits_learn_as_those_of_dense_attention_do():
    """The weights' own gradient is that of softmax over all keys; values learn from what was
    read."""
    case = case_of("straight_through")
    inputs = draw(case, batch=1)
    chosen = np.isin(np.arange(LENGTH), elements(inputs)[-1])
    q, k, v = slopes(case, inputs)
    dense = slopes(Case(Softmax(), NoPosition()), inputs)
    assert_close([q, k], dense[:2])
    assert np.all(np.any(k[0], (1, 2)))
    assert not np.any(v[0, ~chosen])
    assert np.all(np.any(v[0, chosen], (1, 2)))
    _, _, masked = slopes(case_of("masked"), inputs)
    assert_close(v, masked)


def test_the_gradient_is_the_slope_where_the_choice_does_not_change():
    """Central differences of what the last query reads, in a row whose m-th and next sums of
    logits lie apart by more than the steps move them."""
    case = case_of("masked")
    inputs = draw(case, batch=1)
    total = np.sort(logits(inputs).sum(0)[-1])
    assert total[-ELEMENTS] - total[-ELEMENTS - 1] > 0.1
    cotangent = np.zeros((1, LENGTH, 4, 8), np.float32)
    cotangent[0, -1] = np.random.default_rng(0).standard_normal((4, 8))
    along = np.random.default_rng(1).standard_normal(inputs.k.shape).astype(np.float32)
    step = np.float32(2e-3)

    def value(sign: int) -> float:
        moved = inputs._replace(k=inputs.k + sign * step * along)
        return float(np.sum(np.asarray(outputs(case, moved), np.float64) * cotangent))

    slope = (value(1) - value(-1)) / (2 * float(step))
    assert slope == pytest.approx(float(np.sum(slopes(case, inputs)[1] * along)), rel=2e-2)


def test_one_masked_element_leaves_nothing_to_learn_for_the_logits():
    for gradient in MODES:
        case = case_of(gradient, 1)
        q, k, v = slopes(case, draw(case, batch=1))
        assert np.any(v)
        assert np.any(q) == np.any(k) == (gradient == "straight_through")


@pytest.mark.parametrize("form", ["fast", "reference"])
def test_of_equal_keys_the_first_are_read(form):
    case = case_of("masked")
    inputs = telling(case)
    inputs = inputs._replace(q=0 * inputs.q)
    weights = np.asarray(outputs(case, inputs, form))[0, ..., :LENGTH]
    for i in range(LENGTH):
        wanted = np.zeros(LENGTH)
        wanted[: min(i + 1, ELEMENTS)] = 1 / min(i + 1, ELEMENTS)
        assert_close(weights[i], np.tile(wanted, (4, 1)))


@pytest.mark.parametrize("k", [1, 2, 7, 20, 99])
def test_the_largest_are_exactly_as_many_as_asked_for(k):
    """Against a stable sort, with many ties, signed zeros and masked entries among them."""
    z = np.round(np.random.default_rng(k).standard_normal((50, 20)), 0).astype(np.float32)
    z[:, ::3] *= -1
    z[10:, 15:] = -1e30
    assert np.any(np.signbit(z[z == 0]))
    assert not np.all(np.signbit(z[z == 0]))
    got = np.asarray(jax.jit(ranks.largest, static_argnums=1)(jnp.asarray(z), k))
    order = np.argsort(-z, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(got, np.any(order[..., None] == np.arange(20), 1))


def test_a_head_that_does_not_care_follows_the_others():
    """A head with queries of 0 reads the mean of the elements that the others chose."""
    case = case_of("masked")
    inputs = telling(case)
    q = inputs.q.copy()
    q[:, :, 0] = 0
    inputs = inputs._replace(q=q)
    weights = np.asarray(outputs(case, inputs))[0, ..., :LENGTH]
    for i, wanted in enumerate(elements(inputs)):
        assert_close(weights[i, 0], np.isin(np.arange(LENGTH), wanted) / len(wanted))


@pytest.mark.parametrize("fields", [{"elements": 0}, {"gradient": "gumbel"}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(UserError, match="conscious"):
        replace(Conscious(), **fields)
