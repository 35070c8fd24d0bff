"""A sequence that lies on several devices: the same outputs, gradients and losses as on one."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs_and_gradients
from battery.cases import Case, documents, draw, small
from test_train import make_trainer
from tiny import tiny

from attnlab.config import model_of
from attnlab.core import mechanisms, positions
from attnlab.engines import recurrent, sharded
from attnlab.sharding import batch_sharding, gathered, make_mesh, put
from attnlab.step import init_params, token_losses
from attnlab.train import train
from attnlab.workdir import Workdir

ROWS = ((20, 12), (3, 9, 15))
"""Documents of the two rows: some lie on several devices, one device has several, and the last
five slots are empty."""


def case_of(attention: str, position: str = "rope", **fields) -> Case:
    return Case(mechanisms.get(attention)(**fields), positions.get(position)())


@pytest.fixture
def programs(monkeypatch):
    """The functions that were compiled as the program of each device."""
    found, across = [], sharded.across

    def record(function, *specs):
        found.append(function)
        return across(function, *specs)

    monkeypatch.setattr(sharded, "across", record)
    return found


def check(case: Case, mesh: str, length: int = 32, rows=ROWS) -> None:
    """Outputs and all gradients on a mesh are those of one device."""
    inputs = documents(draw(case, length=length), *rows)
    wanted = outputs_and_gradients(case, inputs)
    with jax.set_mesh(make_mesh(mesh)):
        got = outputs_and_gradients(case, inputs)
    assert_close(jax.tree.map(np.asarray, got), wanted)


FORMS = [
    (case_of("softmax"), "data:2,seq:4", 32),
    (replace(case_of("softmax", "t5"), causal=False), "data:2,seq:2,tensor:2", 34),
    (replace(case_of("softmax"), normaliser=small("sparsemax")), "data:4,seq:2", 32),
    (case_of("window", window=14), "seq:8", 32),
    (case_of("window", "none", window=3, sinks=2), "seq:8", 32),
    (case_of("linear", chunk=4), "data:2,seq:4", 32),
    (case_of("delta", rate=2.0, chunk=4), "seq:4,tensor:2", 32),
]
MORE = [
    (case_of("softmax", "alibi", tile=4), "seq:8", 40),
    (case_of("window", "t5", window=5), "seq:4,tensor:2", 32),
    (replace(case_of("window", window=6), causal=False), "seq:8", 32),
    (replace(case_of("window", window=3, sinks=5), causal=False), "data:2,seq:4", 32),
    (replace(case_of("linear", chunk=4), causal=False), "data:2,seq:4", 32),
    (case_of("gated_delta", chunk=5), "data:1,seq:8", 40),
    (case_of("gated_slots", "none", slots=4, chunk=4), "data:2,seq:4", 32),
    (case_of("block", block=7, offset=3), "seq:8", 32),
    (case_of("bigbird", "t5", block=4, window=1, first=1), "data:2,seq:4", 32),
]


@pytest.mark.parametrize(
    ("case", "mesh", "length"),
    [*FORMS, *(pytest.param(*form, marks=pytest.mark.slow) for form in MORE)],
    ids=lambda value: str(value),
)
def test_outputs_and_gradients_are_those_of_one_device(case, mesh, length, programs):
    check(case, mesh, length)
    assert programs, "nothing was split"


@pytest.mark.parametrize("decays", [pytest.param((1, 0), marks=pytest.mark.slow), (6, 5)])
def test_what_decays_is_passed_on_as_it_decays(decays):
    draws = np.random.default_rng(0)
    B, N, H, G, D, E = 2, 16, 4, 2, 6, 5
    q, k, v = (draws.standard_normal((B, N, n, d)) for n, d in ((H, D), (G, D), (G, E)))
    over_keys, over_values = (-draws.random((B, N, G, n)) if n else None for n in decays)
    seg = np.asarray([[0] * 16, [1] * 3 + [-1] + [2] * 9 + [-1] * 3], np.int32)
    out_slope, memory_slope = draws.standard_normal((B, N, H, E)), draws.standard_normal((G, D, E))

    def loss(tokens):
        q, k, v, *decays = tokens
        fading = dict(zip(("key_decay", "value_decay"), decays))
        out, state = recurrent.attend(q, k, v, jnp.asarray(seg), **fading, chunk=2)
        return jnp.sum(out * out_slope) + jnp.sum(state.memory * memory_slope), (out, state)

    tokens = jax.tree.map(np.float32, (q, k, v, over_keys, over_values))
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    wanted = compiled(tokens)
    with jax.set_mesh(make_mesh("data:2,seq:4")):
        got = compiled(tokens)
    assert_close(jax.tree.map(np.asarray, got), wanted)


def test_a_length_that_devices_do_not_divide_is_computed_as_before(programs):
    check(case_of("softmax"), "data:2,seq:4", 33)
    assert not programs


REACHES = {"window": "attention.window.window=64", "block": "attention.block.block=64"}
"""Less than the whole of a short sequence."""


def splitting() -> list[str]:
    names = [name for name in mechanisms.names() if mechanisms.get(name).spreads]
    return [name for name in names if not hasattr(mechanisms.get(name)(), "parts")]


@pytest.mark.parametrize(
    "names",
    [["softmax"], pytest.param(splitting(), marks=pytest.mark.slow)],
    ids=lambda names: "+".join(names),
)
def test_no_device_holds_a_whole_sequence(names):
    """Of a model of mechanisms that say so, forward and backward."""
    N = 8 * 37
    changes = [REACHES[name] for name in names if name in REACHES]
    changes += [f"model.layers={len(names)}", f"task.length={N}"]
    config = tiny(*changes, attention="+".join(names))
    model, mesh = model_of(config, 257), make_mesh("seq:8")
    params = jax.eval_shape(lambda: init_params(model, 0))
    arrays = "tokens", "targets", "pos", "seg"
    placed = put({name: np.zeros((2, N), np.int32) for name in arrays}, batch_sharding(mesh, 2))

    def loss(params, batch):
        return jnp.sum(token_losses(model, params, batch, train=True).nll)

    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.zeros_like, params)
        text = jax.jit(jax.grad(loss)).lower(params, placed).compile().as_text()
    shapes = set(re.findall(r"\w+\[[\d,]+\]", text))
    assert any("[2,37," in shape for shape in shapes)
    assert not [z for z in shapes if max(map(int, re.findall(r"\d+", z.partition("[")[2]))) >= N]


QUICK = ("train.steps=3", "train.eval_every=2", "evaluate.tokens=64", "sample.tokens=2")


def losses_of(folder) -> list[float]:
    text = (folder / "metrics.jsonl").read_text()
    return [float(z) for z in re.findall(r'"train/loss": ([\d.]+)', text)]


@pytest.mark.slow
def test_training_on_a_mesh_of_sequences_and_heads_loses_what_rows_lose(tmp_path):
    for number, mesh in enumerate(("data:8", "data:2,seq:2,tensor:2")):
        config = tiny(f"mesh={mesh}", "train.steps=3", "train.eval_every=0")
        with Workdir(tmp_path / str(number)) as workdir:
            trainer = make_trainer(config, workdir)
            with trainer.checkpoints, trainer.writer, jax.set_mesh(trainer.mesh):
                trainer.loop(lambda: False)
        assert trainer.step._cache_size() == 1
    rows, both = losses_of(tmp_path / "0"), losses_of(tmp_path / "1")
    assert len(rows) == 3
    np.testing.assert_allclose(both, rows, rtol=1e-4)


@pytest.mark.slow
def test_a_run_on_such_a_mesh_is_scored_and_says_what_it_gathers(tmp_path, caplog):
    """The whole of ``attnlab train``; a mechanism without a form is named, and trains all the
    same."""
    config = tiny(
        "mesh=data:2,seq:2,tensor:2", *QUICK, "model.layers=2", attention="softmax+strided"
    )
    with caplog.at_level("INFO", "attnlab"):
        assert train(config, tmp_path) == 0
    assert "attention strided has no sequence-parallel form" in caplog.text
    assert "attention softmax has no" not in caplog.text
    assert len(losses_of(tmp_path)) == 3
    assert (tmp_path / "report.html").exists()


def test_only_what_a_mesh_would_split_is_named():
    layers = tuple(mechanisms.get(name)() for name in ("softmax", "strided"))
    assert gathered(make_mesh("data:4,seq:2"), "softmax+strided", layers) == ["strided"]
    assert gathered(make_mesh("data:8"), "softmax+strided", layers) == []
