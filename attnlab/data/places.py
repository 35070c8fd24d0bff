"""Where data lives on this machine, and how a file or directory comes to be whole or not at all."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from attnlab.errors import DataError
from attnlab.files import replace_file, sync_directory
from attnlab.manifest import NAME as MANIFEST
from attnlab.manifest import Damage, check_files, read_manifest, write_manifest


def data_dir() -> Path:
    """``$ATTNLAB_DATA``, else ``$XDG_CACHE_HOME/attnlab``, else ``~/.cache/attnlab``."""
    chosen = os.environ.get("ATTNLAB_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "attnlab"


def announce(line: str) -> None:
    """One line to the person at the terminal, on stderr so that it never mixes with results."""
    print(f"attnlab: {line}", file=sys.stderr, flush=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; reads 1 MiB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """`replace_file` in a directory that may have to be made first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content)


def read_json(path: Path) -> dict | None:
    """What a file kept by `write_whole` holds; None when it is absent or unreadable."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """A full disk or a forbidden directory becomes a `DataError` that names the place."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write under {place}: {reason}; free space or set ATTNLAB_DATA to a "
            "directory that can be written"
        ) from error


def publish(final: Path, fill: Callable[[Path], dict]) -> None:
    """Build a directory under a temporary name, seal it with a manifest, rename it into place.

    `fill(directory)` writes the files and returns what the manifest should say about them. An
    interrupted build leaves only a temporary directory, which the next build sweeps away. When two
    processes build the same directory, the first rename wins and the other copy is dropped: both
    are the same by construction.
    """
    with building(final.parent) as temporary:
        about = fill(temporary)
        with storage_errors(final.parent):
            write_manifest(temporary, {"about": about})
            try:
                os.rename(temporary, final)
            except OSError:
                if not (final / MANIFEST).exists():
                    raise
            sync_directory(final.parent)


@contextlib.contextmanager
def building(parent: Path) -> Iterator[Path]:
    """A temporary directory inside `parent`, gone at the end unless it was renamed.

    Its builder holds a lock on it, which the system drops however the builder ends: that is how
    the next one knows what was abandoned, across containers and machines too.
    """
    with storage_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(".building-*"):
            with locked(left) as abandoned:
                if abandoned:
                    shutil.rmtree(left, ignore_errors=True)
    while True:
        temporary = parent / f".building-{uuid.uuid4().hex}"
        with storage_errors(parent):
            temporary.mkdir()
        with locked(temporary):
            if not temporary.exists():  # another builder swept it before it was locked
                continue
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Hold the lock of a directory; False when another holds it or locks do not work there."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


_verified: dict[Path, int] = {}


def verify(directory: Path) -> dict:
    """Check every file against the manifest and return what the manifest says about them.

    The sums are checked once per process. Raises `DataError` naming the damaged file and the fix.
    """
    try:
        body = read_manifest(directory)
        stamp = (directory / MANIFEST).stat().st_mtime_ns
        if _verified.get(directory) != stamp:
            check_files(directory, body)
        _verified[directory] = stamp
    except (Damage, OSError) as error:
        fix = f"remove the directory {directory} and run again to rebuild it"
        raise DataError(f"{error}; {fix}") from error
    return body["about"]
