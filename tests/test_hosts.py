"""Who is part of a run, who may leave it and when, without a second process."""

import logging
import signal
import socket
import sys
import threading
from functools import partial

import jax
import pytest
from tiny import tiny

from attnlab import checkpoint, hosts, watchdog
from attnlab.checkpoint import Checkpoints
from attnlab.errors import PeerError, UserError
from attnlab.hosts import Together, meeting, read
from attnlab.kinds.text import Text
from attnlab.main import main
from attnlab.progress import Progress
from attnlab.sharding import make_mesh
from attnlab.signals import Signals
from attnlab.train import Trainer, train
from attnlab.watchdog import Watchdog

PLACE = {"coordinator": "10.0.0.1:1234", "num-processes": 4, "process-id": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "--coordinator without --num-processes and --process-id; give"),
        ({"num-processes": 2, "process-id": 0}, "and --process-id without --coordinator; give all"),
        ({"coordinator": "auto", "process-id": 0}, "or --coordinator=auto alone"),
        (PLACE | {"coordinator": "10.0.0.1"}, "--coordinator=10.0.0.1: must be HOST:PORT"),
        (PLACE | {"coordinator": "host:99999"}, "must be HOST:PORT, such as 10.0.0.1:1234"),
        (PLACE | {"process-id": 4}, "--process-id=4: must lie in 0..3, as --num-processes=4"),
        (PLACE | {"process-id": -1}, "--process-id=-1: must lie in 0..3"),
        (PLACE | {"num-processes": 0}, "--num-processes=0: must be at least 1"),
        (PLACE | {"heartbeat-timeout": 0}, "--heartbeat-timeout=0: must be at least 1 second"),
    ],
)
def test_flags_that_do_not_fit_each_other_are_one_line(given, message):
    with pytest.raises(UserError) as error:
        read(given, {})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_wrong_flags_are_said_by_the_command_before_anything_is_begun(command, tmp_path, capsys):
    config = ["--config=configs/lm.py"] if command == "train" else []
    line = [command, f"--workdir={tmp_path / 'run'}", *config, "--num-processes=2"]
    assert main(line) == 2
    assert "--num-processes without --coordinator and --process-id" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_flags_become_the_options_of_jax():
    assert read(PLACE | {"initialization-timeout": 1800, "heartbeat-timeout": 30}, {}) == {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 4,
        "process_id": 3,
        "initialization_timeout": 1800,
        "heartbeat_timeout_seconds": 30,
        "cluster_detection_method": "deactivate",
    }
    assert read({"coordinator": "auto", "heartbeat-timeout": 9}, {}) == {
        "heartbeat_timeout_seconds": 9
    }


@pytest.mark.parametrize(
    ("environ", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # the script around the steps
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_a_cluster_is_joined_only_if_it_started_several(environ, several):
    assert (read({}, environ) == {}) is several
    assert (read({}, environ) is None) is not several


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (
            PLACE,
            PeerError,
            "process 3 of 4, looking for .*:1234, has not met the others: too late;",
        ),
        ({"coordinator": "auto"}, UserError, "no cluster was recognised: too late; say --coord"),
    ],
)
def test_others_that_do_not_come_are_one_line(monkeypatch, given, kind, message):
    def fail(**options):
        raise RuntimeError("too late\nand a page more")

    monkeypatch.setattr(hosts, "_begun", False)
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(kind, match=message):
        hosts.start(dict(given), {})


def test_others_that_never_come_are_one_line_too(monkeypatch, capsys):
    left, ended = [], threading.Event()

    def leave(code):
        left.append(code)
        ended.set()

    def initialize(**options):
        assert options["initialization_timeout"] > 100  # jax must not be the first to give up
        ended.wait(60)

    monkeypatch.setattr(hosts, "_begun", False)
    monkeypatch.setattr(hosts, "Watchdog", partial(Watchdog, leave=leave))
    monkeypatch.setattr(hosts, "PATIENCE", 0.01)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(hosts.signal, "signal", lambda *_: None)
    hosts.start(dict(PLACE), {})
    assert left == [4]
    assert capsys.readouterr().err == (
        "attnlab: process 3 of 4, looking for 10.0.0.1:1234, has not met the others for 0.01 "
        f"seconds; {hosts.REMEDY}\n"
    )


def test_a_port_that_is_taken_is_a_user_error(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("begun"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=r"cannot listen there: Address .* choose another"):
            hosts.start(PLACE | {"coordinator": place, "process-id": 0}, {})


def test_the_flags_are_taken_out_and_others_are_left():
    flags = {"length": 5, "heartbeat-timeout": 9}
    hosts.start(flags, {})
    assert flags == {"length": 5}


def test_one_of_several_leaves_at_once_with_its_line(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(hosts.os, "_exit", left.append)
    assert main(["list", "windw"]) == 2
    assert left == []
    monkeypatch.setattr(hosts, "_begun", True)
    main(["list", "windw"])
    assert left == [2]
    assert "did you mean 'window'" in capsys.readouterr().err.splitlines()[-1]


def test_a_meeting_that_fails_says_from_where_the_run_goes_on(monkeypatch):
    def meet(message, kind=RuntimeError):
        with meeting(lambda: "last good checkpoint: step 4"):
            raise kind(message)

    gone = "FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer\nmore"
    with pytest.raises(RuntimeError, match="Gloo"):
        meet(gone)
    monkeypatch.setattr(hosts, "_begun", True)
    for kind in (RuntimeError, ValueError):  # jax raises the one or the other
        with pytest.raises(PeerError, match=r"is gone .*closed by peer; last good .*: step 4$"):
            meet(gone, kind)
    with pytest.raises(UserError, match=r"^no connection"):
        meet("no connection", UserError)
    with pytest.raises(RuntimeError, match="a bug"):
        meet("a bug")


def test_what_must_be_the_same_in_all_processes_is_compared(monkeypatch, tmp_path):
    hosts.agree("the config", {"a": 1})  # alone there is nobody to differ
    hosts.need_shared(tmp_path / "nothing")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "gather", lambda value: [value, value])
    hosts.agree("the config", {"a": 1})
    monkeypatch.setattr(hosts, "gather", lambda value: [value, value - 1])
    with pytest.raises(UserError, match="the config of process 1 differs from that of process 0"):
        hosts.agree("the config", {"a": 1})
    (tmp_path / "run.json").touch()
    with pytest.raises(UserError, match=r"process 1 does not see .*run\.json; the workdir must"):
        hosts.need_shared(tmp_path / "run.json")


def test_alone_a_signal_is_an_answer_at_once():
    signals = Signals()
    together, asked = Together(signals), []
    assert not together.stop()
    signals.received = signal.SIGTERM
    assert together.stop()
    together.alone(lambda stop: asked.append(stop()))
    assert asked == [True]


@pytest.fixture
def second(monkeypatch):
    """As if there were two processes; what they have told each other. Call it to choose one."""
    said = {}

    class Client:
        def key_value_try_get(self, key):
            if key not in said:
                raise RuntimeError("NOT_FOUND: no such key")
            return said[key]

        def key_value_set(self, key, value, allow_overwrite=False):
            said[key] = value

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_client", Client)
    monkeypatch.setattr(hosts, "EVERY", 0)

    def choose(index):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        return said

    return choose


def test_a_signal_is_heard_by_all_at_the_next_question(second):
    second(0)
    signals = Signals()
    together = Together(signals)
    assert not together.stop()
    signals.received = signal.SIGINT
    assert not together.stop()
    signals.received = None  # as in the process that got none
    assert together.stop()
    assert signals.exit_code == 130


def test_the_first_works_until_another_process_is_told_to_stop(second):
    said, signals, answers = second(0), Signals(), []

    def work(stop):
        answers.append(stop())
        said[hosts.STOP] = "15"
        answers.append(stop())

    Together(signals).alone(work)
    assert answers == [False, True]
    assert signals.exit_code == 143
    assert said[hosts.DONE] == "15"


def test_the_others_wait_for_the_first_and_pass_on_what_they_are_told(second, monkeypatch):
    said, signals = second(1), Signals()
    signals.received = signal.SIGTERM

    def sleep(_):
        assert said[hosts.STOP] == "15"
        said[hosts.DONE] = "15"

    monkeypatch.setattr(hosts.time, "sleep", sleep)
    Together(signals).alone(lambda stop: pytest.fail("only the first works"))
    assert signals.exit_code == 143


def test_the_first_prepares_data_before_the_others_do(second, monkeypatch):
    said, order = second(1), []

    def sleep(_):
        order.append("waits")
        said[hosts.MADE] = ""

    monkeypatch.setattr(hosts.time, "sleep", sleep)
    assert hosts.in_turn(lambda: order.append("makes") or 7) == 7
    assert order == ["waits", "makes"]
    said.clear()
    second(0)
    assert hosts.in_turn(lambda: len(said)) == 0
    assert hosts.MADE in said


def test_one_that_fails_asks_nothing_of_the_others(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jax.numpy.ones(3)})

    def meet(value):
        raise AssertionError("the others are not asked")

    assert checkpoints._thread is not None
    checkpoints._thread.join()  # the library below must not be told that there are two
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(checkpoint, "_lowest", meet)
        with pytest.raises(KeyError), checkpoints:
            raise KeyError
    assert checkpoints.steps() == [1]
    checkpoints.close()


def test_only_the_first_process_draws(capsys):
    with Progress(3, process=1) as progress:
        progress.update(3, 10)
        progress.note("something")
    assert capsys.readouterr().err == ""


def test_the_devices_of_a_process_lie_side_by_side(monkeypatch):
    shuffled = sorted(jax.devices(), key=lambda device: device.id * 3 % 8)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: shuffled)
    assert [device.id for device in make_mesh("data:4,fsdp:2").devices.flat] == list(range(8))


def watched(seconds, last_good, capsys):
    """The line and exit code of a watchdog that nobody calls."""
    left = []
    ended = threading.Event()

    def leave(code):
        left.append(code)
        ended.set()

    with Watchdog(seconds, last_good, leave=leave):
        ended.wait(60)
    return capsys.readouterr().err, left


def test_a_step_that_does_not_end_ends_the_process(capsys, monkeypatch):
    line, left = watched(0.01, lambda: "last good checkpoint: step 4 in runs", capsys)
    assert left == [4]
    assert line == (
        "attnlab: no step has ended for 0.01 seconds; last good checkpoint: step 4 in runs\n"
    )
    monkeypatch.setattr(watchdog, "PATIENCE", 0.01)
    line, left = watched(0.01, threading.Event().wait, capsys)
    assert left == [4]
    assert "the disk does not answer either" in line


def test_a_watchdog_that_is_off_or_done_does_nothing(capsys):
    def leave(code):
        raise AssertionError

    for seconds in (0, 1000):
        with Watchdog(seconds, lambda: "", leave=leave) as dog:
            assert dog.watching(lambda: True)()
        assert dog._thread is None or not dog._thread.is_alive()
    assert capsys.readouterr().err == ""


def test_training_is_watched_and_knows_where_it_would_go_on(tmp_path, monkeypatch):
    dogs = []

    class Dog(Watchdog):
        def __init__(self, *arguments):
            super().__init__(*arguments, leave=sys.exit)
            dogs.append(self)

    def loop(trainer, stop):
        (dog,) = dogs
        dog._last = 0
        assert not stop()
        assert dog._last > 0
        trainer.save()

    monkeypatch.setattr("attnlab.train.Watchdog", Dog)
    monkeypatch.setattr(Trainer, "loop", loop)
    monkeypatch.setattr(Text, "finish", lambda *_, **options: None)
    assert train(tiny(), tmp_path, ["attnlab"], patience=1000) == 0
    assert dogs[0].seconds == 1000
    assert dogs[0]._last_good() == (
        f"last good checkpoint: step 0 in {tmp_path / 'checkpoints'}; run the same command again "
        "to go on from it"
    )


def test_the_second_process_is_silent_but_for_warnings(monkeypatch):
    logger = logging.getLogger("attnlab")
    before = logger.level, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(hosts, "_begun", False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    try:
        hosts.start(dict(PLACE), {})
        assert logger.getEffectiveLevel() == logging.WARNING
    finally:
        logger.setLevel(before[0])
        signal.signal(signal.SIGTERM, before[1])
