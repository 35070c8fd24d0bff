"""Scores of synthetic rows are what the logits of the model say, by depth and by distance."""

import jax
import numpy as np
import pytest
from tiny import tiny_on

from attnlab import answers, cross_entropy, tasks
from attnlab.answers import score_answers, summarise
from attnlab.config import model_of
from attnlab.errors import UserError
from attnlab.evaluate import Stopped
from attnlab.step import init_params

COPY = ("task.vocab=6", "task.size=3")


def built(*changes: str):
    config = tiny_on("copy", *COPY, *changes)
    task = tasks.build(config.task, seed=config.seed)
    model = model_of(config, task.vocab_size)
    return config, task, model, init_params(model, 0)


def test_accuracy_and_loss_are_those_of_the_logits():
    config, task, model, params = built("evaluate.batch=8")
    found = score_answers(model, params, task, config, "test", 0, tokens=20 * 32)
    assert (found["rows"], found["asked"], found["length"]) == (20, 60, 32)
    drawn = [task.draw("test", step, range(8), 32) for step in range(3)]
    rows = {name: np.concatenate([d[name] for d in drawn])[:20] for name in drawn[0]}
    logits, _ = model.apply({"params": params}, *(rows[n] for n in ("tokens", "pos", "seg")))
    asked = rows["targets"] >= 0
    logs = np.asarray(jax.nn.log_softmax(logits))[asked]
    targets = rows["targets"][asked]
    assert found["accuracy"] == pytest.approx((logs.argmax(-1) == targets).mean())
    nats = -logs[np.arange(60), targets].mean()
    assert found["nats_per_answer"] == pytest.approx(float(nats), rel=1e-5)


def test_the_same_rows_at_every_call_and_others_in_every_split():
    config, task, model, params = built()
    scores = [
        score_answers(model, params, task, config, split, 0, tokens=640)["nats_per_answer"]
        for split in ("test", "test", "validation", "train")
    ]
    assert scores[0] == scores[1]
    assert len(set(scores)) == 3


def test_any_length_may_be_scored():
    config, task, model, params = built()
    found = score_answers(model, params, task, config, "test", 0, length=67, tokens=67 * 4)
    assert (found["length"], found["trained_length"], found["rows"]) == (67, 32, 4)
    assert [row["low"] for row in found["by_distance"]] == [64.0]


def test_what_cannot_be_scored_is_refused():
    config, task, model, params = built()
    with pytest.raises(UserError, match="stride=8: rows of task copy are scored whole"):
        score_answers(model, params, task, config, "test", 0, stride=8)
    with pytest.raises(UserError, match=r"length=5.*at least 6"):
        score_answers(model, params, task, config, "test", 0, length=5)
    with pytest.raises(Stopped):
        score_answers(model, params, task, config, "test", 0, stop=lambda: True)


def test_answers_are_counted_where_they_are_asked():
    asked = np.array([[0, 1, 0, 1], [0, 0, 0, 1]], bool)
    right = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    depth = np.array([[np.nan, 0, np.nan, 2 / 3], [np.nan, np.nan, np.nan, 0]])
    found = summarise(asked, right, np.ones((2, 4)), depth)
    assert (found["rows"], found["asked"], found["rows_right"]) == (2, 3, 0.5)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["by_distance"] == [
        {"low": 1.0, "high": 2.0, "asked": 2, "accuracy": 0.5},
        {"low": 2.0, "high": 4.0, "asked": 1, "accuracy": 1.0},
    ]
    assert [(row["asked"], row["accuracy"]) for row in found["by_depth"]] == [(2, 1.0), (1, 0.0)]


def test_a_task_without_depth_has_no_curves():
    config = tiny_on("frequent_words", "task.asked=1", "task.length=48")
    task = tasks.build(config.task, seed=0)
    model = model_of(config, task.vocab_size)
    found = score_answers(model, init_params(model, 0), task, config, "test", 0, tokens=480)
    assert found["by_depth"] == found["by_distance"] == []
    assert "distance" not in answers.format_answers(found)


@pytest.mark.parametrize("logits", [1, 100, 10**6])
def test_the_likeliest_token_is_the_same_in_pieces(logits, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_IN_FLIGHT", logits)
    normal = np.random.default_rng(0).standard_normal
    x, table = normal((2, 7, 4)).astype("f"), normal((11, 4)).astype("f")
    found = cross_entropy.likeliest(jax.numpy.asarray(x), jax.numpy.asarray(table))
    np.testing.assert_array_equal(found, (x @ table.T).argmax(-1))
