"""A synthetic task is trained, resumed, evaluated, compared and reported like any other."""

import json

import pytest
from tiny import home, labelled, pictures, tiny, tiny_on

from attnlab import tasks
from attnlab.compare import compare
from attnlab.config import base, from_json, to_json
from attnlab.errors import UserError
from attnlab.evaluate import evaluate
from attnlab.kinds import kind_of
from attnlab.limits import validate
from attnlab.main import main
from attnlab.metrics import read_metrics
from attnlab.overrides import override
from attnlab.report import report
from attnlab.runs import open_run
from attnlab.suite import lengths
from attnlab.train import train

SMALL = ("task.vocab=12", "task.pairs=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("mqar")
    assert train(tiny_on("mqar", *SMALL), path, ["attnlab", "train"]) == 0
    return path


def test_a_finished_run_has_scores_pictures_and_a_report(run):
    test = json.loads((run / "test.json").read_text())
    assert (test["task"], test["rows"], test["asked"]) == ("mqar", 1024, 2048)
    assert 0 <= test["accuracy_95"][0] <= test["accuracy"] <= test["accuracy_95"][1] <= 1
    page = (run / "report.html").read_text()
    assert f"{test['accuracy']:.4f} of the answers right" in page
    assert page.count("data:image/png") == 2
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation/accuracy" in row] == [6]
    assert all(
        row["train/nats_per_answer"] == row["train/loss"] for row in rows if "train/loss" in row
    )


def test_it_is_evaluated_at_another_length(run, capsys):
    evaluate(run, length=48)
    assert "rows of 48 tokens (trained on 32)" in capsys.readouterr().out
    found = json.loads((run / "evaluations" / "test-length48-step12.json").read_text())
    assert found["length"] == 48
    assert (run / "evaluations" / "test-length48-step12.png").stat().st_size > 5000


@pytest.mark.parametrize("command", ["generate", "needle", "dilution"])
def test_commands_about_text_say_that_there_is_none(run, command, capsys):
    assert main([command, f"--workdir={run}"]) == 2
    assert "was trained on task mqar, which is no text" in capsys.readouterr().err


def test_a_run_is_opened_without_its_data(run):
    opened = open_run(run)
    assert (opened.step, opened.tokenizer) == (12, None)
    assert opened.task().draw("test", 0, range(2), 32)["tokens"].shape == (2, 32)


def test_runs_are_compared_by_their_accuracy(run, tmp_path, capsys):
    report([str(run), str(run)])
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert "mqar" in out
    with pytest.raises(UserError, match="no config"):
        report([str(tmp_path)])


def test_mechanisms_are_compared_on_a_synthetic_task(tmp_path):
    config = tiny_on("mqar", *SMALL, "train.steps=2")
    assert compare(config, "softmax,window", tmp_path, [("attention.window.window", "4")]) == 0
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [entry["state"] for entry in found["entries"]] == ["finished"] * 2
    assert all("accuracy" in entry["test"] and not entry["needle"] for entry in found["entries"])
    text = (tmp_path / "comparison.md").read_text()
    assert "| mechanism | accuracy |" in text
    assert "How far back?" in text


def test_the_task_of_a_config_is_chosen_like_its_attention():
    config = base()
    override(config, "task.length", "64")
    override(config, "task", "mqar")
    override(config, "task.pairs", "4")
    assert config.task.to_dict() == {
        "name": "mqar", "vocab": 256, "pairs": 4, "power": 0.01, "passes": 1, "noise": False,
        "length": 64, "batch": 16,
    }  # fmt: skip
    assert to_json(from_json(to_json(config))) == to_json(config)
    with pytest.raises(UserError, match=r"unknown config field 'task.corpus'"):
        override(config, "task.corpus", "kjv")


def test_what_a_synthetic_task_cannot_be_is_one_line(tmp_path):
    with pytest.raises(UserError, match="needs at least 32"):
        tasks.build(tiny_on("mqar", "task.length=16").task)
    with pytest.raises(UserError, match="dilution_every=2: looks at held-out text"):
        train(tiny_on("mqar", *SMALL, "train.dilution_every=2"), tmp_path)


LISTS = ("task.max_depth=3", "task.max_args=3", "task.min_length=4", "model.causal=false")


def test_a_classifier_is_trained_and_scored(tmp_path, capsys):
    config = tiny_on("listops", *LISTS)
    assert train(config, tmp_path, ["attnlab", "train"]) == 0
    test = json.loads((tmp_path / "test.json").read_text())
    assert (test["rows"], test["asked"], test["by_distance"]) == (1024, 1024, [])
    assert test["accuracy"] == test["rows_right"]
    capsys.readouterr()
    evaluate(tmp_path, length=40)
    assert "rows of 40 tokens (trained on 32)" in capsys.readouterr().out
    assert main(["plan", f"--workdir={tmp_path}"]) == 0
    assert "embedding 256" in capsys.readouterr().out  # 16 ids of width 16


def test_accumulating_a_classifier_changes_nothing(tmp_path):
    losses = []
    for parts in (1, 4):
        path = tmp_path / str(parts)
        train(tiny_on("listops", *LISTS, f"optimizer.accumulate={parts}"), path)
        losses.append(
            [r["train/loss"] for r in read_metrics(path / "metrics.jsonl") if "train/loss" in r]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_causal_classifier_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.causal=true.*set model\.causal=false"):
        train(tiny_on("listops", *LISTS[:-1]), tmp_path)


def test_labelled_rows_are_pure_and_their_splits_apart():
    task = tasks.build(tiny_on("listops", *LISTS).task, seed=3)
    batch, part = task.batch(5), task.batch(5, slice(2, 4))
    assert all((batch[name][2:4] == part[name]).all() for name in batch)
    assert not (batch["tokens"] == task.batch(6)["tokens"]).all()
    few, many = (task.draw("test", 0, range(n), 32) for n in (3, 30))
    assert all((few[name] == many[name][:3]).all() for name in few)
    drawn = [task.draw(split, 0, range(200), 32)["tokens"] for split in ("train", "test")]
    train_rows, test_rows = ({row.tobytes() for row in rows} for rows in drawn)
    assert not train_rows & test_rows


@pytest.fixture
def small_pool(monkeypatch):
    """Data that are drawn lie with those of the other tests, and are few."""
    home()
    monkeypatch.setattr("attnlab.tasks.stored.pool.PART", 40)


def changes_of(name):
    """What the defaults of a task need, where there is neither network nor time."""
    if name in ("text_classification", "retrieval"):
        return "task.length=600", f"task.source={labelled()}"
    if name == "image":
        return "task.length=64", f"task.source={pictures()}"
    if name == "pathfinder":
        return "task.length=1024", "task.pool=16"
    return ("task.length=600",)


def of_tokens():
    kinds = {name: tasks.recipes.get(name).kind for name in tasks.recipes.names()}
    return [name for name, kind in kinds.items() if kind not in ("text", "pointers")]


@pytest.mark.parametrize("name", of_tokens())
def test_every_task_trains_with_its_defaults(name, small_pool):
    config = tiny_on(name, *changes_of(name))
    validate(config)
    task = tasks.build(config.task, seed=0)
    batch = task.batch(0)
    assert set(batch) == {"tokens", "targets", "pos", "seg"}
    assert all(z.shape[0] == 8 for z in batch.values())
    assert batch["tokens"].shape[:2] == (8, config.task.length)
    assert (batch["targets"].reshape(8, -1) >= 0).any(1).all()
    assert not kind_of(config).has_text


def test_a_mechanism_that_carries_starts_anew_in_every_row():
    config = tiny_on("copy", attention="transformer_xl")
    validate(config)
    assert "packing" not in config.task
    assert tiny(attention="transformer_xl").task.packing == "stream"


def test_a_suite_measures_many_lengths_and_goes_on_where_it_stopped(run, capsys):
    assert main(["evaluate", f"--workdir={run}", "--suite=long_context", "--toy"]) == 0
    said = capsys.readouterr().out
    assert "trained on 32 tokens" in said
    file = run / "evaluations" / "long_context-toy-test-step12.json"
    found = json.loads(file.read_text())
    assert list(found["lengths"]) == ["8", "16", "32", "64"]
    assert all("accuracy" in each and each["cells"] for each in found["lengths"].values())
    assert file.with_suffix(".png").stat().st_size > 10_000
    found["lengths"]["64"]["accuracy"] = 0.125  # as an earlier call might have left it
    del found["lengths"]["16"]
    file.write_text(json.dumps(found))
    assert main(["evaluate", f"--workdir={run}", "--suite=long_context", "--toy"]) == 0
    assert "64   accuracy 0.1250" in capsys.readouterr().out
    assert set(json.loads(file.read_text())["lengths"]) == {"8", "16", "32", "64"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite=long"], "did you mean 'long_context'"),
        (["--suite=long_context", "--stride=4"], "a suite reads every token once"),
        (["--toy"], "--toy belongs to --suite"),
    ],
)
def test_a_wrong_suite_is_one_line(run, flags, message, capsys):
    assert main(["evaluate", f"--workdir={run}", *flags]) == 2
    assert message in capsys.readouterr().err


def test_lengths_of_a_suite_double_around_that_of_training():
    assert lengths(64, 512) == [16, 32, 64, 128, 256, 512]
    assert lengths(100, 150) == [25, 50, 100]
    assert lengths(1, 8) == [1, 2, 4, 8]
    assert lengths(512, 7) == [7]


@pytest.mark.parametrize(
    "name",
    [
        "text_classification",
        "image",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("retrieval", "pathfinder")),
    ],
)
def test_stored_rows_are_trained_on_and_every_held_out_one_is_scored_once(
    name, small_pool, tmp_path, capsys
):
    changes = [c.replace("task.length=600", "task.length=64") for c in changes_of(name)]
    config = tiny_on(name, *changes, "model.causal=false", "train.steps=4")
    assert train(config, tmp_path, ["attnlab", "train"]) == 0
    task = tasks.build(config.task, seed=0)
    test = json.loads((tmp_path / "test.json").read_text())
    assert (test["task"], test["rows"]) == (name, task.size("test"))
    assert test["rows"] == test["asked"]
    page = (tmp_path / "report.html").read_text()
    assert f"{task.size('train')}" in page
    capsys.readouterr()
    if name in ("image", "pathfinder"):
        with pytest.raises(UserError, match=r"length=4096: .* set task\.length"):
            evaluate(tmp_path, length=4096)
    else:
        evaluate(tmp_path, length=96)
        assert "rows of 96 tokens (trained on 64)" in capsys.readouterr().out
    assert main(["plan", f"--workdir={tmp_path}"]) == 0


def test_a_classifier_of_texts_learns_what_tells_them_apart(tmp_path):
    changes = (f"task.source={labelled()}", "task.length=64", "model.causal=false")
    steps = ("train.steps=60", "train.eval_every=0", "train.save_every=0", "model.width=32")
    assert train(tiny_on("text_classification", *changes, *steps), tmp_path) == 0
    assert json.loads((tmp_path / "test.json").read_text())["accuracy"] > 0.9
