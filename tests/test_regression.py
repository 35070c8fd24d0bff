"""In-context regression: rows have the stated moments, oracles are those of numpy, a model sees no
answer before it is asked, and its scores are sums over held-out rows."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_on

from attnlab import tasks
from attnlab.compare import compare
from attnlab.config import regressor_of
from attnlab.errors import UserError
from attnlab.evaluate import evaluate
from attnlab.in_context import ranges, score_examples, summarise
from attnlab.kinds import kind_of
from attnlab.main import main
from attnlab.metrics import read_metrics
from attnlab.report import report
from attnlab.step import init_params, losses_of, predicted
from attnlab.tasks.regression import Regression, least_squares, ridge
from attnlab.train import train

seeds = st.integers(0, 2**32 - 1)
recipes = st.builds(
    Regression,
    dim=st.integers(1, 6),
    noise=st.floats(0.01, 1),
    condition=st.floats(1, 50),
    correlation=st.floats(-0.9, 0.9),
)


@pytest.fixture(scope="module")
def prompts():
    """8,000 rows of 41 examples of 5 numbers: x, y."""
    return Regression().rows(np.random.default_rng(0), 8_000, 41)


def risk(y, guess):
    """Mean squared error of the last prediction of each row."""
    return float(np.square(guess[:, -1] - y[:, -1]).mean())


@given(recipes, seeds, st.integers(1, 20))
@settings(max_examples=30)
def test_rows_are_float32_of_the_stated_shapes(recipe, seed, examples):
    x, y = recipe.rows(np.random.default_rng(seed), 3, examples)
    assert x.shape == (3, examples, recipe.dim)
    assert y.shape == (3, examples)
    assert x.dtype == y.dtype == np.float32


@given(recipes, seeds)
@settings(max_examples=30)
def test_least_squares_is_that_of_numpy(recipe, seed):
    x, y = recipe.rows(np.random.default_rng(seed), 2, 2 * recipe.dim + 4)
    found = least_squares(x, y)
    assert (found[:, 0] == 0).all()
    for row in range(2):
        for i in range(1, y.shape[1]):
            seen, said = x[row, :i].astype(np.float64), y[row, :i].astype(np.float64)
            weights = np.linalg.lstsq(seen, said, rcond=None)[0]
            assert found[row, i] == pytest.approx(x[row, i] @ weights, rel=1e-5, abs=1e-5)


@given(recipes, seeds)
@settings(max_examples=30)
def test_ridge_is_least_squares_of_examples_that_say_zero(recipe, seed):
    """sqrt(d) noise e_i -> 0, once for each coordinate, before all others."""
    x, y = recipe.rows(np.random.default_rng(seed), 3, 9)
    prior = np.sqrt(recipe.dim) * recipe.noise * np.eye(recipe.dim)
    told = np.concatenate([np.stack([prior] * 3), x.astype(np.float64)], 1)
    zeros = np.concatenate([np.zeros((3, recipe.dim)), y], 1)
    expected = least_squares(told, zeros)[:, recipe.dim :]
    np.testing.assert_allclose(ridge(x, y, recipe.noise), expected, rtol=1e-5, atol=1e-6)


def test_risks_are_those_measured_at_five_dimensions_and_forty_examples(prompts):
    x, y = prompts
    assert risk(y, np.zeros_like(y)) == pytest.approx(1.01, rel=0.04)
    assert risk(y, ridge(x, y, 0.1)) == pytest.approx(0.0115, rel=0.05)
    assert risk(y, least_squares(x, y)) == pytest.approx(risk(y, ridge(x, y, 0.1)), rel=0.02)


def test_nothing_has_less_risk_than_ridge_where_the_context_is_short():
    x, y = Regression(noise=0.5).rows(np.random.default_rng(1), 5000, 7)
    best = ridge(x, y, 0.5)
    for other in (least_squares(x, y), ridge(x, y, 0.4), ridge(x, y, 0.6), 0.9 * best, 1.1 * best):
        assert risk(y, best) < risk(y, other)


@pytest.mark.parametrize("options", [{}, {"condition": 10}, {"correlation": 0.7}])
def test_inputs_have_the_covariance_and_outputs_the_variance_stated(options):
    recipe = Regression(**options)
    x, y = recipe.rows(np.random.default_rng(2), 5000, 40)
    x = x.reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(x.T @ x / len(x), recipe.covariance(), atol=0.03)
    assert np.trace(recipe.covariance()) == pytest.approx(5)
    assert y.var() == pytest.approx(1.01, rel=0.05)


def test_the_condition_is_that_of_the_covariance():
    assert np.linalg.cond(Regression(condition=10).covariance()) == pytest.approx(10)
    np.testing.assert_array_equal(Regression().covariance(), np.eye(5))


def test_without_noise_as_many_examples_as_dimensions_are_enough():
    x, y = Regression(dim=3, noise=0).rows(np.random.default_rng(0), 100, 13)
    assert risk(y, least_squares(x, y)) < 1e-10
    np.testing.assert_array_equal(ridge(x, y, 0), least_squares(x, y))


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 0},
        {"noise": -0.1},
        {"condition": 0.5},
        {"correlation": 1.0},
        {"noise": float("nan")},
    ],
)
def test_options_without_meaning_are_refused_in_one_line(options):
    with pytest.raises(UserError) as caught:
        Regression(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [1, 7])
def test_half_an_example_is_refused(length):
    with pytest.raises(UserError, match="2 tokens an example"):
        tasks.build(tiny_on("regression", f"task.length={length}").task)


def test_rows_are_pure_and_every_question_stands_before_its_answer():
    task = tasks.build(tiny_on("regression", "task.dim=3").task, seed=3)
    batch, part = task.batch(5), task.batch(5, slice(2, 4))
    for name, z in batch.items():
        np.testing.assert_array_equal(z[2:4], part[name])
    assert batch["tokens"].shape == (8, 32, 4)
    assert (batch["tokens"][:, 0::2, 3] == 0).all()
    assert (batch["tokens"][:, 1::2, :3] == 0).all()
    np.testing.assert_array_equal(batch["targets"][:, 0::2], batch["tokens"][:, 1::2, 3])
    assert np.isnan(batch["targets"][:, 1::2]).all()
    asked = np.asarray(predicted({name: jax.numpy.asarray(z) for name, z in batch.items()}))
    np.testing.assert_array_equal(asked, np.tile([True, False], (8, 16)))
    few, many = (task.draw("test", 0, range(n), 12) for n in (3, 30))
    for name in few:
        np.testing.assert_array_equal(few[name], many[name][:3])
    others = [task.draw(split, 0, range(3), 12)["tokens"] for split in ("train", "validation")]
    assert all((few["tokens"] != other).any((1, 2)).all() for other in others)


@pytest.mark.parametrize(
    "attention",
    [
        "softmax",
        "linear",
        "lsh",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("window", "transformer_xl", "han")
        ),
    ],
)
def test_a_prediction_does_not_depend_on_its_answer_nor_on_anything_later(attention):
    config = tiny_on("regression", "task.dim=3", "model.layers=2", attention=attention)
    task = tasks.build(config.task, seed=0)
    model = regressor_of(config, task.recipe.features)
    params = init_params(model, 0)
    batch = task.batch(0)
    apply = jax.jit(
        lambda tokens: model.apply({"params": params}, tokens, batch["pos"], batch["seg"])[0]
    )
    before = np.asarray(apply(batch["tokens"]))
    for i in (0, 1, 7, 15):
        changed = batch["tokens"].copy()
        changed[:, 2 * i + 1 :] = np.random.default_rng(i).normal(
            size=changed[:, 2 * i + 1 :].shape
        )
        after = np.asarray(apply(changed))
        np.testing.assert_array_equal(after[:, : 2 * i + 1], before[:, : 2 * i + 1])
        assert (after[:, 2 * i + 1 :] != before[:, 2 * i + 1 :]).any()


def test_the_loss_is_the_squared_error_where_something_is_asked():
    config = tiny_on("regression")
    task = tasks.build(config.task, seed=0)
    model = regressor_of(config, task.recipe.features)
    params, batch = init_params(model, 0), task.batch(0)
    out = np.asarray(
        model.apply({"params": params}, batch["tokens"], batch["pos"], batch["seg"])[0]
    )
    losses = np.asarray(losses_of(model, params, batch).nll)
    y = batch["targets"][:, 0::2]
    np.testing.assert_allclose(losses[:, 0::2], (out[:, 0::2] - y) ** 2, rtol=1e-5)
    assert (losses[:, 1::2] == 0).all()


def test_the_read_in_keeps_a_length_in_sight_of_the_norms():
    """With directions alone, twice the y would be the same token to the first layer."""
    config = tiny_on("regression")
    model = regressor_of(config, 6)
    params = init_params(model, 0)
    embedding = params["backbone"]["embedding"]
    assert set(embedding) == {"kernel", "bias"}
    vectors = [np.eye(6)[5] * y @ embedding["kernel"] + embedding["bias"] for y in (1.0, 2.0)]
    first, second = (v / np.linalg.norm(v) for v in vectors)
    assert np.linalg.norm(first - second) > 0.05


def test_scores_are_ratios_of_sums_over_all_rows():
    draw = np.random.default_rng(0)
    y = draw.normal(size=(50, 70))
    guesses = {"model": y + 0.1, "least_squares": 0 * y, "ridge": y, "zero": 0 * y}
    found = summarise(y, guesses)
    scale = np.square(y).mean()
    assert found["normalised_squared_error"] == pytest.approx(0.01 / scale)
    assert found["oracles"] == pytest.approx({"least_squares": 1, "ridge": 0, "zero": 1})
    low, high = found["normalised_squared_error_95"]
    assert low < 0.01 / scale < high < 2 * low
    assert [(row["low"], row["high"]) for row in found["by_examples"]] == ranges(70)
    assert found["by_examples"][-1]["zero"] == pytest.approx(np.square(y[:, 64:]).mean())
    json.dumps(found, allow_nan=False)


def test_ranges_are_single_and_then_double():
    assert ranges(3) == [(0, 1), (1, 2), (2, 3)]
    assert ranges(300)[-3:] == [(64, 128), (128, 256), (256, 300)]
    assert ranges(65)[-2:] == [(63, 64), (64, 65)]


def test_scores_of_a_split_are_those_of_its_rows():
    config = tiny_on("regression", "task.dim=2")
    task = tasks.build(config.task, seed=0)
    model = kind_of(config).make_model(config, task)
    params = init_params(model, 0)
    whole = score_examples(model, params, task, config, "test", 1, tokens=320)
    assert (whole["rows"], whole["examples"], whole["length"]) == (10, 16, 32)
    drawn = [task.draw("test", number, range(8), 32) for number in range(2)]
    rows = {name: np.concatenate([part[name] for part in drawn])[:10] for name in drawn[0]}
    out = np.asarray(model.apply({"params": params}, rows["tokens"], rows["pos"], rows["seg"])[0])
    x, y = rows["tokens"][:, 0::2, :2], rows["targets"][:, 0::2]
    errors = [np.square(z - y) for z in (out[:, 0::2], least_squares(x, y), ridge(x, y, 0.1))]
    assert whole["normalised_squared_error"] == pytest.approx(
        errors[0].mean() / np.square(y).mean(), rel=1e-5
    )
    for row in whole["by_examples"]:
        found = [row[name] for name in ("model", "least_squares", "ridge")]
        assert found == pytest.approx([e[:, row["low"]].mean() for e in errors], rel=1e-4, abs=1e-9)
    with pytest.raises(UserError, match="scored whole"):
        score_examples(model, params, task, config, "test", 1, stride=4)
    longer = score_examples(model, params, task, config, "test", 1, length=48, tokens=96)
    assert (longer["rows"], longer["examples"]) == (2, 24)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("regression")
    assert train(tiny_on("regression", "task.dim=2"), path, ["attnlab", "train"]) == 0
    return path


def test_a_finished_run_has_scores_pictures_and_a_report(run):
    test = json.loads((run / "test.json").read_text())
    assert (test["task"], test["rows"], test["examples"]) == ("regression", 1024, 16)
    assert 0 < test["normalised_squared_error"] < 3
    assert test["oracles"]["ridge"] < test["oracles"]["zero"] == pytest.approx(1)
    page = (run / "report.html").read_text()
    assert f"{test['normalised_squared_error']:.4f} of the squared error of predicting 0" in page
    assert page.count("data:image/png") == 2
    rows = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in rows if "validation/normalised_squared_error" in r] == [6]
    assert all(r["train/squared_error"] == r["train/loss"] for r in rows if "train/loss" in r)


def test_a_run_is_evaluated_at_another_length_and_reported(run, capsys):
    evaluate(run, length=48)
    assert "24 examples, 48 tokens (trained on 32)" in capsys.readouterr().out
    assert (run / "evaluations" / "test-length48-step12.png").stat().st_size > 5000
    assert main(["evaluate", f"--workdir={run}", "--suite=long_context", "--toy"]) == 0
    assert "normalised squared error" in capsys.readouterr().out
    report([str(run), str(run)])
    assert "normalised squared error" in capsys.readouterr().out
    assert main(["plan", f"--workdir={run}"]) == 0
    assert main(["generate", f"--workdir={run}"]) == 2
    assert "which is no text" in capsys.readouterr().err


@pytest.mark.slow
def test_mechanisms_are_compared_by_their_error(tmp_path):
    config = tiny_on("regression", "task.dim=2", "train.steps=2")
    assert compare(config, "softmax,window", tmp_path, [("attention.window.window", "4")]) == 0
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [entry["state"] for entry in found["entries"]] == ["finished"] * 2
    assert all("normalised_squared_error" in entry["test"] for entry in found["entries"])
    text = (tmp_path / "comparison.md").read_text()
    assert "| mechanism | normalised squared error |" in text
    assert "Do more examples help?" in text
    assert "| ridge |" in text


def test_accumulating_changes_nothing(tmp_path):
    losses = []
    for parts in (1, 4):
        path = tmp_path / str(parts)
        train(tiny_on("regression", f"optimizer.accumulate={parts}", "train.steps=3"), path)
        rows = read_metrics(path / "metrics.jsonl")
        losses.append([r["train/loss"] for r in rows if "train/loss" in r])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_model_that_sees_the_answers_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.causal=false.*set model\.causal=true"):
        train(tiny_on("regression", "model.causal=false"), tmp_path)


@pytest.mark.slow
def test_a_few_hundred_steps_learn_to_regress(tmp_path):
    sizes = ("model.width=32", "model.layers=2", "task.length=24", "task.batch=64")
    config = tiny_on(
        "regression", *sizes, "task.dim=1", "train.steps=600", "optimizer.learning_rate=0.003",
        "train.eval_every=0", "train.save_every=0",
    )  # fmt: skip
    assert train(config, tmp_path) == 0
    test = json.loads((tmp_path / "test.json").read_text())
    assert test["normalised_squared_error"] < 0.4
    assert test["by_examples"][-1]["model"] < 0.2
