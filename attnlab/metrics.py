"""What a run measured: always a JSON line a call, and whichever viewers are asked for.

`metrics.jsonl` has one object a line: "step", "time" (Unix seconds) and the scalars. NaN and
infinities, which JSON lacks, are the strings "nan", "inf", "-inf"; `read_metrics` turns them back.
"""

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from attnlab.errors import DataError, UserError, did_you_mean
from attnlab.files import replace_file

log = logging.getLogger(__name__)

NAME = "metrics.jsonl"
NOT_JSON = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
RESERVED = ("step", "time")


class Sink(Protocol):
    """Where scalars go. A new viewer is a class with these and a line in SINKS."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Writer:
    """Writes to `directory`/metrics.jsonl and to every sink named ("tensorboard", "wandb").

    `resume` is the step the run continues from: lines after it are dropped, because they are about
    to be measured again (-1 starts over); None leaves what is there. A torn last line is repaired.
    `config` goes to sinks that show it. `process` is the jax process index; others write nothing.

    Raises UserError for an unknown sink or one whose package is missing, DataError when the disk
    is full or the directory is gone.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        resume: int | None = None,
        sinks: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
        process: int = 0,
    ):
        for name in sinks:
            if name not in SINKS:
                raise UserError(f"unknown metrics sink {name!r}; {did_you_mean(name, SINKS)}")
        self._sinks: list[Sink] = []
        self._directory = Path(os.path.abspath(directory))
        self._names, self._config, self._process = sinks, dict(config or {}), process
        self._open(resume)

    def _open(self, resume: int | None) -> None:
        if self._process != 0:
            return
        directory = self._directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._sinks.append(_Lines(directory / NAME, resume))
            for name in self._names:
                self._sinks.append(SINKS[name](directory, resume, self._config))
        except OSError as error:
            self.close()
            raise DataError(f"cannot write metrics in {directory}: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def write(self, step: int, /, **scalars: Any) -> None:
        """Records numbers (Python, NumPy or jax, of no dimensions), strings and booleans at `step`.

        A name may hold slashes: write(10, **{"eval/loss": 1.2}). Waits for the device when a value
        is still being computed.
        """
        for name in RESERVED:
            if name in scalars:
                raise ValueError(f"metric name {name!r} is taken")
        plain = {name: _plain(name, value) for name, value in scalars.items()}
        for sink in self._sinks:
            sink.write(int(step), plain)

    def rewind(self, step: int) -> None:
        """Drops what was measured after `step`: the run goes on from there."""
        self.close()
        self._open(step)

    def flush(self) -> None:
        """Makes everything written so far durable."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Flushes and closes every sink; a second call does nothing."""
        while self._sinks:
            self._sinks.pop().close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; lines that are not whole are left out and logged."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    rows = []
    for line in content.splitlines():
        row = _parse(line)
        if row is None:
            log.warning("%s: left out a damaged line of %d bytes", path, len(line))
            continue
        rows.append(
            {name: NOT_JSON.get(v, v) if isinstance(v, str) else v for name, v in row.items()}
        )
    return rows


class _Lines:
    def __init__(self, path: Path, resume: int | None):
        self.path = path
        self._repair(resume)
        # One unbuffered write a line: a killed run loses none that was written.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {name: _json_safe(value) for name, value in scalars.items()}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror}") from None
        if written != len(line):
            raise DataError(f"cannot write {self.path}: the disk is full")

    def flush(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()

    def _repair(self, resume: int | None) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = []
        for line in lines:
            row = _parse(line)
            if row is not None and (resume is None or row["step"] <= resume):
                kept.append(line if line.endswith(b"\n") else line + b"\n")
        if kept != lines:
            log.warning("%s: kept %d of %d lines", self.path, len(kept), len(lines))
            replace_file(self.path, b"".join(kept))


class _TensorBoard:
    def __init__(self, directory: Path, resume: int | None, config: dict[str, Any]):
        from tensorboardX import SummaryWriter

        purge = None if resume is None else resume + 1
        self._writer = SummaryWriter(logdir=str(directory / "tensorboard"), purge_step=purge)
        if config:
            self._writer.add_text("config", "    " + json.dumps(config, indent=4, default=str))

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, directory: Path, resume: int | None, config: dict[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                "metrics sink 'wandb' needs the package: pip install 'attnlab[wandb]'"
            ) from None
        # The name of the run there, kept here, so that a resumed run continues its curves.
        identity = directory / "wandb_id.txt"
        if not identity.exists():
            replace_file(identity, secrets.token_hex(8).encode())
        self._run = wandb.init(
            project=config.get("train", {}).get("wandb") or os.environ.get("WANDB_PROJECT"),
            name=directory.name,
            id=identity.read_text().strip(),
            dir=str(directory),
            config=config,
            resume="allow",
        )

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


SINKS = {"tensorboard": _TensorBoard, "wandb": _WandB}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"metric {name!r} is not a number: {type(value).__name__}")


def _json_safe(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
