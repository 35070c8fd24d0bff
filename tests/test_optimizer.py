"""Schedules, the decay mask, clipping, and that every optimizer lowers a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.config import base, model_of
from attnlab.errors import UserError
from attnlab.optimizer import OPTIMIZERS, is_matrix, learn_only, make_optimizer, make_schedule
from attnlab.overrides import override
from attnlab.step import init_params


def settings(*changes):
    config = base()
    for change in changes:
        override(config, *f"optimizer.{change}".split("="))
    return config.optimizer


def test_the_schedule_climbs_from_zero_to_the_peak_and_falls_to_its_fraction():
    schedule = make_schedule(settings("learning_rate=0.5", "warmup=10", "final_fraction=0.2"), 110)
    rates = [float(schedule(step)) for step in (0, 5, 10, 60, 110, 1000)]
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.3, 0.1, 0.1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (0, 0), (100, 0), (100, 1), (100, 5)])
def test_a_run_shorter_than_its_warm_up_still_has_a_schedule(warmup, steps):
    schedule = make_schedule(settings("learning_rate=0.5", f"warmup={warmup}"), steps)
    rates = [float(schedule(step)) for step in range(max(steps, 1))]
    assert all(0 <= rate <= 0.5 for rate in rates)
    assert max(rates) == pytest.approx(0.5)  # the peak is reached


def test_decay_touches_the_matrices_of_the_layers_and_nothing_else():
    config = base("softmax", "absolute")
    for change in ("model.width=16", "model.layers=1", "model.tied=false"):
        override(config, *change.split("="))
    params = init_params(model_of(config, 19), 0)
    chosen = {
        jax.tree_util.keystr(path): leaf.ndim
        for (path, leaf), yes in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(is_matrix(params))
        )
        if yes
    }
    assert len(chosen) == 4 + 3 + 1  # query key value out, gate up down, head
    assert all(name.endswith("['kernel']") and ndim == 2 for name, ndim in chosen.items())


def test_without_a_gradient_only_matrices_shrink():
    params = {"kernel": jnp.ones((4, 4)), "embedding": jnp.ones((4, 4)), "scale": jnp.ones(4)}
    optimizer = make_optimizer(settings("warmup=0", "learning_rate=0.1", "weight_decay=0.5"), 10)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    assert not jnp.any(updates["embedding"])
    assert not jnp.any(updates["scale"])


def test_the_gradient_is_clipped_by_its_global_norm_and_not_when_clip_is_0():
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    grads = jax.tree.map(lambda z: 100 * z, params)

    def first_moment(clip):
        optimizer = make_optimizer(settings(f"clip={clip}", "b1=0.0"), 10)
        _, state = optimizer.update(grads, optimizer.init(params), params)
        return optax.global_norm(optax.tree_utils.tree_get(state, "mu"))

    assert float(first_moment(2.0)) == pytest.approx(2.0, rel=1e-5)
    assert float(first_moment(0.0)) == pytest.approx(float(optax.global_norm(grads)), rel=1e-5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_lowers_a_loss(name):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(32, 8)), jnp.float32) for _ in range(2))
    params = {
        "layer": {"kernel": jnp.eye(8)},
        "norm": {"scale": jnp.ones(8)},
        "embedding": jnp.zeros((1, 8)),
    }
    optimizer = make_optimizer(settings(f"name={name}", "learning_rate=0.02", "warmup=2"), 40)

    def loss(p):
        return jnp.mean((x * p["norm"]["scale"] @ p["layer"]["kernel"] + p["embedding"] - y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, new = optimizer.init(params), params
    for _ in range(40):
        new, state = step(new, state)
    assert float(loss(new)) < 0.8 * float(loss(params))
    jax.tree.map(
        lambda a, b: pytest.fail("a leaf stood still") if (a == b).all() else None, params, new
    )


def test_muon_moves_matrices_by_a_fifth_of_the_rate_and_the_rest_by_at_most_all_of_it():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.ones((32, 64)), "embedding": jnp.ones((32, 64))}
    grads = jax.tree.map(lambda z: jnp.asarray(rng.normal(size=z.shape), jnp.float32), params)
    optimizer = make_optimizer(
        settings("name=muon", "warmup=0", "weight_decay=0.0", "learning_rate=1.0"), 10
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    sizes = {name: float(jnp.sqrt(jnp.mean(z**2))) for name, z in updates.items()}
    assert sizes["kernel"] == pytest.approx(0.2, rel=0.2)
    assert 0.2 < sizes["embedding"] <= 1.0


def test_an_unknown_optimizer_is_refused_with_the_nearest_name():
    config = settings()
    with config.unlocked():
        config.name = "adam"
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        make_optimizer(config, 10)


def test_what_is_not_learned_stays_and_is_not_clipped_with_the_rest():
    """A frozen gradient of 100 does not shrink the step of the learned one, and weight decay does
    not touch what is frozen."""
    params = {"own": {"kernel": jnp.ones((2, 2))}, "other": {"kernel": jnp.ones((2, 2))}}
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.5))
    optimizer = learn_only(inner, lambda path: "own" in path)
    slopes = {
        "own": {"kernel": jnp.full((2, 2), 0.1)},
        "other": {"kernel": jnp.full((2, 2), 100.0)},
    }
    updates, _ = optimizer.update(slopes, optimizer.init(params), params)
    alone, _ = inner.update(slopes["own"], inner.init(params["own"]), params["own"])
    np.testing.assert_array_equal(updates["own"]["kernel"], alone["kernel"])
    assert jnp.any(alone["kernel"])
    assert not jnp.any(updates["other"]["kernel"])
