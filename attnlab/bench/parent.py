"""The processes that measure, from the side that asks them."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from attnlab.errors import AttnlabError, DataError, UserError

ENOUGH = 10.0  # seconds for the calls of one subject, unless they are fewer than LEAST
LEAST = 3


class Stopped(AttnlabError):
    """A measuring process ended before it answered."""

    code = 1


class Worker:
    """One subject in a process of its own, warm when the constructor returns. ``about`` is what it
    says of itself; raises what it was refused with, `Stopped` if it was killed."""

    def __init__(self, asked: dict[str, Any]):
        self.said = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "attnlab.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            # What was compiled before would be loaded, and compiling is measured.
            env={"JAX_ENABLE_COMPILATION_CACHE": "false", **os.environ},
        )
        self.calls: list[dict[str, float]] = []
        self.spent = 0.0
        try:
            self.about = self._ask(json.dumps(asked))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.said):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()

    def wake(self) -> None:
        """One call that does not count, after others had their turn: what a machine took back from
        a process that waited, it would give back during the next."""
        self._ask("go")

    def call(self) -> None:
        """One call more."""
        begun = time.monotonic()
        self.calls.append(self._ask("go"))
        self.spent += time.monotonic() - begun

    def enough(self, repeats: int) -> bool:
        """Whether it was called often or long enough."""
        count = len(self.calls)
        return count >= repeats or (count >= LEAST and self.spent > ENOUGH)

    def _ask(self, line: str) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(line + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise Stopped(self._why())
        found = json.loads(answer)
        if "error" in found:
            raise (DataError if found["code"] == DataError.code else UserError)(found["error"])
        return found

    def _why(self) -> str:
        code = self.process.wait()
        self.said.seek(0)
        said = self.said.read().decode(errors="replace")
        if code < 0:
            return f"killed by signal {-code}" + ", perhaps for want of memory" * (code == -9)
        notes = ("For simplicity", "----")  # with which jax ends a traceback
        lines = [line for line in said.strip().splitlines() if not line.startswith(notes)]
        return (lines or ["it said nothing"])[-1]


class Timing(NamedTuple):
    """Seconds of a call: median, and the quartiles around it."""

    median: float
    low: float
    high: float


def timing(values: Sequence[float]) -> Timing:
    """Of the calls of one subject."""
    import numpy as np

    low, middle, high = np.quantile(np.asarray(values), (0.25, 0.5, 0.75))
    return Timing(float(middle), float(low), float(high))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Timing:
    """The median of call-by-call ratios ours / theirs of two that were called in turn, with a 95 %
    bootstrap interval."""
    import numpy as np

    pairs = np.asarray([a / b for a, b in zip(ours, theirs)])
    draw = np.random.default_rng(0)
    again = np.median(pairs[draw.integers(len(pairs), size=(2000, len(pairs)))], -1)
    low, high = np.quantile(again, (0.025, 0.975))
    return Timing(float(np.median(pairs)), float(low), float(high))
