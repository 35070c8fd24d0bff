"""A workdir holds one run: one config, one process at a time, and the record of both."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import attnlab
from attnlab.errors import DataError, UserError
from attnlab.files import flatten, replace_file, write_json
from attnlab.lock import Lock
from attnlab.provenance import find_commit
from attnlab.workdir import Workdir, compare

ROOT = Path(attnlab.__file__).parents[1]
CONFIG = {"model": {"dim": 64, "layers": ("window", "full")}, "train": {"steps": 100, "lr": 1e-3}}
COMMAND = ["attnlab", "train", "--config=configs/lm.py:a b"]


def change(**fields):
    config = json.loads(json.dumps(CONFIG))
    for path, value in fields.items():
        section, field = path.split("__")
        config.setdefault(section, {})[field] = value
    return config


@pytest.fixture
def begun(tmp_path):
    work = Workdir(tmp_path / "run")
    work.begin(CONFIG, COMMAND, ["--config.train.lr=1e-3"])
    return work


def test_a_start_is_recorded_so_that_it_can_be_repeated(begun):
    assert begun.config() == json.loads(json.dumps(CONFIG))
    assert (
        begun.path / "command.txt"
    ).read_text() == "attnlab train '--config=configs/lm.py:a b'\n"
    run = json.loads((begun.path / "run.json").read_text())
    assert run["finished"] is None
    (attempt,) = run["attempts"]
    assert attempt["command"] == COMMAND
    assert attempt["overrides"] == ["--config.train.lr=1e-3"]
    assert {"python", "attnlab", "jax", "flax", "optax", "orbax-checkpoint"} <= set(
        attempt["versions"]
    )
    assert attempt["devices"]["count"] >= 1
    assert attempt["pid"] == os.getpid()


def test_every_start_is_added_to_the_record(begun):
    begun.begin(CONFIG, ["attnlab", "again"])
    assert len(json.loads((begun.path / "run.json").read_text())["attempts"]) == 2
    assert (begun.path / "command.txt").read_text().splitlines()[1] == "attnlab again"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__dim": 128}, r"model\.dim: 64 -> 128"),
        ({"model__layers": ["full"]}, r'model\.layers: \["window", "full"\] -> \["full"\]'),
        ({"train__steps": 50}, r"train\.steps: 100 -> 50"),
        ({"train__lr": 1}, r"train\.lr: 0\.001 -> 1"),
        ({"model__new": None}, r"model\.new: absent -> null"),
        ({"model__dim": 64.0}, r"model\.dim: 64 -> 64\.0"),
    ],
)
def test_another_config_is_refused_with_the_fields_that_differ(begun, fields, message):
    before = (begun.path / "config.json").read_bytes()
    with pytest.raises(UserError, match=message) as caught:
        begun.begin(change(**fields), COMMAND)
    assert "\n" not in str(caught.value)
    assert (begun.path / "config.json").read_bytes() == before


def test_more_steps_reopen_a_finished_run(begun, caplog):
    begun.finish(100, loss=1.5)
    begun.begin(change(train__steps=200), COMMAND)
    assert begun.finished() is None
    assert begun.config()["train"]["steps"] == 200
    assert "config changed: train.steps: 100 -> 200" in caplog.text


def test_a_harmless_change_is_logged_and_keeps_a_finished_run_finished(begun, caplog):
    begun.finish(100)
    begun.begin(change(train__keep=5), COMMAND)
    assert begun.finished()["step"] == 100
    assert begun.config()["train"]["keep"] == 5
    assert "train.keep: absent -> 5" in caplog.text


def test_other_devices_than_before_are_logged(begun, caplog):
    begun.begin(change(), COMMAND)
    assert "other devices" not in caplog.text
    run = json.loads((begun.path / "run.json").read_text())
    run["attempts"][-1]["devices"]["processes"] = 7
    (begun.path / "run.json").write_text(json.dumps(run))
    begun.begin(change(), COMMAND)
    assert '"processes": 7} -> {' in caplog.text
    assert "sums may differ in their last digits" in caplog.text


def test_a_finished_run_says_so(begun):
    assert begun.finished() is None
    begun.finish(100, loss=1.5)
    done = Workdir(begun.path).finished()
    assert done is not None
    assert (done["step"], done["loss"]) == (100, 1.5)


def test_other_processes_of_a_run_neither_lock_nor_write(tmp_path):
    with Workdir(tmp_path), Workdir(tmp_path, process=1) as second:
        second.begin(CONFIG, COMMAND)
        second.finish(1)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_a_data_error_that_names_it(begun):
    (begun.path / "config.json").write_text('{"model": ')
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        begun.begin(CONFIG, COMMAND)
    (begun.path / "run.json").write_text("[]")
    with pytest.raises(DataError, match=r"run\.json is damaged"):
        begun.finished()


def test_a_file_where_the_workdir_should_be_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file"):
            Workdir(path)


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    def deny(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", deny)
        with pytest.raises(UserError, match=r"cannot write in workdir .*: Permission denied"):
            Workdir(tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", deny)
        with pytest.raises(UserError, match="cannot write in workdir"), Workdir(tmp_path):
            pass


def test_reading_a_run_that_is_not_there_names_its_neighbours_and_creates_nothing(begun):
    with pytest.raises(UserError, match="did you mean 'run'"):
        Workdir.existing(begun.path.parent / "runn")
    assert not (begun.path.parent / "runn").exists()
    assert Workdir.existing(begun.path).config()["train"]["steps"] == 100


def test_spaces_unicode_and_links_are_fine(tmp_path):
    (tmp_path / "å b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "å b")
    with Workdir(tmp_path / "link") as work:
        work.begin(CONFIG, COMMAND)
        with pytest.raises(UserError, match="in use"), Workdir(tmp_path / "å b"):
            pass


HOLD = """
    import sys, threading
    from attnlab.workdir import Workdir
    with Workdir(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
"""


def start_holder(path):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n", child.communicate()
    return child


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path):
    with start_holder(tmp_path) as child:
        with (
            pytest.raises(UserError, match=f"in use by process {child.pid} on "),
            Workdir(tmp_path),
        ):
            pass
        child.communicate("")
    assert child.returncode == 0
    with Workdir(tmp_path):
        assert (tmp_path / "lock.json").exists()
    assert not (tmp_path / "lock.json").exists()


def test_the_lock_of_a_killed_run_is_taken_over_and_logged(tmp_path, caplog):
    with start_holder(tmp_path) as child:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert (tmp_path / "lock.json").exists()
    with Workdir(tmp_path):
        assert f"from process {child.pid} on" in caplog.text
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def write_owner(path, **fields):
    import socket

    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": "then", "born": None}
    write_json(path, owner | fields)


def test_the_lock_of_another_machine_is_refused_with_the_way_out(tmp_path):
    write_owner(tmp_path / "lock.json", host="elsewhere")
    message = "process .* on elsewhere .*if that run is gone, delete .*lock.json"
    with pytest.raises(UserError, match=message), Workdir(tmp_path):
        pass
    (tmp_path / "lock.json").unlink()
    with Workdir(tmp_path):
        pass


def test_a_live_process_counts_even_where_file_locks_do_not_reach(tmp_path):
    write_owner(tmp_path / "lock.json")
    with pytest.raises(UserError, match="in use"):
        Lock(tmp_path / "lock.json").acquire()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the kernel does not tell")
def test_a_process_number_used_again_is_not_the_owner(tmp_path):
    write_owner(tmp_path / "lock.json", born="1")
    lock = Lock(tmp_path / "lock.json")
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_a_lock_file_cut_short_does_not_lock_anybody_out(tmp_path, content):
    (tmp_path / "lock.json").write_text(content)
    if '"pid"' in content:
        write_owner(tmp_path / "lock.json", pid="x")
    with Workdir(tmp_path):
        pass


def test_replacing_a_file_leaves_the_old_one_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_replaced_file_obeys_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        replace_file(tmp_path / "file", b"")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_configs_are_compared_by_dotted_path():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert compare({"a": {"b": 1}}, {"a": {"b": 1}}) == {}
    assert list(compare({"a": {"b": 1}, "c": True}, {"a": {"b": 2}, "c": 1})) == ["a.b", "c"]


def test_a_commit_is_recorded_only_for_files_that_git_tracks(tmp_path):
    (tmp_path / "loose.py").touch()
    assert find_commit(tmp_path / "loose.py") is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert find_commit(tmp_path / "loose.py") is None
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    found = find_commit(tmp_path / "loose.py")
    assert found is not None
    assert (len(found["commit"]), found["dirty"]) == (40, False)
    (tmp_path / "loose.py").write_text("changed")
    found = find_commit(tmp_path / "loose.py")
    assert found is not None
    assert found["dirty"]


def test_a_workdir_without_changes_logs_nothing(begun, caplog):
    with caplog.at_level(logging.WARNING):
        begun.begin(CONFIG, COMMAND)
    assert caplog.text == ""
