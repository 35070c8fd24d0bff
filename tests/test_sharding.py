"""Meshes are typed, checked and laid out; a sharded step computes what one device computes."""

import re
from typing import Any, NamedTuple

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
from attnlab.sharding import (
    SMALL,
    batch_sharding,
    check_length,
    make_mesh,
    put,
    readers,
    spread,
    state_shardings,
)
from attnlab.step import init_state, make_step


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", None),
        ("data:8", (8, 1, 1, 1)),
        ("data:-1", (8, 1, 1, 1)),
        ("fsdp:-1", (1, 8, 1, 1)),
        ("data:4,fsdp:2", (4, 2, 1, 1)),
        ("fsdp:2, data:-1", (4, 2, 1, 1)),
        ("data:-1,fsdp:8", (1, 8, 1, 1)),
        ("seq:4,tensor:2", (1, 1, 4, 2)),
        ("data:2,fsdp:1,seq:-1,tensor:2", (2, 1, 2, 2)),
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
        ("data", "'data' is not AXIS:SIZE with AXIS in data, fsdp, seq, tensor"),
        ("model:8", "'model:8' is not"),
        ("data:0", "'data:0' is not"),
        ("data:--1", "'data:--1' is not"),
        ("data:²", "is not AXIS:SIZE"),
        ("data:4.0", "is not AXIS:SIZE"),
        ("data:-1,fsdp:-1", "only one size may be -1"),
        ("data:2,data:4", "names an axis twice"),
        ("data:4", "has 4 places for 8 devices; use data:8 or data:-1"),
        ("seq:3", "has 3 places for 8 devices; use seq:8 or seq:-1"),
        ("data:-1,fsdp:3", "has 6 places for 8 devices; use data:2,fsdp:4 or data:4,fsdp:2"),
        ("data:-1,fsdp:16", "has 0 places for 8 devices; use data:1,fsdp:8 or"),
        ("data:3,seq:2", "use data:4,seq:2 or data:2,seq:4 or data:8,seq:1 or data:1,seq:8"),
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


def test_rows_are_split_by_two_axes_and_tokens_by_one_they_must_divide():
    mesh = make_mesh("data:2,seq:2,tensor:2")
    with pytest.raises(UserError, match=r"task.batch=3 does not divide among 2 groups.*use 4"):
        batch_sharding(mesh, 3)
    check_length(make_mesh("data:2,seq:4"), 36)
    with pytest.raises(UserError, match=r"length=34 .*4 devices .*use task.length=36, or seq:2"):
        check_length(make_mesh("data:2,seq:4"), 34)


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


def test_tokens_are_split_where_an_array_has_one_entry_for_each():
    sharding = batch_sharding(make_mesh("data:2,seq:2,tensor:2"), 4)
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(4, 6), "label": np.arange(4)}
    batch |= {"points": np.zeros((4, 6, 2)), "named": np.zeros((4, 3))}
    placed = put(batch, sharding)
    assert {name: z.sharding.spec for name, z in placed.items()} == {
        "tokens": P(("data", "fsdp"), "seq"),
        "points": P(("data", "fsdp"), "seq"),
        "label": P(("data", "fsdp")),
        "named": P(("data", "fsdp")),
    }
    held = {s.device.id: s.data.tolist() for s in placed["tokens"].addressable_shards}
    assert held[2] == held[3] == [[3, 4, 5], [9, 10, 11]]
    odd = put({"tokens": np.zeros((4, 5))}, sharding)["tokens"]
    assert odd.sharding == sharding


def test_rows_are_read_once_and_by_all_who_share_them():
    sharding = batch_sharding(make_mesh("data:2,seq:4"), 4)
    assert readers(sharding) == (0, 1)
    assert spread(3, sharding) == (4, slice(0, 4))


class Device(NamedTuple):
    id: int
    process_index: int


class Pretended(NamedTuple):
    mesh: Any
    devices_indices_map: Any


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ("data:8", [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ("data:2,seq:4", [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ("seq:8", [(0, 1)] * 4),
        ("data:4,tensor:2", [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ],
)
def test_processes_that_split_the_tokens_of_a_row_read_the_same_rows(mesh, parts, monkeypatch):
    real = batch_sharding(make_mesh(mesh), 8)

    def held(shape):  # as if every two devices were of one process
        places = real.devices_indices_map(shape).items()
        return {Device(d.id, d.id // 2): at for d, at in places}

    pretended: Any = Pretended(real.mesh, held)
    for process, expected in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert readers(pretended) == expected


def test_tensor_splits_heads_and_hidden_units_and_nothing_else():
    """Parameters, moments and averages alike; what does not divide between heads stays whole."""
    config = tiny("model.heads=4", "model.kv_heads=2", "model.head_dim=4", "model.mlp_width=24")
    model, optimizer = model_of(config, 257), make_optimizer(config.optimizer, 12)
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, config))

    def split(text):
        found = state_shardings(make_mesh(text), shapes, head_dim=4)
        leaves = jax.tree_util.tree_leaves_with_path(found)
        assert all(isinstance(place, NamedSharding) for _, place in leaves)
        parted = [(jax.tree_util.keystr(path), s.spec) for path, s in leaves if s.spec != P()]
        names = ["/".join(re.findall(r"\w+", name)[-3:-1]) for name, _ in parted]
        assert {names.count(name) for name in names} == {4}  # parameters, two moments, average
        return dict(zip(names, (spec for _, spec in parted)))

    columns, rows = P(None, "tensor"), P("tensor")
    heads = {"attention/query": columns, "attention/out": rows}
    pairs = {"attention/key": columns, "attention/value": columns}
    hidden = {"mlp/gate": columns, "mlp/up": columns, "mlp/down": rows}
    assert split("data:4,tensor:2") == heads | pairs | hidden
    assert split("data:2,tensor:4") == heads | hidden  # 2 kv heads of 4 are not 4


STEPPED = ("data:4,fsdp:2", "fsdp:2,seq:2,tensor:2")


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
    for text in STEPPED:
        mesh = make_mesh(text)
        with jax.set_mesh(mesh):
            place = state_shardings(mesh, shapes, model.architecture.head_dim)
            losses, found, state = run(place, batch_sharding(mesh, 16))
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, params)
        split = [z for z in jax.tree.leaves(state) if not z.sharding.is_fully_replicated]
        assert bool(split) == ("fsdp" in text or "tensor" in text)
        assert all(isinstance(z.sharding, NamedSharding) for z in jax.tree.leaves(state))
