"""A checkpoint comes back bitwise, or is named and passed over; it never lies."""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import attnlab
from attnlab.checkpoint import Checkpoints, NotFinite
from attnlab.errors import DataError, UserError

ROOT = Path(attnlab.__file__).parents[1]


class Moments(NamedTuple):
    count: Any
    mu: Any


def make_state(step=0):
    """One of every kind of leaf that a training state has."""
    return {
        "params": {
            "w": jnp.full((64, 8), step, jnp.float32),
            "b": jnp.arange(3, dtype=jnp.bfloat16),
        },
        "opt": (Moments(jnp.int32(step), {"w": jnp.ones((64, 8))}), (), None),
        "key": jax.random.key(step),
        "keys": jax.random.split(jax.random.key(step, impl="rbg"), 3),
        "step": step,
        "loss": 0.1 + step,
        "on": True,
        "host": np.arange(4, dtype=np.float64) / 3,
        "scalar": np.int64(2**40),
        "empty": jnp.zeros((0, 3)),
    }


def assert_same(a, b):
    def check(x, y):
        assert type(x) is type(y)
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        else:
            assert x == y

    jax.tree.map(check, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def save_steps(directory, steps=(1, 2), **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"at": step})


def start_child(code, *arguments, flags=(), **options):
    return subprocess.Popen(
        [sys.executable, *flags, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        **options,
    )


def run_child(code, *arguments):
    with start_child(code, *arguments, stderr=subprocess.PIPE, text=True) as child:
        stdout, stderr = child.communicate(timeout=120)
        return child.returncode, stdout, stderr


def test_every_kind_of_leaf_comes_back_bitwise_with_its_type(tmp_path):
    save_steps(tmp_path)
    step, state, extra = Checkpoints(tmp_path).restore(make_state())
    assert (step, extra) == (2, {"at": 2})
    assert_same(state, make_state(2))


def test_a_requested_step_comes_back(tmp_path):
    save_steps(tmp_path)
    step, state, extra = Checkpoints(tmp_path).restore(make_state(), step=1)
    assert (step, extra) == (1, {"at": 1})
    assert_same(state, make_state(1))


def test_a_requested_step_that_is_missing_lists_the_others(tmp_path):
    save_steps(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint 7 in .*; there: 1, 2"):
        Checkpoints(tmp_path).restore(make_state(), step=7)


def test_only_the_newest_steps_are_kept(tmp_path):
    save_steps(tmp_path, range(1, 6), keep=2)
    assert Checkpoints(tmp_path).steps() == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


def test_saving_returns_before_the_state_may_change(tmp_path):
    change = jax.jit(lambda x: x + 1, donate_argnums=0)
    host = np.zeros(1000)
    with Checkpoints(tmp_path) as checkpoints:
        device = jnp.zeros((1000, 1000))
        checkpoints.save(1, {"device": device, "host": host})
        host += 1
        for _ in range(5):
            device = change(device)
    like = {"device": jnp.zeros((1000, 1000)), "host": host}
    _, state, _ = Checkpoints(tmp_path).restore(like)
    assert not np.asarray(state["device"]).any()
    assert not state["host"].any()


def test_a_step_saved_twice_is_written_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, make_state(1)) is True
        assert checkpoints.save(1, make_state(9)) is False
    assert_same(Checkpoints(tmp_path).restore(make_state())[1], make_state(1))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_state_that_is_not_finite_is_refused_by_name(tmp_path, bad):
    state = make_state(2)
    state["opt"][0].mu["w"] = state["opt"][0].mu["w"].at[3, 1].set(bad)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        with pytest.raises(NotFinite, match=r"step 2: opt\.0\.mu\.w holds NaN or Inf"):
            checkpoints.save(2, state)
        assert checkpoints.steps() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scalar": np.int32(0)}, r"scalar saved int64\[\], expected int32\[\]"),
        ({"params": {"w": jnp.zeros((64, 8), jnp.int32), "b": jnp.zeros(3, jnp.bfloat16)}},
         r"params\.w saved float32\[64,8\], expected int32\[64,8\]"),
        ({"empty": jnp.zeros((0, 4))}, r"empty saved float32\[0,3\], expected float32\[0,4\]"),
        ({"extra": jnp.zeros(2)}, r"extra saved missing, expected float32\[2\]"),
        ({"loss": 1}, "loss saved a Python float, expected a Python int"),
        ({"key": jax.random.key(0, impl="rbg")}, r"key saved key<fry>\[\], expected key<rbg>\[\]"),
    ],
)  # fmt: skip
def test_another_structure_shape_or_dtype_is_refused_by_name(tmp_path, change, message):
    save_steps(tmp_path, [1])
    with pytest.raises(UserError, match=message):
        Checkpoints(tmp_path).restore(make_state() | change)


def test_a_leaf_that_only_the_checkpoint_has_is_named(tmp_path):
    save_steps(tmp_path, [1])
    like = make_state()
    del like["host"]
    with pytest.raises(UserError, match=r"host saved float64\[4\], expected nothing"):
        Checkpoints(tmp_path).restore(like)


def test_one_flipped_byte_in_any_file_is_named_and_the_step_before_is_used(tmp_path, caplog):
    save_steps(tmp_path)
    newest = tmp_path / "2"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        caplog.clear()
        step, state, extra = Checkpoints(tmp_path).restore(make_state())
        assert (step, extra["at"], state["step"]) == (1, 1, 1), path
        assert str(path) in caplog.text
        path.write_bytes(content)
    assert Checkpoints(tmp_path).restore(make_state())[0] == 2


def damage_empty(step):
    shutil.rmtree(step)
    step.mkdir()


def largest_data(step):
    return max(step.glob("**/d/*"), key=lambda path: path.stat().st_size)


def damage_data(step):
    largest_data(step).unlink()


def damage_length(step):
    path = largest_data(step)
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_empty, "manifest.json is missing"),
        (damage_data, "is missing"),
        (damage_length, "bytes, expected"),
        (lambda step: (step / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda step: (step / "manifest.json").write_bytes(b""), "manifest.json is damaged"),
        (lambda step: (step / "manifest.json").write_bytes(b"\xff{"), "manifest.json is damaged"),
        (lambda step: (step / "manifest.json").write_text('{"body": []}'), "is damaged"),
        (lambda step: (step / "_METADATA").write_text("{"), "_METADATA has 1 bytes"),
        (lambda step: (step / "_METADATA").unlink(), "_METADATA is missing"),
    ],
)
def test_a_damaged_newest_step_is_named_and_the_one_before_is_used(
    tmp_path, caplog, damage, reason
):
    save_steps(tmp_path)
    damage(tmp_path / "2")
    step, state, _ = Checkpoints(tmp_path).restore(make_state())
    assert step == 1
    assert_same(state, make_state(1))
    assert "checkpoint 2 passed over" in caplog.text
    assert reason in caplog.text


def test_no_sound_step_is_a_data_error_that_names_the_damage(tmp_path):
    save_steps(tmp_path, [1])
    damage_length(tmp_path / "1")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == []
    assert checkpoints.found()
    with pytest.raises(DataError, match=r"no sound checkpoint in .*bytes, expected"):
        checkpoints.restore(make_state())
    with pytest.raises(DataError, match="checkpoint 1 is not sound"):
        checkpoints.restore(make_state(), step=1)


def test_an_empty_or_missing_directory_is_a_data_error(tmp_path):
    for directory in (tmp_path, tmp_path / "none"):
        checkpoints = Checkpoints(directory)
        assert not checkpoints.found()
        with pytest.raises(DataError, match="it is empty"):
            checkpoints.restore(make_state())
    assert not (tmp_path / "none").exists()


def test_training_goes_on_past_a_damaged_step_and_replaces_it(tmp_path):
    save_steps(tmp_path)
    damage_length(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state())[0] == 1
        assert checkpoints.save(2, make_state(2))
    assert_same(Checkpoints(tmp_path).restore(make_state(), step=2)[1], make_state(2))


def test_going_back_to_an_older_step_drops_the_future_at_the_first_save(tmp_path):
    save_steps(tmp_path, (1, 2, 3))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(make_state(), step=1)
        assert checkpoints.steps() == [1, 2, 3]
        checkpoints.save(2, make_state(20))
    assert Checkpoints(tmp_path).steps() == [1, 2]
    assert_same(Checkpoints(tmp_path).restore(make_state())[1], make_state(20))


def test_starting_over_in_a_directory_with_steps_is_refused(tmp_path):
    save_steps(tmp_path, [5])
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="already holds step 5"),
    ):
        checkpoints.save(1, make_state(1))
    assert Checkpoints(tmp_path).steps() == [5]


def test_leftovers_of_a_killed_save_are_deleted_and_logged(tmp_path, caplog):
    save_steps(tmp_path, [1])
    (tmp_path / "3").mkdir()
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "007").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    checkpoints.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["007", "1", "notes"]
    assert "half-written checkpoint" in caplog.text
    assert str(tmp_path / "4.orbax-checkpoint-tmp") in caplog.text


def test_a_step_that_would_not_fit_on_the_disk_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(make_state())
        disk = os.statvfs_result((4096, 4096, 100, 10, 10, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda path: disk)
        with pytest.raises(DataError, match=r"step 2 needs 1\.0 MiB but .* has 0\.0 MiB free"):
            checkpoints.save(2, make_state(2))
    assert Checkpoints(tmp_path).steps() == [1]


FAILING = """
    import resource, sys
    import jax.numpy as jnp, numpy as np
    from attnlab.checkpoint import Checkpoints
    from attnlab.errors import DataError
    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, {"w": jnp.zeros(10)})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    noise = np.random.default_rng(0).normal(size=(300, 300))
    checkpoints.save(2, {name: noise for name in "abcdefgh"})
    if sys.argv[2] == "close":
        try:
            checkpoints.close()
        except DataError as error:
            print(error)
            sys.exit(error.code)
"""


@pytest.mark.parametrize("ending", ["close", "forget"])
def test_a_write_that_fails_is_exit_3_and_leaves_the_older_step(tmp_path, ending):
    code, stdout, stderr = run_child(FAILING, tmp_path, ending)
    assert code == 3, stderr
    if ending == "close":
        assert "step 2 was not saved" in stdout
        assert "File too large; steps on disk: 1" in stdout
        assert "site-packages/orbax" not in stderr  # its pages about the same failure
    else:
        assert "Checkpoints was not closed" in stderr
    checkpoints = Checkpoints(tmp_path)
    checkpoints.clean()  # what native threads wrote after the save was given up
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert checkpoints.restore({"w": jnp.zeros(10)})[0] == 1


SAVING = """
    import sys
    import numpy as np
    from attnlab.checkpoint import Checkpoints
    with Checkpoints(sys.argv[1], keep=2) as checkpoints:
        state, step = {"w": np.zeros(200_000, np.float32), "step": 0}, 0
        if checkpoints.found():
            step, state, extra = checkpoints.restore(state)
        while True:
            step += 1
            checkpoints.save(step, {"w": np.full(200_000, step, np.float32), "step": step})
            print(step, flush=True)
"""


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killing_a_run_in_the_middle_of_saving_never_costs_a_finished_step(tmp_path, times):
    last = 0
    for _ in range(times):
        # -O: no promise may hang on an assert.
        with start_child(SAVING, tmp_path, flags=["-O"], stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None
            for _ in range(2):
                begun = int(child.stdout.readline())
            time.sleep(random.uniform(0, 0.3))
            child.kill()
        # `begun` started only after the step before it was finished.
        step, state, _ = Checkpoints(tmp_path).restore({"w": jnp.zeros(200_000), "step": 0})
        assert step >= max(last, begun - 1)
        assert state["step"] == step
        assert (np.asarray(state["w"]) == step).all()
        last = step


SHARDED = """
    import sys
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from attnlab.checkpoint import Checkpoints

    def place(shape, names, spec):
        mesh = Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names)
        return NamedSharding(mesh, spec)

    values = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    keys = jax.random.split(jax.random.key(3), 8)
    wide = place((4, 2), ("data", "tensor"), P("data", "tensor"))
    rows = place((4, 2), ("data", "tensor"), P("data"))
    state = {
        "w": jax.device_put(values, wide), "keys": jax.device_put(keys, rows),
        "count": jnp.int32(7),
    }
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, state)
    for target in (wide, place((2,), ("data",), P(None, "data")), place((1,), ("data",), P())):
        line = place((target.mesh.size,), ("all",), P("all"))
        like = {
            "w": jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=target),
            "keys": jax.device_put(keys, line),
            "count": jnp.int32(0),
        }
        _, back, _ = Checkpoints(sys.argv[1]).restore(like)
        assert back["w"].sharding == target, back["w"].sharding
        assert back["keys"].sharding.is_equivalent_to(line, 1), back["keys"].sharding
        assert (np.asarray(back["w"]) == values).all()
        assert (jax.random.key_data(back["keys"]) == jax.random.key_data(keys)).all()
        jax.jit(lambda s: s["w"] * s["count"])(back)
    print("fine")
"""


def test_a_sharded_state_is_restored_on_other_meshes_with_the_sharding_of_like(tmp_path):
    code, stdout, stderr = run_child(SHARDED, tmp_path)
    assert (code, stdout) == (0, "fine\n"), stderr


def test_a_restored_array_is_committed_exactly_when_like_is(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    pinned = jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec("data")))
    state = {"free": jnp.ones(4), "pinned": pinned}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        _, back, _ = checkpoints.restore(state)
    assert not back["free"].committed
    assert back["pinned"].sharding == pinned.sharding


def test_an_onlooker_reads_a_part_and_does_not_move_where_training_continues(tmp_path):
    save_steps(tmp_path, (1, 2))
    with Checkpoints(tmp_path) as checkpoints:
        step, part, extra = checkpoints.read({"params": make_state()["params"]}, step=1)
        assert (step, extra) == (1, {"at": 1})
        assert_same(part, {"params": make_state(1)["params"]})
        with pytest.raises(
            UserError, match=r"params\.w saved float32\[64,8\], expected float32\[1\]"
        ):
            checkpoints.read({"params": {"w": jnp.zeros(1)}})
        with pytest.raises(UserError, match="already holds step 2"):
            checkpoints.save(2, make_state())


def test_deleting_that_fails_is_logged_and_does_not_fail_the_save(tmp_path, caplog, monkeypatch):
    def deny(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", deny)
            checkpoints.save(2, make_state(2))
            checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
    assert "cannot delete checkpoint" in caplog.text


def test_the_library_below_reads_the_arrays_without_us(tmp_path):
    save_steps(tmp_path, [2])
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        arguments = {
            path: ocp.RestoreArgs(restore_type=np.ndarray)
            for path, leaf in json.loads((tmp_path / "2/manifest.json").read_bytes())["body"][
                "leaves"
            ].items()
            if leaf.get("shape", [0]) != [0] and 0 not in leaf["shape"]
        }
        tree = reader.restore(
            tmp_path / "2",
            args=ocp.args.PyTreeRestore(item=dict.fromkeys(arguments, 0), restore_args=arguments),
        )
    assert (tree["params.w"] == 2).all()


def test_an_extra_that_json_cannot_hold_is_a_bug_raised_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError):
            checkpoints.save(1, make_state(), {"x": object()})
        with pytest.raises(TypeError, match="name: cannot save a str"):
            checkpoints.save(1, make_state() | {"name": "adam"})
    assert not list(tmp_path.iterdir())


def test_bad_places_and_counts_are_user_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(UserError, match="cannot make"):
        Checkpoints(tmp_path / "file" / "below").clean()
    with pytest.raises(UserError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_due_is_every_so_many_steps():
    checkpoints = Checkpoints("unused", every=10)
    assert [step for step in range(31) if checkpoints.due(step)] == [10, 20, 30]
    assert not any(Checkpoints("unused", every=0).due(step) for step in range(31))


def test_a_failure_during_an_exception_does_not_hide_it(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path)

    def fail():
        raise DataError("late")

    monkeypatch.setattr(checkpoints, "close", fail)
    with caplog.at_level(logging.ERROR), pytest.raises(KeyError), checkpoints:
        raise KeyError("first")
    assert "late" in caplog.text
    with pytest.raises(DataError, match="late"), checkpoints:
        pass
