"""Memory that is handed on: rows read on as one long text, and nothing else changes."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import VOCAB, assert_bitwise, small
from test_train import QUICK as SHORT
from test_train import Poisoned, run, signal_during
from tiny import saved_state, tiny

from attnlab.carry import Carried, carries, hand_on, nothing_read, resume
from attnlab.checkpoint import Checkpoints
from attnlab.config import base, mechanisms_of, model_of
from attnlab.core import Mechanism
from attnlab.errors import UserError
from attnlab.limits import validate
from attnlab.main import main
from attnlab.model import Transformer
from attnlab.overrides import override
from attnlab.plan import estimate_cost
from attnlab.sharding import batch_sharding, make_mesh, put, state_shardings
from attnlab.step import init_params, init_state, make_step, token_losses
from attnlab.train import Trainer

TAIL = str(Path(__file__).parent / "plugged" / "tail.py")
ROWS, LENGTH = 8, 12


def tail(*changes, rows=ROWS):
    return small(f"attention={TAIL}", "attention.window=8", f"task.batch={rows}", *changes)


def make_stream(steps, rows=ROWS):
    """Batches [rows LENGTH] that read on, through documents of lengths of their own."""
    draw, total = np.random.default_rng(0), steps * LENGTH
    tokens = draw.integers(6, VOCAB, (rows, total + 1), dtype=np.int32)
    starts = draw.random((rows, total)) < 0.05
    starts[:, 0], starts[:, LENGTH : LENGTH + 1] = False, True
    index = np.arange(total, dtype=np.int32)
    seg = 1 + np.cumsum(starts, 1, dtype=np.int32)
    # A row begins in the middle of a document, as a lane does.
    pos = index - np.maximum.accumulate(np.where(starts, index, -5), 1).astype(np.int32)
    whole = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "pos": pos, "seg": seg}
    cuts = [slice(at, at + LENGTH) for at in range(0, total, LENGTH)]
    return whole, [{name: z[:, cut] for name, z in whole.items()} for cut in cuts]


@cache
def stepper(*changes):
    """(initial state, compiled step) under an optimizer that leaves gradients readable."""
    config, optimizer = tail(*changes), optax.sgd(0.1)
    model = model_of(config, VOCAB)
    step = jax.jit(make_step(model, optimizer, config))
    return jax.jit(partial(init_state, model, optimizer, config))(), step


@partial(jax.jit, static_argnums=0)
def read(model, params, carried, batch):
    losses = token_losses(model, params, batch, resume(model, carried, batch))
    return losses.nll, hand_on(model, losses.extras.memory, batch)


@pytest.mark.parametrize("changes", [(), ("model.layers=2", "model.remat=true")])
@pytest.mark.slow
def test_rows_that_read_on_lose_what_one_long_row_loses(changes):
    whole, batches = make_stream(4)
    model = model_of(tail(*changes), VOCAB)
    params = init_params(model, 0)
    expected, _ = read(model_of(small("attention=window", "attention.window=8", *changes), VOCAB),
                       params, (), whole)  # fmt: skip
    carried, found = nothing_read(model, ROWS), []
    for batch in batches:
        nll, carried = read(model, params, carried, batch)
        found.append(nll)
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=1e-5)
    alone, _ = read(model, params, nothing_read(model, ROWS), batches[2])
    assert np.max(np.abs(alone - found[2])) > 1e-3, "the memory is of use"


def test_a_row_that_does_not_go_on_starts_afresh_and_no_other_row_notices():
    model = model_of(tail(), VOCAB)
    params, (_, batches) = init_params(model, 0), make_stream(4)
    _, carried = read(model, params, nothing_read(model, ROWS), batches[2])
    batch = {name: z.copy() for name, z in batches[3].items()}
    batch["pos"][1] += 1  # a gap
    batch["seg"][2] += 9  # another document
    batch["seg"][3] = -1  # nothing
    seg, pos = batch["seg"][:, 0], batch["pos"][:, 0]
    goes_on = (seg == batches[2]["seg"][:, -1]) & (pos == batches[2]["pos"][:, -1] + 1)
    assert not goes_on[1:4].any()
    assert goes_on.sum() >= 3
    nll, after = read(model, params, carried, batch)
    fresh, fresh_after = read(model, params, nothing_read(model, ROWS), batch)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[~goes_on], b[~goes_on]),
                 (nll, after), (fresh, fresh_after))  # fmt: skip
    assert all(jnp.any(nll[row] != fresh[row]) for row in np.flatnonzero(goes_on))
    poisoned = jax.tree.map(lambda z: z.at[4].set(77), carried.layers)
    others = np.arange(ROWS) != 4
    again, _ = read(model, params, carried._replace(layers=poisoned), batch)
    np.testing.assert_array_equal(nll[others], again[others])


@pytest.mark.slow
def test_a_batch_in_parts_carries_what_the_whole_batch_carries():
    (whole, one), (split, two) = stepper(), stepper("optimizer.accumulate=2")
    for batch in make_stream(3)[1]:
        whole, expected = one(whole, batch)
        split, found = two(split, batch)
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    compare = partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(compare, (split.memory, split.params), (whole.memory, whole.params))


def test_a_skipped_batch_leaves_the_memory_and_the_next_one_does_not_read_it():
    state, step = stepper()
    _, batches = make_stream(4)
    state, _ = step(state, batches[0])
    broken = jax.tree.map(lambda p: p * jnp.nan, state.params)
    after, metrics = step(state._replace(params=broken), batches[1])
    assert not metrics["finite"]
    assert_bitwise(after.memory, state.memory)
    after = after._replace(params=state.params)
    model = model_of(tail(), VOCAB)
    fresh = after._replace(memory=nothing_read(model, ROWS))
    assert_bitwise(step(after, batches[2]), step(fresh, batches[2]))


def test_memory_that_spoils_a_batch_spoils_one_batch():
    state, step = stepper()
    _, batches = make_stream(4)
    state, _ = step(state, batches[1])
    spoiled = jax.tree.map(lambda z: z * jnp.inf if z.ndim == 4 else z, state.memory)
    after, metrics = step(state._replace(memory=spoiled), batches[2])
    assert not metrics["finite"]
    assert_bitwise(after.params, state.params)
    assert step(after, batches[3])[1]["finite"]


def test_memory_lies_with_its_rows_and_a_sharded_step_equals_that_of_one_device():
    config, optimizer = tail("optimizer.accumulate=2", rows=16), optax.sgd(0.1)
    model = model_of(config, VOCAB)
    init, step = partial(init_state, model, optimizer, config), make_step(model, optimizer, config)
    mesh, shapes = make_mesh("data:4,fsdp:2"), jax.eval_shape(init)
    rows = batch_sharding(mesh, 16)
    place = state_shardings(mesh, shapes)
    place = place._replace(memory=jax.tree.map(lambda _: rows, shapes.memory))
    state = init()
    one = jax.jit(step)
    with jax.set_mesh(mesh):
        spread = jax.jit(init, out_shardings=place)()
        many = jax.jit(step, donate_argnums=0, out_shardings=(place, None))
        for batch in make_stream(3, 16)[1]:
            state, expected = one(state, batch)
            spread, found = many(spread, put(batch, rows))
            np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    assert many._cache_size() == 1
    assert all(z.sharding == rows for z in jax.tree.leaves(spread.memory))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), spread.memory, state.memory)


def test_only_layers_that_carry_hand_something_on():
    plain = model_of(small(), VOCAB)
    assert not carries(plain)
    assert nothing_read(plain, 3) == hand_on(plain, (None,), {}) == ()
    assert resume(plain, (), {}) is None
    mixed = model_of(base(f"softmax+{TAIL}+window"), VOCAB)
    carried = nothing_read(mixed, 3)
    assert isinstance(carried, Carried)
    assert [bool(jax.tree.leaves(layer)) for layer in carried.layers] == [False, True, False] * 2
    batch = {name: z[:3] for name, z in make_stream(1)[1][0].items()}
    memory = resume(mixed, carried, batch)
    assert [past is None for past in memory] == [True, False, True] * 2


class Forgetful(Mechanism):
    carries = True


def test_a_mechanism_that_carries_must_have_a_state_with_a_row_each():
    model = model_of(small(), VOCAB)
    model = Transformer(model.architecture, VOCAB, (Forgetful(),), model.position)
    with pytest.raises(TypeError, match="a carried state needs arrays of"):
        nothing_read(model, 3)


def test_configs_choose_rows_that_read_on_and_a_wrong_choice_is_one_line(capsys):
    assert base().task.packing == base("window").task.packing == "packed"
    config = base(f"softmax+{TAIL}")
    assert config.task.packing == "stream"
    validate(config)
    override(config, "task.packing", "packed")
    with pytest.raises(UserError) as error:
        validate(config)
    message = (
        f"task.packing=packed: attention {TAIL} carries its memory from batch to batch, so a row "
        "must read on where it stopped; use task.packing=stream"
    )
    assert str(error.value) == message
    config = base(TAIL)
    override(config, "evaluate.stride", "512")
    validate(config)
    override(config, "evaluate.stride", "256")
    with pytest.raises(UserError, match=r"evaluate\.stride=256: attention .*; use 0 or .* 512"):
        validate(config)
    assert main(["plan", "--config=configs/lm.py", f"--config.attention={TAIL}"]) == 2
    assert "use task.packing=stream" in capsys.readouterr().err


def test_the_plan_shares_the_memory_among_the_devices():
    config = tiny(f"attention={TAIL}", "task.packing=stream")
    one, many = (estimate_cost(config, model_of(config, 257), n, 2) for n in (1, 8))
    window = mechanisms_of(config)[0].window
    memory = 8 * 4 * ((window - 1) * (2 * 16 + 2) + 2)
    assert one.fixed - many.fixed == memory - memory // 8


def carrying(*changes):
    return tiny(f"attention={TAIL}", "task.packing=stream", "attention.window=24", *changes, *SHORT)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody disturbs."""
    path = tmp_path_factory.mktemp("carrying") / "run"
    assert run(carrying(), path) == 0
    return path


def test_a_run_that_dies_resumes_with_the_memory_it_saved(straight, tmp_path, monkeypatch):
    def die(*_):
        raise MemoryError

    calls, record = [], Trainer.record
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "record", lambda *a: calls.append(0) or record(*a) if len(calls) < 6
                      else die())  # fmt: skip
        with pytest.raises(MemoryError):
            run(carrying(), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert run(carrying("optimizer.accumulate=1"), tmp_path) == 0
    found, expected = (saved_state(path, carrying()) for path in (tmp_path, straight))
    assert found == expected
    assert any(np.frombuffer(found[name], np.uint8).any() for name in found if ".memory" in name)


def test_a_run_resumes_only_with_the_rows_it_had(straight):
    with pytest.raises(UserError, match=r"task\.batch: 8 -> 16"):
        run(carrying("task.batch=16"), straight)
    config = carrying("task.batch=16")
    model, optimizer = model_of(config, 257), optax.sgd(0.1)
    like = {"memory": jax.eval_shape(partial(init_state, model, optimizer, config)).memory}
    with Checkpoints(straight / "checkpoints") as checkpoints, pytest.raises(UserError) as error:
        checkpoints.read(like)
    assert "memory.seg saved int32[8], expected int32[16]" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_rewound_run_has_the_memory_of_the_state_it_went_back_to(tmp_path, monkeypatch, capsys):
    config = carrying("train.on_nan=rewind")
    Poisoned(monkeypatch, config, [5])
    assert run(config, tmp_path / "straight") == 0
    assert "back to step 4" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        signal_during(patch, Trainer, "record", when=8)
        assert run(config, tmp_path / "broken") == 143
    assert run(config, tmp_path / "broken") == 0
    found, expected = (saved_state(tmp_path / name, config) for name in ("broken", "straight"))
    assert found == expected
