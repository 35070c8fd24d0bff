"""A sink is a key that rows give weight to on average, as dense weights say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny
from weighing import RULES, densely, rule_of, tokens

from attnlab.analysis.margins import build
from attnlab.analysis.observed import OWN
from attnlab.analysis.sinks import importance, measure_sinks
from attnlab.config import model_of
from attnlab.core import Keys, Queries, Rule
from attnlab.data.tokenizers import ByteTokenizer
from attnlab.step import init_params


@pytest.mark.parametrize("name", RULES)
def test_importance_is_the_mean_of_a_column_of_dense_weights(name):
    rule = rule_of(name)
    queries, keys = tokens(23, 29)
    found = importance(queries, keys, rule, tile=8)
    p = np.asarray(densely(queries, keys, rule)).astype(np.float64)
    seen = np.asarray(rule.allowed(queries, keys))[:, None]
    count = np.maximum(seen.sum(2), 1)
    total = p.sum(-1, keepdims=True)
    share = p / np.where(total > 0, total, 1)
    columns = [z.sum(2) / count for z in (p, share)]
    if rule.position.whole:
        order = np.asarray(keys.ordered()[1])[:, None]
        columns = [np.take_along_axis(z, order, -1) for z in columns]
    np.testing.assert_allclose(found.weight, columns[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.share, columns[1], rtol=1e-4, atol=1e-6)


def row(size: int, k: jax.Array) -> tuple[Queries, Keys]:
    """A causal row of one head, in which every query is 1 and the logits are ``k``."""
    pos = jnp.arange(size)[None]
    shape = (1, size, 1, 1)
    return Queries(jnp.ones(shape), pos, 0 * pos), Keys(
        k.reshape(shape), k.reshape(shape), pos, 0 * pos
    )


def test_equal_logits_make_no_sink():
    found = importance(*row(64, jnp.zeros(64)), Rule())
    assert float(found.share[0, 0, 0]) == pytest.approx(0.0741, abs=1e-4)


@pytest.mark.parametrize("place", [0, 1])
def test_all_weight_on_one_key_is_all_of_its_importance(place):
    found = importance(*row(64, jnp.full(64, -50.0).at[place].set(50.0)), Rule())
    assert float(found.share[0, 0, place]) == pytest.approx(1.0)
    assert float(found.share[0, 0, 2:].max()) < 1e-6


def test_a_row_that_gives_little_has_shares_and_no_weight():
    rule = Rule(normaliser=build("sigmoid", 16))
    found = importance(*row(64, jnp.full(64, -50.0).at[0].set(-8.0)), rule)
    assert float(found.share[0, 0, 0]) > 0.99
    assert float(found.weight[0, 0, 0]) < 1e-3


def test_empty_slots_count_nothing():
    queries, keys = row(40, jnp.linspace(-3.0, 3.0, 40))
    short = importance(*row(29, jnp.linspace(-3.0, 3.0, 40)[:29]), Rule())
    empty = jnp.where(jnp.arange(40)[None] < 29, 0, -1)
    found = importance(queries._replace(seg=empty), keys._replace(seg=empty), Rule())
    np.testing.assert_allclose(found.share[..., :29], short.share, rtol=1e-5)
    assert float(jnp.abs(found.share[..., 29:]).max()) == 0


def test_a_model_is_measured_head_by_head():
    config = tiny("model.layers=2", "attention.window.window=4", attention="softmax+window")
    model = model_of(config, ByteTokenizer().vocab_size)
    params = init_params(model, 0)
    tokens = jax.random.randint(jax.random.key(1), (3, 32), 0, 256)
    pos = jnp.broadcast_to(jnp.arange(32), (3, 32))
    seg = jnp.zeros((3, 32), jnp.int32).at[2].set(-1)
    batch = {"tokens": tokens, "pos": pos, "seg": seg}
    rows = measure_sinks(model, params, [batch, batch], epsilon=0.0)
    assert [(r["layer"], r["head"]) for r in rows] == [(l, h) for l in range(2) for h in range(2)]
    assert {r["keys"] for r in rows} == {OWN}
    assert all(r["rows"] == 4 and r["sink"] == 1.0 for r in rows)
    assert all(0 < r["share"] < 1 and r["weight"] == pytest.approx(r["share"]) for r in rows)
    none = measure_sinks(model, params, [batch], epsilon=1.0)
    assert all(r["sink"] == 0.0 for r in none)
