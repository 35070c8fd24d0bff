"""``attnlab launch --local 2x2 -- train ...``: several processes on this machine, joined over
loopback, as they would be on as many hosts."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, TextIO

from attnlab.errors import UserError
from attnlab.signals import WATCHED

MOST = 64  # processes, or devices of each: what is typed by mistake is more
GRACE = 10.0  # seconds that the others have to end by themselves once one has failed
SAVING = 120.0  # the same where all were told to stop: they may still be writing
EVERY = 0.05


def launch(shape: str, words: Sequence[str]) -> int:
    """Runs ``attnlab WORDS`` in the processes of ``shape``, "KxD": K of D virtual CPU devices each.

    Their lines get a prefix ``[i]``. SIGTERM and SIGINT are passed on to all. The first that fails
    ends the others, and its exit code (128 + n for signal n) is returned; otherwise 0.
    """
    count, devices = read_shape(shape)
    port = free_port()
    environ = environment(os.environ, devices)
    coordinates = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}"]
    command = [sys.executable, "-m", "attnlab", *words, *coordinates]
    signals: list[int] = []
    previous = {n: signal.signal(n, lambda number, _: signals.append(number)) for n in WATCHED}
    children: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(count):
            children.append(start([*command, f"--process-id={index}"], environ))
        pids = " ".join(str(child.pid) for child in children)
        print(f"attnlab: {count} processes of {devices} devices: {pids}", file=sys.stderr)
        sys.stderr.flush()
        readers = [*relay(children, sys.stdout, "stdout"), *relay(children, sys.stderr, "stderr")]
        code = wait(children, signals)
        for reader in readers:
            reader.join()
        return code
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def read_shape(shape: str) -> tuple[int, int]:
    """(processes, devices of each) of "2x4". Raises `UserError`."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if not match or max(map(int, match.groups())) > MOST:
        raise UserError(
            f"--local={shape}: must be PROCESSESxDEVICES, such as 2x2, each at most {MOST}"
        )
    return int(match[1]), int(match[2])


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(now: Mapping[str, str], devices: int) -> dict[str, str]:
    """That of a process with so many virtual CPU devices."""
    return {**now, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def start(command: Sequence[str], environ: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """One process, in a session of its own: Ctrl-C must reach it once, from here."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(environ),
        start_new_session=True,
    )


def wait(children: Sequence["subprocess.Popen[bytes]"], signals: list[int]) -> int:
    """Until all have ended; passes signals on, and ends the rest after the first failure."""
    code, deadline = 0, None
    while any(child.poll() is None for child in children):
        while signals:
            number = signals.pop(0)
            for child in children:
                if child.poll() is None:
                    child.send_signal(number)
        if code == 0 and (code := failure(children)):
            stopped = code in (128 + number for number in WATCHED)
            deadline = time.monotonic() + (SAVING if stopped else GRACE)
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(EVERY)
    return code or failure(children)


def failure(children: Sequence["subprocess.Popen[bytes]"]) -> int:
    """The exit code of one that failed, as a shell gives it, or 0."""
    codes = [code for child in children if (code := child.poll())]
    return next((code if code > 0 else 128 - code for code in codes), 0)


def relay(
    children: Sequence["subprocess.Popen[bytes]"], output: TextIO, name: str
) -> list[threading.Thread]:
    """Threads that copy a stream of every process, line by line, behind its number."""

    def copy(index: int, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:  # to its end whatever happens, or the process would wait
                text = line.decode(errors="replace").rstrip("\r\n")
                with suppress(OSError, ValueError):
                    output.write(f"[{index}] {text}\n")
                    output.flush()

    threads = []
    for index, child in enumerate(children):
        threads.append(threading.Thread(target=copy, args=(index, getattr(child, name))))
        threads[-1].start()
    return threads
