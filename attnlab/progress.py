"""One line that says how far, how good, how fast, how long still, how much memory.

step 1200/50000  bits per byte 2.031  413k tokens/s  ETA 1h02m  3.1 GiB
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

TERMINAL_INTERVAL = 0.1  # seconds between two drawings
PLAIN_INTERVAL = 10.0  # seconds between two lines in a file
SMOOTHING = 0.3  # weight of the newest interval in the speed


class Progress:
    """Draws on `stream` (default stderr): rewrites one line on a terminal, else prints lines.

    `total` and `start` are steps. The first update only starts the clock, so that compilation does
    not count as speed. A closed or broken stream silences it and never stops the run. `process` is
    the jax process index; others draw nothing.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        process: int = 0,
    ):
        self.total = total
        self.start = start
        stream = sys.stderr if stream is None else stream
        self._stream = stream if process == 0 else None
        self._clock = clock
        self._terminal = _is_terminal(self._stream)
        self._drawn: float | None = None  # when the last line was drawn
        self._last: tuple[float, int, int] | None = None  # time, step, tokens
        self._steps_rate = self.tokens_per_second = 0.0
        self._pending = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def update(self, step: int, tokens: int = 0, **shown: float) -> None:
        """`tokens` counts from the start of this process; `shown` are numbers, bits_per_byte=2.1.

        Cheap when nothing is due. `shown` is only formatted when drawn, so a device array costs a
        wait only then.
        """
        now = self._clock()
        interval = TERMINAL_INTERVAL if self._terminal else PLAIN_INTERVAL
        due = self._drawn is None or now - self._drawn >= interval or step >= self.total
        if not due:
            return
        self._measure(now, step, tokens)
        self._drawn = now
        self._draw(self._line(step, shown))

    def note(self, text: str) -> None:
        """Prints `text` on a line of its own without tearing the progress line."""
        self._write(("\r\x1b[K" if self._pending else "") + text + "\n")
        self._pending = False

    def close(self) -> None:
        """Ends the line, so that a shell prompt does not continue it."""
        if self._pending:
            self._write("\n")
        self._pending = False

    def _measure(self, now: float, step: int, tokens: int) -> None:
        if self._last is None:
            self._last = now, step, tokens
            return
        then, last_step, last_tokens = self._last
        if now <= then or step <= last_step:
            return
        for name, rate in (
            ("_steps_rate", (step - last_step) / (now - then)),
            ("tokens_per_second", (tokens - last_tokens) / (now - then)),
        ):
            old = getattr(self, name)
            setattr(self, name, rate if old == 0 else old + SMOOTHING * (rate - old))
        self._last = now, step, tokens

    def _line(self, step: int, shown: dict[str, Any]) -> str:
        parts = [f"step {step}/{self.total}"]
        parts += [f"{name.replace('_', ' ')} {float(v):.3f}" for name, v in shown.items()]
        if self.tokens_per_second > 0:
            parts.append(f"{_short(self.tokens_per_second)} tokens/s")
        if self._steps_rate > 0 and step < self.total:
            parts.append(f"ETA {_duration((self.total - step) / self._steps_rate)}")
        parts.append(f"{memory_in_use() / 2**30:.1f} GiB")
        return "  ".join(parts)

    def _draw(self, line: str) -> None:
        if not self._terminal:
            self._write(line + "\n")
            return
        width = shutil.get_terminal_size().columns - 1
        self._write(f"\r\x1b[K{line[:width]}")
        self._pending = True

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            _silence(self._stream)
            self._stream = None


def memory_in_use() -> int:
    """Bytes in use on the first local device, or of this process where devices do not tell."""
    if "jax" in sys.modules:
        import jax

        statistics = jax.local_devices()[0].memory_stats()
        if statistics and "bytes_in_use" in statistics:
            return statistics["bytes_in_use"]
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_of_process()


def peak_memory() -> int:
    """The most bytes that were ever in use on a local device, or by this process, libraries
    included, where devices do not tell."""
    if "jax" in sys.modules:
        import jax

        found = [device.memory_stats() or {} for device in jax.local_devices()]
        if peak := max(each.get("peak_bytes_in_use", 0) for each in found):
            return peak
    return _peak_of_process()


def _peak_of_process() -> int:
    import resource

    # What getrusage tells on Linux begins with the size of the process that started this one.
    with suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream is not None and stream.isatty())
    except (OSError, ValueError):
        return False


def _silence(stream: TextIO) -> None:
    # What is still buffered would fail again when Python exits, and change the exit code.
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass


def _short(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
