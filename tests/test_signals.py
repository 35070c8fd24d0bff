"""The first signal is a request, the second an order."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import attnlab
from attnlab.signals import Signals

ROOT = Path(attnlab.__file__).parents[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_is_noted_and_gives_the_exit_code(number, code, capfd):
    with Signals() as signals:
        assert signals.received is None
        assert signals.exit_code == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
        assert signals.exit_code == code
    assert "finishing this step and saving" in capfd.readouterr().err


def test_the_handlers_found_are_put_back():
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        expected = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        with Signals():
            assert signal.getsignal(signal.SIGTERM) != expected[0]
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == expected
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_outside_the_main_thread_nothing_is_installed_and_nothing_fails():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with Signals() as signals:
            seen.extend([signal.getsignal(signal.SIGTERM), signals.exit_code])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, 0]


LOOP = """
    import os, signal, sys, threading
    from attnlab.signals import Signals
    mode = sys.argv[1]
    with Signals() as signals:
        print("ready", flush=True)
        if mode == "stuck":
            threading.Event().wait(60)
        while not signals.received:
            signal.pause()
        print("saved", flush=True)
        sys.exit(signals.exit_code)
"""


@pytest.mark.parametrize(
    ("mode", "sent", "code", "output"),
    [
        ("polls", [signal.SIGTERM], 143, "saved\n"),
        ("polls", [signal.SIGINT], 130, "saved\n"),
        ("stuck", [signal.SIGTERM, signal.SIGTERM], 143, ""),
        ("stuck", [signal.SIGTERM, signal.SIGINT], 130, ""),
    ],
)
def test_one_signal_saves_and_a_second_leaves_at_once(mode, sent, code, output):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOOP), mode],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(sent[0])
        assert child.stderr.readline() == "\n"  # the first one has arrived
        for number in sent[1:]:
            child.send_signal(number)
        rest, _ = child.communicate(timeout=30)
        assert (child.returncode, rest) == (code, output)
