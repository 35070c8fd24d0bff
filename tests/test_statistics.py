"""What a mechanism measures is replaced by every step and touched by nothing else."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import VOCAB, assert_bitwise, make_batch, small
from tiny import saved_state, tiny

from attnlab.config import model_of
from attnlab.evaluate import score
from attnlab.optimizer import make_optimizer
from attnlab.plan import describe, estimate_cost
from attnlab.runs import open_run
from attnlab.sharding import batch_sharding, make_mesh, put, state_shardings
from attnlab.statistics import advance, merge, split
from attnlab.step import init_params, init_state, make_step, token_losses
from attnlab.train import train

CENTRED = str(Path(__file__).parent / "plugged" / "centred.py")


def centred(*changes):
    return small(f"attention={CENTRED}", "model.layers=2", *changes)


def statistics(params, layer=0):
    return params["backbone"][f"layer_{layer}"]["attention"]["mechanism"]["statistics"]


def start(config):
    """(state, compiled step) of a config."""
    model, optimizer = model_of(config, VOCAB), make_optimizer(config.optimizer, 100)
    step = jax.jit(make_step(model, optimizer, config))
    return jax.jit(partial(init_state, model, optimizer, config))(), step


@partial(jax.jit, static_argnums=0)
def plain_pass(model, params, batch):
    return [aux["statistics"] for aux in token_losses(model, params, batch).extras.aux]


def aux_of(config, params, batch):
    """What the layers return, from a plain pass."""
    return plain_pass(model_of(config, VOCAB), params, batch)


def fresh(config):
    """Parameters that nothing was measured with."""
    return jax.jit(partial(init_params, model_of(config, VOCAB), 0))()


def test_parameters_are_taken_apart_and_put_together():
    params = fresh(centred())
    learned, measured = split(params)
    assert_bitwise(merge(learned, measured), params)
    assert len(jax.tree.leaves(measured)) == 4
    assert "gate" in learned["backbone"]["layer_1"]["attention"]["mechanism"]
    plain = fresh(small())
    assert split(plain) == (plain, {})
    assert advance({}, [None]) == {}


@pytest.mark.parametrize(("name", "remat"), [("adamw", True), ("muon", False)])
def test_a_step_replaces_statistics_by_what_the_layers_measured(name, remat):
    config = centred(f"optimizer.name={name}", f"model.remat={remat}", "optimizer.ema=0.9")
    state, step = start(config)
    for i in range(2):
        expected = aux_of(config, state.params, make_batch(i))
        state, _ = step(state, make_batch(i))
        for layer in range(2):
            found = statistics(state.params, layer)
            assert int(found["calls"]) == i + 1
            np.testing.assert_allclose(found["kernel"], expected[layer]["kernel"], atol=1e-6)
            assert_bitwise(statistics(state.evaluated, layer), found)
    paths = jax.tree_util.tree_leaves_with_path(state.optimizer)
    assert not any("statistics" in jax.tree_util.keystr(path) for path, _ in paths)
    averaged, now = (p["backbone"]["embedding"]["embedding"] for p in (state.average, state.params))
    assert jnp.any(averaged != now)


def test_the_parts_of_a_batch_measure_one_after_the_other():
    config = centred("optimizer.accumulate=4")
    state, step = start(config)
    params, batch = state.params, make_batch()
    for part in range(4):
        rows = {name: z[part::4] for name, z in batch.items()}
        after = aux_of(config, params, rows)
        layers = {
            f"layer_{i}": {"attention": {"mechanism": {"statistics": new}}}
            for i, new in enumerate(after)
        }
        params = merge(params, {"backbone": layers})
    state, _ = step(state, batch)
    for layer in range(2):
        found, expected = statistics(state.params, layer), statistics(params, layer)
        assert int(found["calls"]) == int(expected["calls"]) == 4
        np.testing.assert_allclose(found["kernel"], expected["kernel"], atol=1e-6)


def test_a_bad_batch_and_bad_statistics_change_nothing():
    state, step = start(centred("model.tied=false"))
    embedding = state.params["backbone"]["embedding"]["embedding"]
    state.params["backbone"]["embedding"]["embedding"] = embedding.at[5].set(jnp.inf)
    bad = make_batch(2)
    bad["tokens"][3, 0], bad["seg"][3, 0] = 5, 1
    after, metrics = step(state, bad)
    assert not metrics["finite"]
    assert_bitwise(after._replace(step=state.step), state)


@pytest.mark.slow
def test_statistics_that_overflow_are_not_taken_over():
    # A gate of 0 hides them from the loss, a decay of 2 doubles them.
    state, step = start(centred("attention.decay=2.0"))
    state.params["backbone"]["layer_0"]["attention"]["mechanism"]["gate"] = jnp.zeros(())
    statistics(state.params)["kernel"] = jnp.full((2, 8), 3e38)
    after, metrics = step(state, make_batch())
    assert jnp.isfinite(metrics["loss"])
    assert not metrics["finite"]
    assert_bitwise(after._replace(step=state.step), state)


@pytest.mark.slow
def test_statistics_of_a_sharded_batch_are_those_of_one_device(monkeypatch):
    monkeypatch.setattr("attnlab.sharding.SMALL", 8)
    config = centred("task.batch=8", "optimizer.accumulate=2", "optimizer.ema=0.9")
    model, optimizer = model_of(config, VOCAB), make_optimizer(config.optimizer, 100)
    state, step = start(config)
    mesh = make_mesh("data:4,fsdp:2")
    init = partial(init_state, model, optimizer, config)
    place = state_shardings(mesh, jax.eval_shape(init))
    with jax.set_mesh(mesh):
        spread = jax.jit(init, out_shardings=place)()
        sharded = jax.jit(
            make_step(model, optimizer, config), donate_argnums=0, out_shardings=(place, None)
        )
        for i in range(2):
            spread, found = sharded(spread, put(make_batch(i, 16), batch_sharding(mesh, 16)))
            state, expected = step(state, make_batch(i, 16))
            np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    for layer in range(2):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            statistics(spread.params, layer),
            statistics(state.params, layer),
        )


def test_a_mechanism_that_forgets_its_statistics_is_named():
    _, measured = split(fresh(centred()))
    good = [{"statistics": statistics(measured, layer)} for layer in range(2)]
    assert_bitwise(advance(measured, good), measured)
    for wrong in (None, {}, {"statistics": {"calls": jnp.int32(1)}}):
        with pytest.raises(TypeError, match="layer_1: a mechanism with statistics must"):
            advance(measured, [good[0], wrong])


def test_the_plan_counts_statistics_apart():
    config = tiny(f"attention={CENTRED}")
    estimate, plain = (
        estimate_cost(config, model_of(config, 257)),
        estimate_cost(tiny(), model_of(tiny(), 257)),
    )
    assert estimate.measured == 2 * 8 + 1
    # One gate more is learned, and its optimizer state; the statistics have none.
    assert estimate.matmul_flops - plain.matmul_flops == 6
    assert estimate.fixed - plain.fixed == 4 * (5 + 2 * estimate.measured)
    assert "; 17 more are measured" in describe(config, estimate, None, 10**9)
    assert "measured" not in describe(tiny(), plain, None, 10**9)


@pytest.mark.slow
def test_a_run_measures_while_it_trains_and_never_while_it_is_read(tmp_path):
    quick = ("train.eval_every=0", "sample.tokens=2", "train.save_every=3")
    config = tiny(f"attention={CENTRED}", "train.steps=6", *quick)
    assert train(config, tmp_path / "straight") == 0
    expected = saved_state(tmp_path / "straight", config)
    run = open_run(tmp_path / "straight")
    before = jax.tree.map(np.asarray, run.params)
    assert int(statistics(run.params)["calls"]) == 6
    options = {"length": 16, "stride": 16, "tokens": 64}
    once, again = (score(run.model, run.params, run.task(), "test", **options) for _ in range(2))
    assert once.nats == again.nats
    assert_bitwise(run.params, before)
    first = tiny(f"attention={CENTRED}", "train.steps=6", "optimizer.ema=0.9", *quick)
    assert train(first, tmp_path / "broken") == 0
    (tmp_path / "broken" / "run.json").unlink()
    for file in (tmp_path / "broken/checkpoints/6").glob("manifest*"):
        file.unlink()  # as if killed while it saved
    assert train(first, tmp_path / "broken") == 0
    assert saved_state(tmp_path / "broken", config) == expected
