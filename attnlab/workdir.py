"""The directory of one run: who owns it, what it was asked to do, whether it is done.

config.json      the resolved config; a run with another one is refused
command.txt      the command of every start, one a line
run.json         every start (command, overrides, versions, devices, commit) and the end
lock.json        the process that is training here now
checkpoints/     see checkpoint.py
metrics.jsonl    see metrics.py
"""

import fnmatch
import json
import logging
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attnlab.errors import AttnlabError, DataError, UserError, did_you_mean
from attnlab.files import flatten, read_json, replace_file, write_json
from attnlab.lock import Lock
from attnlab.provenance import describe_attempt

log = logging.getLogger(__name__)

HARMLESS = (  # may differ between starts: they change the words, not the numbers
    "train.*_every",
    "train.keep",
    "train.on_nan",
    "train.tensorboard",
    "train.wandb",
    "train.profile_*",
    "optimizer.accumulate",
    "model.remat",
    "model.kernels",
    "sample.*",
    "mesh",
)
GROWING = ("train.steps",)  # may become larger
RECORDS = ("config.json", "command.txt", "run.json", "tokenizer.json")  # written before a step
SHOWN = 8  # differing fields named in an error line


class Workdir:
    """Creates `path` and, as a context manager, keeps every other run out of it.

    `process` is the jax process index; only process 0 locks and writes.
    Raises UserError when `path` is a file or cannot be written, or (on entering) when another run
    is using it.
    """

    def __init__(self, path: str | os.PathLike, process: int = 0):
        self.path = Path(os.path.abspath(os.path.expanduser(path)))
        self.process = process
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self._lock = Lock(self.path / "lock.json")
        self._made = not self.path.exists()
        self._before: dict[str, bytes | None] = {}  # the records as they were before `begin`
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"workdir {self.path} is a file; choose a directory") from None
        except OSError as error:
            raise self._unwritable(error) from None

    @classmethod
    def existing(cls, path: str | os.PathLike) -> "Workdir":
        """A workdir to read from. Raises UserError when no run was ever started there."""
        path = Path(os.path.abspath(os.path.expanduser(path)))
        if not (path / "config.json").is_file():
            near = [p.name for p in path.parent.glob("*") if (p / "config.json").is_file()]
            raise UserError(f"no run in {path} (no config.json); {did_you_mean(path.name, near)}")
        return cls(path)

    def __enter__(self) -> "Workdir":
        if self.process == 0:
            try:
                self._lock.acquire()
            except OSError as error:
                raise self._unwritable(error) from None
        return self

    def __exit__(self, kind, error, traceback) -> None:
        refused = isinstance(error, AttnlabError)
        if refused:
            self._forget()
        self._lock.release()
        if refused and self._made:
            with suppress(OSError):  # something is in it
                self.path.rmdir()

    def config(self) -> dict[str, Any]:
        """The stored config. Raises DataError when it is missing or garbage."""
        return self._read("config.json")

    def begin(
        self,
        config: Mapping[str, Any],
        command: Sequence[str],
        overrides: Sequence[str] = (),
        harmless: Sequence[str] = HARMLESS,
        growing: Sequence[str] = GROWING,
    ) -> None:
        """Records this start, or refuses: a workdir holds one config.

        `config` is JSON-able, nested (`ConfigDict.to_dict()`). Dotted paths matching a pattern in
        `harmless` may change; numbers matching `growing` may become larger. A change of either
        kind reopens a finished run. Raises UserError listing `path: saved -> now` otherwise.
        Until `stays`, an `AttnlabError` that leaves the workdir undoes it.
        """
        if self.process != 0:
            return
        config = json.loads(json.dumps(config))
        run = {"finished": None, "attempts": []}
        commands = ""
        if (self.path / "config.json").exists():
            changes = compare(self.config(), config)
            self._refuse(changes, harmless, growing)
            if (self.path / "run.json").exists():
                run = self._read("run.json")
                commands = "".join(shlex.join(a["command"]) + "\n" for a in run["attempts"])
            for path, (saved, now) in changes.items():
                log.warning("config changed: %s: %s -> %s", path, _show(saved), _show(now))
            if any(_matches(path, growing) for path in changes):
                run["finished"] = None
        attempt = describe_attempt(command, overrides)
        before = [a.get("devices") for a in run["attempts"][-1:]]
        if before not in ([], [attempt["devices"]]):
            log.warning(
                "other devices than before (%s -> %s): sums may differ in their last digits",
                *map(_show, (*before, attempt["devices"])),
            )
        run["attempts"].append(attempt)
        self._before = {name: self._content(name) for name in RECORDS}
        try:
            write_json(self.path / "config.json", config)
            replace_file(
                self.path / "command.txt", (commands + shlex.join(command) + "\n").encode()
            )
            write_json(self.path / "run.json", run)
        except OSError as error:
            raise self._unwritable(error) from None

    def stays(self) -> None:
        """The start that `begin` recorded was not refused: its record stays, whatever happens."""
        self._before = {}

    def finished(self) -> dict[str, Any] | None:
        """What `finish` recorded, or None: running the same command again then has nothing to do.

        Raises DataError when run.json is garbage.
        """
        if not (self.path / "run.json").exists():
            return None
        return self._read("run.json")["finished"]

    def finish(self, step: int, **facts: Any) -> None:
        """Marks the run as done at `step`; `facts` is any JSON (final loss, seconds)."""
        if self.process != 0:
            return
        run = self._read("run.json")
        run["finished"] = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
        try:
            write_json(self.path / "run.json", run)
        except OSError as error:
            raise DataError(f"cannot mark {self.path} as finished: {error.strerror}") from None

    def _refuse(self, changes: dict, harmless: Sequence[str], growing: Sequence[str]) -> None:
        bad = []
        for path, (saved, now) in changes.items():
            numbers = isinstance(saved, int | float) and isinstance(now, int | float)
            grows = _matches(path, growing) and numbers and now >= saved
            if not (grows or _matches(path, harmless)):
                bad.append(f"{path}: {_show(saved)} -> {_show(now)}")
        if bad:
            more = f", and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            raise UserError(
                f"workdir {self.path} holds a run with another config ({', '.join(bad[:SHOWN])}"
                f"{more}); choose another workdir or the same config"
            )

    def _content(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.exists() else None

    def _forget(self) -> None:
        """Puts the records back that `begin` has replaced: a start that was refused is none."""
        if not self._before:
            return
        for name, content in self._before.items():
            with suppress(OSError):  # what is on its way out says more
                if content is None:
                    (self.path / name).unlink(missing_ok=True)
                else:
                    replace_file(self.path / name, content)
        with suppress(OSError):  # something is in it
            self.checkpoints.rmdir()
        self._before = {}

    def _read(self, name: str) -> dict[str, Any]:
        try:
            value = read_json(self.path / name)
        except OSError as error:
            raise DataError(f"cannot read {self.path / name}: {error.strerror}") from None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise DataError(f"{self.path / name} is damaged (not JSON); delete it and start again")
        return value

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write in workdir {self.path}: {error.strerror}; choose another --workdir"
        )


ABSENT = object()


def compare(saved: Mapping, now: Mapping) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (saved, now) for every field that differs; a field of one side is ABSENT."""
    old, new = flatten(saved), flatten(now)
    paths = [*old, *(path for path in new if path not in old)]
    pairs = {path: (old.get(path, ABSENT), new.get(path, ABSENT)) for path in paths}
    return {path: pair for path, pair in pairs.items() if not _same(*pair)}


def _same(a: Any, b: Any) -> bool:
    # True == 1 and 1 == 1.0 in Python, but not to whoever typed them.
    return type(a) is type(b) and a == b


def _show(value: Any) -> str:
    return "absent" if value is ABSENT else json.dumps(value)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
