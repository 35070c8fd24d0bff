"""Several processes on this machine: started, heard, told, and ended together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import CACHE
from tiny import home, saved_state, tiny, trained

from attnlab import launch as module
from attnlab.launch import free_port, launch
from attnlab.main import main
from attnlab.metrics import read_metrics


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("launch", "launch needs --local, for example --local=2x2"),
        ("launch --local 2x2", "launch needs -- and then train or evaluate, not ''"),
        ("launch --local 2x2 -- plan", "needs -- and then train or evaluate, not 'plan'"),
        ("launch --local 2x2 -- train --confg=x", "train has no flag --confg; did you mean"),
        ("launch --local 2x2 -- train --process-id=1", "--process-id: launch says that itself"),
        ("launch --local 2 -- train", "--local=2: must be PROCESSESxDEVICES, such as 2x2"),
        ("launch --local 2x0 -- train", "--local=2x0: must be"),
        ("launch --local 2x1000 -- train", "each at most 64"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_started(line, message, capsys, monkeypatch):
    monkeypatch.setattr(module, "start", lambda *_: pytest.fail("started"))
    assert main(line.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Lets the processes be a shell script that gets its number as ``$i``."""

    def write(script):
        path = tmp_path / "program"
        path.write_text(f'#!/bin/sh\nfor last; do :; done\ni="${{last#--process-id=}}"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


def test_lines_get_the_number_of_their_process_and_the_flags_arrive(program, capfd):
    program('echo "$@"; echo "devices $JAX_NUM_CPU_DEVICES" >&2')
    assert launch("2x3", ["train", "--workdir=w"]) == 0
    out, err = capfd.readouterr()
    lines = sorted(out.splitlines())
    assert [line[:4] for line in lines] == ["[0] ", "[1] "]
    arguments = r"-m attnlab train --workdir=w --coordinator=127\.0\.0\.1:\d+ --num-processes=2"
    assert all(re.search(rf"{arguments} --process-id={i}$", lines[i]) for i in (0, 1))
    assert {"[0] devices 3", "[1] devices 3"} <= set(err.splitlines())
    assert re.search(r"^attnlab: 2 processes of 3 devices: \d+ \d+$", err, re.MULTILINE)


@pytest.mark.parametrize(("ending", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_the_first_failure_ends_all_and_is_the_exit_code(program, monkeypatch, ending, code):
    monkeypatch.setattr(module, "GRACE", 0.1)
    program(f'[ "$i" = 1 ] && {ending}\nexec sleep 600')
    assert launch("3x1", ["train"]) == code


def test_a_signal_is_passed_on_to_all_and_they_may_finish(program, capfd, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0)
    before = signal.getsignal(signal.SIGTERM)
    program(
        "trap 'sleep 0.3; echo saved; exit 143' TERM\n"
        '[ "$i" = 1 ] && { sleep 0.3; kill -TERM $PPID; }\n'
        "while :; do sleep 0.05; done"
    )
    assert launch("2x1", ["train"]) == 143
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] saved", "[1] saved"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_free_port_is_free():
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", free_port()))


def environment(devices):
    """Of processes that run `attnlab` with so many virtual devices, programs kept."""
    home()
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def losses(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def terminate_second(child, workdir, log):
    """Sends SIGTERM to process 1 of two as soon as both have taken a step."""
    while child.poll() is None and not (
        (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").stat().st_size
    ):
        time.sleep(0.01)
    started = re.search(r"2 processes of \d devices: \d+ (\d+)", log.read_text())
    assert started, log.read_text()
    os.kill(int(started[1]), signal.SIGTERM)


@pytest.mark.parametrize(
    ("devices", "tolerance"), [(1, 0), pytest.param(2, 1e-3, marks=pytest.mark.slow)]
)
def test_two_processes_are_stopped_by_one_signal_and_go_on_as_one(tmp_path, devices, tolerance):
    """Over 2 x 1 devices and then over 1 x 2 to the bit. Of more than two parts, processes sum in
    another order than one process does: over 2 x 2 and 1 x 4 but for the last digits."""
    config = tiny(
        f"mesh=fsdp:{2 * devices}",
        "model.width=64",  # so that the embedding is split among the processes
        "train.steps=80",
        "train.save_every=0",
        "train.eval_every=0",
        "sample.tokens=2",
        "evaluate.tokens=64",
    )
    file, log = tmp_path / "config.json", tmp_path / "log"
    file.write_text(json.dumps(config.to_dict()))
    broken, straight = tmp_path / "broken", tmp_path / "straight"
    train = [["train", f"--config={file}", f"--workdir={path}"] for path in (broken, straight)]
    launched = ["-m", "attnlab", "launch", "--local", f"2x{devices}", "--", *train[0]]
    with log.open("w") as stderr:
        environ = environment(devices)
        child = subprocess.Popen([sys.executable, *launched], env=environ, stderr=stderr)
        terminate_second(child, broken, log)
        code = child.wait(timeout=300)
    said = log.read_text()
    assert code == 143, said
    assert re.search(r"^\[0\] step \d+/80", said, re.MULTILINE), said
    assert f"[0] attnlab: devices: {2 * devices} x cpu (cpu); mesh: data 1, fsdp" in said
    assert not re.search(r"^\[1\] (step|attnlab: (devices|attention))", said, re.MULTILINE), said
    (saved,) = (int(path.name) for path in (broken / "checkpoints").iterdir())
    assert 0 < saved < 80
    code = f"import sys; from attnlab.main import main; sys.exit(any(map(main, {train})))"
    alone = subprocess.run(
        [sys.executable, "-c", code], env=environment(2 * devices), capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    assert f"resuming at step {saved}" in alone.stderr
    (steps, found), (expected_steps, expected) = (zip(*losses(p)) for p in (broken, straight))
    assert steps == expected_steps == tuple(range(1, 81))
    np.testing.assert_allclose(found, expected, rtol=tolerance)
    if not tolerance:
        assert saved_state(broken, config) == saved_state(straight, config)


@pytest.mark.slow
def test_two_processes_score_what_one_does(tmp_path):
    workdir = shutil.copytree(trained(), tmp_path / "run")
    evaluate = ["evaluate", f"--workdir={workdir}"]
    command = [sys.executable, "-m", "attnlab", "launch", "--local", "2x2", "--", *evaluate]
    done = subprocess.run(command, env=environment(2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\[0\] written: ", done.stdout, re.MULTILINE)
    assert not re.search(r"^\[1\] (?!\[Gloo\])", done.stdout, re.MULTILINE)
    (file,) = (workdir / "evaluations").glob("test-*.json")
    found = json.loads(file.read_text())
    expected = json.loads((workdir / "test.json").read_text())
    assert found.keys() == expected.keys()
    assert found["tokens"] == expected["tokens"]
    np.testing.assert_allclose(found["bits_per_byte"], expected["bits_per_byte"], rtol=1e-6)
