"""Being asked to stop: finish the step, save, leave with the code the shell expects."""

import contextlib
import os
import signal
import threading
from typing import Any

WATCHED = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """A context manager the loop polls.

        with Signals() as signals:
            for step in ...:
                ...
                if signals.received: save; raise SystemExit(signals.exit_code)

    The first SIGINT or SIGTERM only sets `received`; a second one ends the process at once with the
    same code, 128 + signal. Outside the main thread, where Python allows no handlers, nothing is
    ever received. The handlers found on entering are put back on leaving.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """0 as long as nothing was received, then 130 for SIGINT or 143 for SIGTERM."""
        return 0 if self.received is None else 128 + self.received

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, and cannot be from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        # Not print: the signal may have come in the middle of one.
        message = f"\n{self.received.name}: finishing this step and saving; once more to quit now\n"
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
