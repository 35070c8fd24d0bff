"""Ends a process that has stopped getting anywhere: a hung device, host, network or disk raises
nothing, and waits for ever."""

import os
import sys
import threading
import time
from collections.abc import Callable

from attnlab.errors import PeerError

PATIENCE = 5.0  # seconds for the answer where the run goes on from: the disk may be what hangs


class Watchdog:
    """A context manager around a loop that calls `beat` at least every ``seconds``; 0 = off.

    Otherwise the process says in one line that ``what`` for so long, ended by ``last_good()``, and
    exits with the code of `PeerError`. What else it was doing is lost, as if it had been killed.
    """

    def __init__(
        self,
        seconds: float,
        last_good: Callable[[], str],
        what: str = "no step has ended",
        leave: Callable[[int], None] = os._exit,
    ):
        self.seconds, self._last_good, self._leave = seconds, last_good, leave
        self._what = what
        self._ended = threading.Event()
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self.seconds > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self) -> None:
        """Something was got done."""
        self._last = time.monotonic()

    def watching(self, ask: Callable[[], bool]) -> Callable[[], bool]:
        """``ask``, each answer to which is a `beat`."""

        def asking() -> bool:
            answer = ask()
            self.beat()
            return answer

        return asking

    def _watch(self) -> None:
        while (left := self._last + self.seconds - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        answers: list[str] = []
        asking = threading.Thread(target=lambda: answers.append(self._last_good()), daemon=True)
        asking.start()
        asking.join(PATIENCE)
        where = answers[0] if answers else "the disk does not answer either"
        line = f"attnlab: {self._what} for {self.seconds:g} seconds; {where}"
        print(line, file=sys.stderr, flush=True)
        self._leave(PeerError.code)
