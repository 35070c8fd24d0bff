"""One step is a pure function of state and batch, and a bad batch changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.config import base, model_of
from attnlab.optimizer import make_optimizer
from attnlab.overrides import override
from attnlab.step import init_params, init_state, make_step

VOCAB = 19
SMALL = (
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "model.kv_heads=2",
    "optimizer.warmup=0",
)


def small(*changes):
    config = base()
    for change in (*SMALL, *changes):
        override(config, *change.split("="))
    return config


def make_batch(seed=0, rows=8, length=12):
    """Rows of which some are partly empty, so that the parts of a batch differ in tokens."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(6, VOCAB, (rows, length + 1), dtype=np.int32)
    full = np.arange(length) < draw.integers(1, length + 1, (rows, 1))
    pos = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "pos": pos}
    return batch | {"seg": np.where(full, 1, -1).astype(np.int32)}


def start(config, optimizer=None):
    """(state, compiled step) of a config."""
    model = model_of(config, VOCAB)
    optimizer = optimizer or make_optimizer(config.optimizer, 100)
    return init_state(model, optimizer, config), jax.jit(make_step(model, optimizer, config))


def assert_bitwise(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_loss_and_gradient_of_the_whole_batch(parts):
    after = []
    for accumulate in (1, parts):
        # With this optimizer the new parameters are the old ones minus the gradient.
        state, step = start(small(f"optimizer.accumulate={accumulate}"), optax.sgd(1.0))
        after.append(step(state, make_batch()))
    (whole, loss), (split, sum_of_losses) = after
    np.testing.assert_allclose(loss["loss"], sum_of_losses["loss"], rtol=1e-6)
    np.testing.assert_allclose(loss["grad_norm"], sum_of_losses["grad_norm"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.params, split.params
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_that_gives_nan_changes_nothing_but_the_count(parts):
    config = small("model.tied=false", "optimizer.ema=0.9", f"optimizer.accumulate={parts}")
    state, step = start(config)
    state, _ = step(state, make_batch(1))
    embedding = state.params["backbone"]["embedding"]["embedding"]
    state.params["backbone"]["embedding"]["embedding"] = embedding.at[5].set(jnp.inf)
    bad = make_batch(2)
    bad["tokens"][3, 0] = 5
    after, metrics = step(state, bad)
    assert not metrics["finite"]
    assert_bitwise(after._replace(step=state.step), state)
    assert int(after.step) == int(state.step) + 1
    _, metrics = step(after, make_batch(2))  # without the poisoned token all is well
    assert metrics["finite"]


def test_the_average_follows_its_formula():
    config = small("optimizer.ema=0.25")
    state, step = start(config)
    expected = jax.tree.map(np.asarray, state.average)
    assert_bitwise(state.average, state.params)
    for i in range(4):
        state, _ = step(state, make_batch(i))
        rate = min(0.25, (1 + i) / (10 + i))
        expected = jax.tree.map(
            lambda a, p, rate=rate: rate * a + (1 - rate) * np.asarray(p), expected, state.params
        )
    assert rate == 0.25
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.average, expected)
    assert state.evaluated is state.average
    assert start(small())[0].evaluated != ()


def test_what_is_random_depends_on_seed_and_step_only():
    params = init_params(model_of(small(), VOCAB), 0)

    def losses(seed, *steps):
        state, step = start(small("model.dropout=0.5", f"seed={seed}"))
        states = (state._replace(params=params, step=jnp.int32(at)) for at in steps)
        return [float(step(state, make_batch())[1]["loss"]) for state in states]

    third, fourth, again = losses(0, 3, 4, 3)
    assert third == again
    assert len({third, fourth, *losses(1, 3)}) == 3


def test_an_empty_batch_is_no_division_by_zero():
    state, step = start(small())
    empty = make_batch()
    empty["seg"][:] = -1
    after, metrics = step(state, empty)
    assert float(metrics["loss"]) == 0
    assert metrics["finite"]
    assert all(bool(jnp.all(jnp.isfinite(z))) for z in jax.tree.leaves(after.params))


@pytest.mark.slow
def test_the_state_may_be_donated():
    config = small("optimizer.ema=0.9")
    model, optimizer = model_of(config, VOCAB), make_optimizer(config.optimizer, 100)
    plain = jax.jit(make_step(model, optimizer, config))
    donating = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    a, b = (init_state(model, optimizer, config) for _ in range(2))
    for i in range(3):
        old = b
        a, b = plain(a, make_batch(i))[0], donating(b, make_batch(i))[0]
        assert jax.tree.leaves(old.params)[0].is_deleted()
    assert_bitwise(a, b)
