"""Meshes are typed, checked and laid out; a sharded step computes what one device computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import tiny

from attnlab.config import model_of
from attnlab.errors import UserError
from attnlab.optimizer import make_optimizer
from attnlab.sharding import SMALL, batch_sharding, make_mesh, put, state_shardings
from attnlab.step import init_state, make_step


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", None),
        ("data:8", (8, 1)),
        ("data:-1", (8, 1)),
        ("fsdp:-1", (1, 8)),
        ("data:4,fsdp:2", (4, 2)),
        ("fsdp:2, data:-1", (4, 2)),
        ("data:-1,fsdp:8", (1, 8)),
    ],
)
def test_a_mesh_is_read_from_its_text(text, sizes):
    assert jax.device_count() == 8
    if sizes is None:
        with pytest.raises(UserError, match="has 1 places for 8 devices; use data:8 or data:-1"):
            make_mesh(text)
    else:
        assert tuple(make_mesh(text).shape.values()) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data", "'data' is not AXIS:SIZE with AXIS in data, fsdp"),
        ("model:8", "'model:8' is not"),
        ("data:0", "'data:0' is not"),
        ("data:--1", "'data:--1' is not"),
        ("data:²", "is not AXIS:SIZE"),
        ("data:4.0", "is not AXIS:SIZE"),
        ("data:-1,fsdp:-1", "only one size may be -1"),
        ("data:2,data:4", "names an axis twice"),
        ("data:4", "has 4 places for 8 devices"),
        ("data:-1,fsdp:3", "has 6 places for 8 devices"),
        ("data:-1,fsdp:16", "has 0 places for 8 devices"),
    ],
)
def test_a_mesh_that_makes_no_sense_is_one_line(text, message):
    with pytest.raises(UserError) as error:
        make_mesh(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_batch_that_does_not_divide_names_one_that_does():
    with pytest.raises(UserError, match=r"task.batch=12 does not divide among 8.*use 16"):
        batch_sharding(make_mesh("data:-1"), 12)


def test_large_arrays_are_split_along_their_largest_axis_that_divides():
    mesh = make_mesh("data:4,fsdp:2")
    shapes = {
        "tall": (4 * SMALL, 3),
        "odd": (3, SMALL + 1, 6),
        "nothing divides": (3, SMALL + 1),
        "small": (SMALL // 2,),
        "count": (),
    }
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = {name: s.spec for name, s in state_shardings(mesh, structs).items()}
    assert specs == {
        "tall": P("fsdp"),
        "odd": P(None, None, "fsdp"),
        "nothing divides": P(),
        "small": P(),
        "count": P(),
    }
    alone = state_shardings(make_mesh("data:8"), structs)
    assert all(s.spec == P() for s in alone.values())


def test_rows_of_a_batch_lie_on_all_devices_in_order():
    sharding = batch_sharding(make_mesh("data:4,fsdp:2"), 16)
    placed = put({"tokens": np.arange(16, dtype=np.int32)[:, None]}, sharding)["tokens"]
    assert placed.sharding == sharding
    assert sorted(int(s.data[0, 0]) for s in placed.addressable_shards) == list(range(0, 16, 2))
    np.testing.assert_array_equal(placed, np.arange(16)[:, None])


def test_a_sharded_step_equals_that_of_one_device(monkeypatch):
    monkeypatch.setattr("attnlab.sharding.SMALL", 64)  # so that small arrays are split too
    config = tiny("task.batch=16")
    model, optimizer = model_of(config, 257), make_optimizer(config.optimizer, 12)
    step = make_step(model, optimizer, config)
    rng = np.random.default_rng(0)
    batch = {k: rng.integers(0, 257, (16, 32), dtype=np.int32) for k in ("tokens", "targets")}
    batch |= {"pos": np.tile(np.arange(32, dtype=np.int32), (16, 1))}
    batch |= {"seg": np.ones((16, 32), np.int32)}

    def run(place, rows):
        state = jax.jit(lambda: init_state(model, optimizer, config), out_shardings=place)()
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(place, None))
        losses = []
        for _ in range(3):
            state, metrics = compiled(state, put(batch, rows))
            losses.append(float(metrics["loss"]))
        assert compiled._cache_size() == 1
        return losses, jax.tree.map(np.asarray, state.params), state

    shapes = jax.eval_shape(lambda: init_state(model, optimizer, config))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected, params, _ = run(jax.tree.map(lambda _: one, shapes), one)
    for text in ("data:8", "data:4,fsdp:2"):
        mesh = make_mesh(text)
        with jax.set_mesh(mesh):
            losses, found, state = run(state_shardings(mesh, shapes), batch_sharding(mesh, 16))
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, params)
        split = [z for z in jax.tree.leaves(state) if not z.sharding.is_fully_replicated]
        assert bool(split) == ("fsdp" in text)
        assert all(isinstance(z.sharding, NamedSharding) for z in jax.tree.leaves(state))
