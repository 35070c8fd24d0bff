"""A file that says which process owns a directory.

On one machine the kernel's file lock decides: it dies with its process, so nothing is ever stale.
The text in the file is for people, and for other machines, where the kernel lock may not reach.
"""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from attnlab.errors import UserError
from attnlab.files import read_json

log = logging.getLogger(__name__)


class Lock:
    """Held from `acquire` to `release` or the death of the process."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._handle: int | None = None

    def acquire(self) -> None:
        """Takes the lock at once or raises UserError naming its owner; OSError when unwritable.

        A lock left by a dead process of this machine is taken over, with a log line. One left by
        another machine is refused: from here nobody can tell whether it is alive.
        """
        handle = self._open()
        try:
            owner = self._owner()
            if owner and owner.get("host") != socket.gethostname():
                raise UserError(
                    f"{self.path.parent} is in use by {_describe(owner)}; "
                    f"if that run is gone, delete {self.path}"
                )
            if owner and _alive(owner):
                raise self._busy(owner)
            if owner:
                log.warning("taking over %s from %s, which is gone", self.path, _describe(owner))
            me = {
                "pid": os.getpid(),
                "born": _birth(os.getpid()),
                "host": socket.gethostname(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            os.ftruncate(handle, 0)
            os.pwrite(handle, (json.dumps(me) + "\n").encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle

    def release(self) -> None:
        """Gives the lock back; does nothing when it is not held."""
        if self._handle is None:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None

    def _open(self) -> int:
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise self._busy(self._owner()) from None
            except OSError as error:
                # Some network file systems have no such locks; the text must do there.
                log.warning("%s: no file locks here (%s)", self.path, error.strerror)
                return handle
            try:
                if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                    return handle
            except FileNotFoundError:
                pass
            os.close(handle)  # its owner released it between our open and our lock

    def _owner(self) -> dict:
        try:
            owner = read_json(self.path)
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _busy(self, owner: dict) -> UserError:
        return UserError(
            f"{self.path.parent} is in use by {_describe(owner)}; "
            "wait for that run, stop it, or choose another workdir"
        )


def _describe(owner: dict) -> str:
    if not owner:
        return "another run"
    return f"process {owner.get('pid')} on {owner.get('host')} (started {owner.get('started')})"


def _alive(owner: dict) -> bool:
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # The number may have gone to another process since.
    return owner.get("born") is None or owner["born"] == _birth(pid)


def _birth(pid: int) -> str | None:
    """When the process started, in kernel ticks; None where the kernel does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
