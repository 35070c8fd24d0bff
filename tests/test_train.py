"""A run may be interrupted, killed, starved or poisoned: it ends where it would have ended."""

import json
import logging
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import home, saved_state, tiny, trained

from attnlab import tasks
from attnlab.config import from_json
from attnlab.errors import DataError, UserError
from attnlab.main import main
from attnlab.metrics import read_metrics
from attnlab.tasks.text import TextTask
from attnlab.train import Trainer, train
from attnlab.workdir import Workdir

FILES = [
    "config.json",
    "run.json",
    "metrics.jsonl",
    "tokenizer.json",
    "loss.png",
    "context.png",
    "report.html",
    "sample.txt",
    "test.json",
    "validation.json",
    "baselines.json",
    "command.txt",
]
QUICK = ("train.eval_every=0", "sample.tokens=2")


def run(config, workdir):
    return train(config, workdir, ["attnlab", "train"])


def test_a_run_leaves_everything_that_a_reader_wants():
    path = trained()
    assert sorted([*FILES, "checkpoints"]) == sorted(
        p.name for p in path.iterdir() if p.name != "evaluations"
    )
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["12", "4", "8"]
    rows = read_metrics(path / "metrics.jsonl")
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, 13))
    assert [r["step"] for r in rows if "validation/bits_per_byte" in r] == [6]
    assert rows[11]["train/loss"] < rows[0]["train/loss"]
    result = json.loads((path / "test.json").read_text())
    assert result["bits_per_byte"] > 0
    assert json.loads((path / "run.json").read_text())["finished"]["step"] == 12


def test_a_finished_run_has_nothing_to_do_and_more_steps_continue_it(tmp_path, capsys, caplog):
    config = tiny("train.steps=3", *QUICK)
    assert run(config, tmp_path) == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.glob("checkpoints/**/*"))
    capsys.readouterr()
    assert run(config, tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: finished at step 3; nothing to do\n"
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.glob("checkpoints/**/*")) == before
    with caplog.at_level(logging.INFO):
        assert run(tiny("train.steps=5", *QUICK), tmp_path) == 0
    assert "resuming at step 3" in caplog.text
    assert (tmp_path / "checkpoints" / "5").is_dir()
    with pytest.raises(UserError, match=r"train\.steps: 5 -> 4"):
        run(tiny("train.steps=4", *QUICK), tmp_path)


def test_a_run_of_no_steps_can_still_be_evaluated_and_reported(tmp_path):
    assert run(tiny("train.steps=0", *QUICK), tmp_path) == 0
    assert (tmp_path / "checkpoints" / "0").is_dir()
    assert (tmp_path / "report.html").exists()
    # Nearly uniform over 257 ids: 8 bits a byte and a little for the end of the text.
    assert 7 < json.loads((tmp_path / "test.json").read_text())["bits_per_byte"] < 10


def test_the_step_is_compiled_once_also_after_a_restore(tmp_path):
    for steps in (3, 6):
        config = tiny(f"train.steps={steps}", *QUICK)
        with Workdir(tmp_path) as workdir:
            trainer = make_trainer(config, workdir)
            with trainer.checkpoints, trainer.writer:
                assert int(trainer.state.step) == steps - 3
                trainer.loop(lambda: False)
        assert trainer.step._cache_size() == 1


def make_trainer(config, workdir):
    from attnlab.sharding import make_mesh

    task = tasks.build(config.task, seed=config.seed)
    return Trainer(config, task, make_mesh(config.mesh), workdir)


def warnings_in(caplog):
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_wrong_config_may_be_corrected_as_long_as_nothing_is_saved(tmp_path, caplog):
    with pytest.raises(DataError, match="no file matches"):
        run(tiny("task.corpus=text:/nowhere/*.txt"), tmp_path)
    prompt = "x" * 40
    with pytest.raises(UserError, match="the prompt has 41 tokens"):
        run(tiny(f"sample.prompt={prompt}"), tmp_path)
    with pytest.raises(UserError, match="attention uniform forms no logits"):
        run(tiny(attention="uniform", position="alibi"), tmp_path)
    assert not list(tmp_path.iterdir())
    caplog.clear()
    assert run(tiny("train.steps=1", *QUICK), tmp_path) == 0
    assert not warnings_in(caplog), "a start that was refused is none"
    with pytest.raises(UserError, match=r"model\.width: 16 -> 32"):
        run(tiny("train.steps=1", "model.width=32", *QUICK), tmp_path)


def test_a_mesh_that_is_refused_leaves_a_run_as_it_was(tmp_path, caplog):
    config = tiny("train.steps=1", *QUICK)
    assert run(config, tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}
    with pytest.raises(UserError, match="has 3 places for 8 devices"):
        run(tiny("train.steps=2", "mesh=data:3", *QUICK), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()} == before
    caplog.clear()
    assert run(tiny("train.steps=2", *QUICK), tmp_path) == 0
    assert warnings_in(caplog) == ["config changed: train.steps: 1 -> 2"]


def signal_during(monkeypatch, place, name, number=signal.SIGTERM, when=1):
    """Sends this process a signal in the middle of the `when`-th call of a function."""
    original, calls = getattr(place, name), []

    def wrapped(*arguments, **options):
        calls.append(None)
        if len(calls) == when:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(place, name, wrapped)


@pytest.mark.parametrize(
    ("place", "name", "when", "number", "code"),
    [
        (tasks, "build", 1, signal.SIGTERM, 143),  # preparing data
        (TextTask, "documents", 1, signal.SIGTERM, 143),  # evaluating
        ("attnlab.train", "make_step", 1, signal.SIGTERM, 143),  # before the first step compiles
        (Trainer, "record", 5, signal.SIGINT, 130),  # between steps
        ("attnlab.report", "score_split", 2, signal.SIGTERM, 143),  # reporting
    ],
)
def test_a_signal_saves_and_the_run_ends_as_if_it_had_not_come(
    tmp_path, monkeypatch, place, name, when, number, code
):
    place = sys.modules[place] if isinstance(place, str) else place
    config = tiny()
    with monkeypatch.context() as patch:
        signal_during(patch, place, name, number, when)
        assert run(config, tmp_path) == code
    assert Workdir(tmp_path).finished() is None
    assert run(config, tmp_path) == 0
    assert saved_state(tmp_path, config) == saved_state(trained(), config)
    rows, expected = (read_metrics(p / "metrics.jsonl") for p in (tmp_path, trained()))
    losses = [[r["train/loss"] for r in rows if "train/loss" in r] for rows in (rows, expected)]
    assert losses[0] == losses[1]


def child(workdir, config, log):
    """A whole run in a process of its own; ends with its exit code."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    config = ["--config=" + str(config)] if config else []
    sys.exit(main(["train", f"--workdir={workdir}", *config]))


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Starts runs in processes that have imported everything already."""
    config = tmp_path_factory.mktemp("children") / "config.json"
    config.write_text(json.dumps(tiny("task.batch=4", "train.steps=40", *QUICK).to_dict()))
    context = multiprocessing.get_context("forkserver")
    modules = ("attnlab.train", "attnlab.report", "orbax.checkpoint", "matplotlib.figure", "grain")
    context.set_forkserver_preload(list(modules))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(home() / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

    def start(workdir):
        process = context.Process(target=child, args=(workdir, config, f"{workdir}.log"))
        process.start()
        return process

    def finish(workdir):
        process = start(workdir)
        process.join()
        return process.exitcode, Path(f"{workdir}.log").read_text()

    start.finish, start.config = finish, from_json(config.read_text())
    return start


@pytest.fixture(scope="module")
def straight(children, tmp_path_factory):
    """The run that nobody disturbs."""
    path = tmp_path_factory.mktemp("straight") / "run"
    code, log = children.finish(path)
    assert code == 0, log
    return path


def kill_at_random(children, workdir, times, seed):
    """Kills the run `times` times, each after it came to life and at a moment of its own."""
    draw = random.Random(seed)
    for _ in range(times):
        process, metrics = children(workdir), workdir / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        patience = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < patience:
            if metrics.exists() and metrics.stat().st_size != before and draw.random() < 0.9:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        process.join()


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_changes_nothing(children, straight, tmp_path, times):
    workdir = tmp_path / "run"
    kill_at_random(children, workdir, times, seed=times)
    code, log = children.finish(workdir)
    assert code == 0, log
    assert saved_state(workdir, children.config) == saved_state(straight, children.config)
    losses = [
        [
            (r["step"], r["train/loss"])
            for r in read_metrics(p / "metrics.jsonl")
            if "train/loss" in r
        ]
        for p in (workdir, straight)
    ]
    assert losses[0] == losses[1]


def test_one_flipped_byte_in_the_newest_checkpoint_is_named_and_made_good(tmp_path, caplog):
    config = tiny(*QUICK)
    assert run(config, tmp_path) == 0
    expected = saved_state(tmp_path, config)
    (tmp_path / "run.json").unlink()  # as if the run had been stopped before its report
    data = max(
        (p for p in tmp_path.glob("checkpoints/12/**/*") if p.is_file()), key=os.path.getsize
    )
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with caplog.at_level(logging.INFO):
        assert run(config, tmp_path) == 0
    assert f"checkpoint 12 passed over: {data} is damaged" in caplog.text
    assert "resuming at step 8" in caplog.text
    assert saved_state(tmp_path, config) == expected


def test_a_full_disk_ends_the_run_with_its_older_steps_intact(tmp_path, monkeypatch):
    config = tiny(*QUICK)
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 0, 0, 0, 0, 255))
    calls = []

    def statvfs(path, original=os.statvfs):
        calls.append(path)
        return original(path) if len(calls) < 2 else full

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", statvfs)
        with pytest.raises(DataError, match=r"checkpoint of step 8 needs .* free some space"):
            run(config, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert run(config, tmp_path) == 0


def test_a_disk_that_fills_up_while_the_report_is_written_is_no_bug_of_ours(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    config = tiny("train.steps=1", *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr("attnlab.report.replace_file", fail)
        with pytest.raises(DataError, match="No space left on device; free some space"):
            run(config, tmp_path)
    assert Workdir(tmp_path).finished() is None
    assert run(config, tmp_path) == 0


def test_two_runs_do_not_share_a_workdir(tmp_path):
    with Workdir(tmp_path), pytest.raises(UserError, match="is in use by process"):
        run(tiny(), tmp_path)


class Poisoned:
    """A `make_step` whose loss is NaN at chosen batches, known by their first row of tokens."""

    def __init__(self, monkeypatch, config, bad):
        import attnlab.train as module

        task, original = tasks.build(config.task, seed=0), module.make_step
        rows = np.stack([task.batch(number)["tokens"] for number in bad])

        def make_step(*arguments):
            step = original(*arguments)

            def poisoned(state, batch):
                hit = jax.numpy.any(jax.numpy.all(batch["tokens"] == rows, (1, 2)))
                scale = jax.numpy.where(hit, jax.numpy.nan, 1.0)
                broken = jax.tree.map(lambda p: p * scale, state.params)
                after, metrics = step(state._replace(params=broken), batch)
                kept = jax.tree.map(
                    lambda new, old: jax.numpy.where(hit, old, new), after.params, state.params
                )
                return after._replace(params=kept), metrics

            return poisoned

        monkeypatch.setattr(module, "make_step", make_step)


def test_nan_aborts_with_the_batch_kept_and_no_nan_saved(tmp_path, monkeypatch, capsys):
    config = tiny("train.on_nan=abort", *QUICK)
    Poisoned(monkeypatch, config, [7])
    with pytest.raises(UserError, match=r"step 8: loss nan.*batch-7\.npz.*train\.on_nan=skip"):
        run(config, tmp_path)
    kept = np.load(tmp_path / "bad_batches" / "batch-7.npz")
    expected = tasks.build(config.task, seed=0).batch(7)
    assert all(np.array_equal(kept[name], expected[name]) for name in expected)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    # The same run goes on with another policy.
    assert run(tiny("train.on_nan=skip", *QUICK), tmp_path) == 0


def test_nan_is_skipped_and_the_skipped_step_is_on_record(tmp_path, monkeypatch, capsys):
    config = tiny("train.on_nan=skip", *QUICK)
    Poisoned(monkeypatch, config, [3, 11])  # steps 4, which is saved, and 12, the last
    assert run(config, tmp_path) == 0
    assert "skipped" in capsys.readouterr().err
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if "train/bad_loss" in r] == [4, 12]
    assert [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3, *range(5, 12)]
    assert all(b"nan" not in value for value in saved_state(tmp_path, config).values())


@pytest.mark.slow
def test_nan_rewinds_past_the_batch_and_an_interruption_changes_nothing(tmp_path, monkeypatch):
    config = tiny("train.on_nan=rewind", *QUICK)
    Poisoned(monkeypatch, config, [5, 13])
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run(config, straight) == 0
    rows = read_metrics(straight / "metrics.jsonl")
    # Step 6 reads batch 5: back to 4 and on with batch 6; then step 12 reads batch 13, and so on.
    assert [r["step"] for r in rows if "train/bad_loss" in r] == [4, 8]
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, 13))
    state = saved_state(straight, config)
    assert state["extra"] == b"[('rewinds', 2), ('shift', 6)]"
    with monkeypatch.context() as patch:
        signal_during(patch, Trainer, "record", when=10)
        assert run(config, broken) == 143
    assert run(config, broken) == 0
    assert saved_state(broken, config) == state


@pytest.mark.parametrize(
    ("policy", "message"),
    [("skip", "after 3 skipped"), ("rewind", "after 2 rewinds")],
)
def test_a_run_that_cannot_be_mended_gives_up(tmp_path, monkeypatch, policy, message):
    monkeypatch.setattr("attnlab.train.SKIPS", 3)
    monkeypatch.setattr("attnlab.train.REWINDS", 2)
    config = tiny(f"train.on_nan={policy}", *QUICK)
    Poisoned(monkeypatch, config, range(2, 60))
    with pytest.raises(UserError, match=message):
        run(config, tmp_path)


CORPUS = f"text:{Path(__file__).parent}/tiny.py"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--config.train.stesp=5"], 2, "did you mean 'train.steps'"),
        (["--config=configs/lm.py:attention=windwo"], 2, "did you mean 'window'"),
        (["--config=configs/ml.py"], 2, "did you mean 'configs/lm.py'"),
        (["--config.model.heads=5"], 2, "use heads of 4 or 8"),
        (["--config.model.kv_heads=3"], 2, "does not divide model.heads=4; use 2 or 4"),
        (["--config.task.corpus=kjw"], 2, "did you mean 'kjv'"),
        (["--config.task.corpus=text:/nowhere/*.txt"], 3, "no file matches '/nowhere/*.txt'"),
        (["--config.task.corpus=text:/dev/null"], 3, "no file matches '/dev/null'"),
        (["--config.task.length=100000"], 3, "fewer than one sequence of 100,000"),
        (["--config.task.batch=3"], 2, "does not divide among 8 devices"),
        (["--config.mesh=data:3"], 2, "use data:8 or data:-1"),
        (["--config.mesh=seq:8", "--config.task.length=36"], 2, "use task.length=40, or seq:4"),
        (["--config.task.length=8", "--config.sample.prompt=too long a one"], 2, "has 15 tokens"),
        (["--config.train.on_nan=ignore"], 2, "not one of abort, skip, rewind"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(tmp_path, capsys, monkeypatch, flags, code, message):
    home()
    monkeypatch.chdir(Path(__file__).parents[1])
    base = [f"--config=configs/lm.py:corpus={CORPUS}", "--config.task.length=32"]
    if flags[0].startswith("--config="):
        base = []
    assert main(["train", f"--workdir={tmp_path / 'run'}", *base, *flags]) == code
    error = capsys.readouterr().err.splitlines()
    progress = re.compile("attnlab: (prepar|devices|attention|text:.* has 1 document)")
    said = [line for line in error if not progress.match(line)]
    assert len(said) == 1, error
    assert message in said[0]
    assert not (tmp_path / "run").exists()


def test_an_empty_corpus_is_one_line(tmp_path, capsys):
    home()
    (tmp_path / "empty.txt").touch()
    config = f"--config=configs/lm.py:corpus=text:{tmp_path}/*.txt"
    assert main(["train", f"--workdir={tmp_path / 'run'}", config]) == 3
    assert "Traceback" not in capsys.readouterr().err
