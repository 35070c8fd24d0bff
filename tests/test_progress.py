"""The progress line says what is true and never stops a run."""

import io
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import attnlab
from attnlab.progress import Progress, memory_in_use

ROOT = Path(attnlab.__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(stream, seconds_a_step, steps=100, start=0):
    clock = Clock()
    with Progress(100, start, stream, clock) as progress:
        for step in range(start + 1, steps + 1):
            clock.now += seconds_a_step
            progress.update(step, tokens=(step - start) * 500, bits_per_byte=2.03125)
    return stream.getvalue()


def test_a_line_shows_step_loss_speed_eta_and_memory():
    lines = run(io.StringIO(), 20.0, steps=10).splitlines()
    assert re.fullmatch(
        r"step 10/100  bits per byte 2\.031  25 tokens/s  ETA 30m00s  \d+\.\d GiB", lines[-1]
    )


def test_a_file_gets_a_plain_line_at_most_every_ten_seconds_and_at_the_end():
    text = run(io.StringIO(), 1.0, steps=100)
    assert "\r" not in text
    shown = [int(line.split("/")[0].removeprefix("step ")) for line in text.splitlines()]
    assert shown == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_a_terminal_gets_one_line_rewritten_and_ended(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = run(Terminal(), 1.0)
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert all(len(part) < 40 for part in text.replace("\x1b[K", "").strip().split("\r"))


def test_compilation_does_not_count_as_speed_and_a_resumed_run_counts_its_own_steps():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1000, 500, stream, clock)
    clock.now = 300.0  # compiling
    progress.update(501, tokens=10)
    clock.now = 310.0
    progress.update(511, tokens=110)
    assert "step 511/1000  10 tokens/s  ETA 8m09s" in stream.getvalue()


def test_a_note_does_not_tear_the_line():
    stream = Terminal()
    progress = Progress(10, stream=stream)
    progress.update(1)
    progress.note("checkpoint saved")
    assert stream.getvalue().endswith("\r\x1b[Kcheckpoint saved\n")


@pytest.mark.parametrize("broken", ["closed", "none"])
def test_a_stream_that_is_gone_silences_and_nothing_more(broken, monkeypatch):
    stream = io.StringIO()
    stream.close()
    if broken == "none":
        stream = None
        monkeypatch.setattr(sys, "stderr", None)
    with Progress(10, stream=stream) as progress:
        for step in range(1, 11):
            progress.update(step)
        progress.note("still here")


def test_a_broken_pipe_does_not_change_the_exit_code():
    code = """
        import sys
        from attnlab.progress import Progress
        clock = iter(range(0, 10**6, 20))
        with Progress(10**5, stream=sys.stdout, clock=lambda: next(clock)) as progress:
            for step in range(1, 10**4):
                progress.update(step)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, b"")


def test_memory_is_that_of_this_process_or_device():
    assert 2**20 < memory_in_use() < 2**45
