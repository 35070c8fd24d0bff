"""A task of points is trained, resumed, evaluated, compared and reported like any other."""

import json

import jax
import numpy as np
import pytest
from tiny import tiny_on

from attnlab import tasks
from attnlab.compare import compare
from attnlab.config import pointer_of
from attnlab.errors import UserError
from attnlab.evaluate import Stopped, evaluate
from attnlab.limits import validate
from attnlab.main import main
from attnlab.metrics import read_metrics
from attnlab.optimizer import make_optimizer
from attnlab.overrides import load
from attnlab.plan import estimate_cost
from attnlab.pointing import format_named, mix_counts, score_named
from attnlab.report import report
from attnlab.runs import open_run
from attnlab.step import init_params, init_state, make_step
from attnlab.tasks.synthetic.points import count_points
from attnlab.train import train

FEW = ("task.length=6", "task.min_points=4", "model.causal=false", "evaluate.tokens=96")


def built(name, *changes):
    config = tiny_on(name, *FEW, *changes)
    task = tasks.build(config.task, seed=config.seed)
    model = pointer_of(config, task.recipe)
    return config, task, model, init_params(model, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("hull")
    assert train(tiny_on("hull", *FEW), path, ["attnlab", "train"]) == 0
    return path


@pytest.mark.parametrize("name", ["hull", "delaunay", "tsp"])
def test_scores_are_those_of_the_decoded_sequences(name):
    config, task, model, params = built(name, "evaluate.batch=8")
    found = score_named(model, params, task, config, "test", 0, tokens=20 * 6)
    assert (found["rows"], found["length"], found["trained_length"]) == (20, 6, 6)
    drawn = [task.draw("test", step, range(8), 6) for step in range(3)]
    rows = {key: np.concatenate([d[key] for d in drawn])[:20] for key in drawn[0]}
    inputs = (rows[key] for key in ("tokens", "pos", "seg"))
    output = np.asarray(model.decode({"params": params}, *inputs, task.recipe.beams))
    measures = task.recipe.measure(rows, output)
    assert found["accuracy"] == pytest.approx(measures["accuracy"].mean())
    for measure, value in task.recipe.total(measures).items():
        assert found[measure] == (None if value is None else pytest.approx(value))
    inputs = (rows[key] for key in ("tokens", "pos", "seg", "targets"))
    scores = np.asarray(model.apply({"params": params}, *inputs)[0])
    asked = rows["targets"] >= 0
    nats = -np.take_along_axis(scores, np.maximum(rows["targets"], 0)[..., None], -1)[..., 0]
    assert found["nats_per_answer"] == pytest.approx(float(nats[asked].mean()), rel=1e-4)
    assert found["asked"] == asked.sum()
    count = count_points(rows["seg"])
    assert [r["points"] for r in found["by_points"]] == sorted(set(count.tolist()))
    for row in found["by_points"]:
        chosen = count == row["points"]
        assert row["rows"] == chosen.sum()
        assert row["accuracy"] == pytest.approx(measures["accuracy"][chosen].mean())
    assert "nats per answer" in format_named(found)
    json.dumps(found, allow_nan=False)


def test_the_same_rows_at_every_call_and_others_in_every_split():
    config, task, model, params = built("hull")
    scores = [
        score_named(model, params, task, config, split, 0, tokens=96)["nats_per_answer"]
        for split in ("test", "test", "validation", "train")
    ]
    assert scores[0] == scores[1]
    assert len(set(scores)) == 3


def test_what_cannot_be_scored_is_refused():
    config, task, model, params = built("tsp")
    with pytest.raises(UserError, match="stride=2: rows of task tsp are scored whole"):
        score_named(model, params, task, config, "test", 0, stride=2)
    with pytest.raises(UserError, match=r"length=3.*at least 4"):
        score_named(model, params, task, config, "test", 0, length=3)
    with pytest.raises(UserError, match=r"length=13.*at most 12"):
        score_named(model, params, task, config, "test", 0, length=13)
    with pytest.raises(Stopped):
        score_named(model, params, task, config, "test", 0, stop=lambda: True)


def test_counts_are_mixed_by_their_rows():
    found = ((5, 3, 1.0), (7, 1, 0.0), (8, 2, 0.5))
    rows = [{"points": n, "rows": k, "accuracy": share} for n, k, share in found]
    assert mix_counts(rows) == [{"at": 4, "accuracy": 0.75}, {"at": 8, "accuracy": 0.5}]


def test_a_finished_run_has_scores_pictures_and_a_report(run):
    test = json.loads((run / "test.json").read_text())
    assert (test["task"], test["rows"], len(test["examples"])) == ("hull", 1024, 6)
    assert 0 <= test["accuracy_95"][0] <= test["accuracy"] <= test["accuracy_95"][1] <= 1
    assert [row["points"] for row in test["by_points"]] == [4, 5, 6]
    page = (run / "report.html").read_text()
    assert f"{test['accuracy']:.4f} of the answers right" in page
    assert "of 6 points, after 12 steps" in page
    assert page.count("data:image/png") == 2
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation/accuracy" in row] == [6]
    losses = [row["train/nats_per_answer"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]


def test_a_run_is_evaluated_at_more_points_than_it_was_trained_on(run, capsys):
    evaluate(run, length=9)
    assert "rows of at most 9 points (trained on 6)" in capsys.readouterr().out
    found = json.loads((run / "evaluations" / "test-length9-step12.json").read_text())
    assert [row["points"] for row in found["by_points"]] == [4, 5, 6, 7, 8, 9]
    assert (run / "evaluations" / "test-length9-step12.png").stat().st_size > 5000


def test_a_suite_goes_over_numbers_of_points(run, capsys):
    assert main(["evaluate", f"--workdir={run}", "--suite=long_context", "--toy"]) == 0
    out = capsys.readouterr().out
    assert "needs at least 4" in out  # 3 points
    found = json.loads((run / "evaluations" / "long_context-toy-test-step12.json").read_text())
    assert [cell["at"] for cell in found["lengths"]["12"]["cells"]] == [4, 8]


def test_commands_about_a_run_of_points(run, capsys):
    assert main(["plan", f"--workdir={run}"]) == 0
    assert "embedding 48" in capsys.readouterr().out  # x, y and 1, of width 16
    assert main(["generate", f"--workdir={run}"]) == 2
    assert "was trained on task hull, which is no text" in capsys.readouterr().err
    report([str(run), str(run)])
    assert "hull" in capsys.readouterr().out
    assert open_run(run).step == 12


def test_the_plan_counts_what_the_network_has():
    config, _, model, params = built("delaunay")
    estimate = estimate_cost(config, model)
    sizes = {name: sum(z.size for z in part.values()) for name, part in _flat(params).items()}
    assert estimate.parameters["decoder"] == sizes["decoder"]
    assert sum(estimate.parameters.values()) == sum(sizes.values())
    longer = built("delaunay", "task.length=12")
    assert estimate_cost(*longer[:3:2]).activations > 1.5 * estimate.activations > 0


def _flat(params):
    return {
        name: {jax.tree_util.keystr(p): z for p, z in jax.tree_util.tree_leaves_with_path(part)}
        for name, part in params.items()
    }


@pytest.mark.slow
def test_mechanisms_are_compared_on_points(tmp_path):
    config = tiny_on("hull", *FEW, "train.steps=2")
    assert compare(config, "softmax,transformer_xl", tmp_path) == 2
    found = json.loads((tmp_path / "comparison.json").read_text())["entries"]
    assert [entry["state"] for entry in found] == ["finished", "refused"]
    assert "carries its memory from batch to batch" in found[1]["reason"]
    assert "accuracy" in found[0]["test"]
    text = (tmp_path / "comparison.md").read_text()
    assert "How many points?" in text
    assert "| mechanism | 4 | 5 | 6 |" in text


def test_accumulating_changes_nothing():
    found = []
    for parts in (1, 4):
        config, task, model, _ = built("tsp", f"optimizer.accumulate={parts}")
        optimizer = make_optimizer(config.optimizer, 12)
        state = init_state(model, optimizer, config)
        found.append(jax.jit(make_step(model, optimizer, config))(state, task.batch(0))[1])
    for name in ("loss", "grad_norm"):
        assert float(found[0][name]) == pytest.approx(float(found[1][name]), rel=1e-4)


def test_a_causal_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.causal=true.*set model\.causal=false"):
        train(tiny_on("hull", *FEW[:2]), tmp_path)


@pytest.mark.parametrize(
    ("task", "position"), [("hull", "none"), ("delaunay", "absolute"), ("tsp", "none")]
)
def test_the_config_has_a_position_where_the_order_matters(task, position):
    config = load(f"configs/pointer.py:task={task},attention=linear,points=7,width=32")
    validate(config)
    assert (config.position.name, config.attention.name) == (position, "linear")
    assert (config.task.length, config.model.width) == (7, 32)
    assert load(f"configs/pointer.py:task={task},position=rope").position.name == "rope"


@pytest.mark.slow
def test_a_hull_of_five_points_is_learnt(tmp_path):
    config = load("configs/pointer.py:points=5,width=64")
    for path, value in (("steps", 1500), ("eval_every", 0), ("tensorboard", False)):
        config.train[path] = value
    assert train(config, tmp_path) == 0
    assert json.loads((tmp_path / "test.json").read_text())["accuracy"] > 0.8
