"""Checkpoints that are asynchronous to write and never believed without proof.

A directory holds one folder a step, named by its number: the arrays as orbax writes them (sharded,
compressed, one entry a leaf under its dotted path) and a manifest with the sha256 of every file,
written last. A step without a manifest was cut short; a step that differs from its manifest is
damaged. Both are named on the log and the newest step that is whole is used instead.

Cost of `save`: one device-to-host copy and one all-finite reduction before it returns; the writing,
hashing and pruning happen on a thread. Disk: about the bytes of the state a step, `keep` steps.
Several processes: every process calls every method; process 0 writes manifests and deletes. One
that leaves by an error asks nothing of the others, and what it was saving may be lost.
"""

import atexit
import json
import logging
import os
import sys
import threading
from typing import Any

import jax
import numpy as np

from attnlab.errors import DataError, UserError
from attnlab.leaves import describe_difference, finite, flatten_state, name_non_finite
from attnlab.manifest import read_manifest, write_manifest
from attnlab.steps import Steps
from attnlab.store import ArrayStore, explain

log = logging.getLogger(__name__)

MARGIN = 1 << 20  # bytes of metadata and slack on top of the arrays
LATE = 10.0  # seconds that a save in progress has to end when this of several processes fails


class NotFinite(DataError):
    """The state holds NaN or Inf. It was not saved and the steps on disk are untouched."""


class Checkpoints:
    """The steps saved below `directory`; the `keep` newest stay, one is due every `every` steps.

    Use it as a context manager, or call `close`: an error of the last save is raised there. A
    process that forgets ends with exit code 3 if that save failed, never with 0.

    Raises UserError when `directory` is a file or `keep` is below 1.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 3, every: int = 1000):
        if keep < 1:
            raise UserError(f"checkpoints: keep={keep}, must be at least 1")
        self._steps = Steps(directory)
        self.directory = self._steps.directory
        self.keep = keep
        self.every = every
        self._store = ArrayStore()
        self._written: set[int] = set()  # by this object, since the last restore
        self._restored: int | None = None
        self._thread: threading.Thread | None = None
        self._error: DataError | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None and jax.process_count() > 1:
            atexit.unregister(self._leave)
            if self._thread is not None:
                self._thread.join(LATE)
            return
        try:
            self.close()
        except DataError as late:
            if kind is None:
                raise
            # The error already on its way out is the cause; this one must still be seen.
            log.error("%s", late)

    def due(self, step: int) -> bool:
        """Whether `step` is a positive multiple of `every`; `every` <= 0 means never."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def steps(self) -> list[int]:
        """The complete steps, ascending: manifest sound, every file present with its size.

        The bytes are compared by `restore` only.
        """
        return self._steps.complete()

    def found(self) -> bool:
        """Whether any step was ever finished here, sound or not: restore, do not start over.

        What process 0 sees, in all.
        """
        seen = bool(self._steps.finished()) and jax.process_index() == 0
        return bool(-_lowest(-int(seen)))

    def describe(self) -> str:
        """The end of an error line: from where the run can go on."""
        steps = self.steps()
        last = f"step {steps[-1]} in {self.directory}" if steps else "none"
        return f"last good checkpoint: {last}; run the same command again to go on from it"

    def clean(self) -> None:
        """Makes the directory and deletes what a killed run left half-written, and says so.

        Only for the run that owns the directory: a reader would delete a save in progress.
        Every `save` does it too. Raises UserError when the directory cannot be made.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"checkpoints: cannot make {self.directory}: {error.strerror}; "
                "choose another workdir"
            ) from None
        if jax.process_index() == 0:
            self._steps.clean()

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None) -> bool:
        """Copies `state` to the host and writes it as `step` in the background.

        `state` is any pytree of arrays, typed PRNG keys and Python numbers; `extra` is any JSON
        object (that of process 0 counts). Returns False, doing nothing, when this run has already
        saved `step`. After `restore`, the first save deletes the steps newer than the restored one:
        they are damaged, or belong to a future that is being rewritten.

        Raises NotFinite for NaN or Inf anywhere in `state`; DataError when the disk is too full or
        the previous save failed; UserError when the directory already holds `step` or a later one
        and nothing was restored from it.
        """
        self.wait()
        if step in self._written:
            return False
        if not finite(state):
            raise NotFinite(
                f"step {step}: {name_non_finite(state)} holds NaN or Inf; not saved, "
                f"steps on disk: {self._steps.listing()}; lower the learning rate and resume"
            )
        leaves = flatten_state(state)
        body = {
            "step": step,
            "leaves": {path: leaf.spec for path, leaf in leaves.items()},
            "extra": json.loads(json.dumps(extra or {}, allow_nan=False)),
        }
        arrays = {path: leaf.data() for path, leaf in leaves.items() if leaf.stored}
        self.clean()
        if not self._written:
            self._forget_future(step)
        self._check_space(step, sum(array.nbytes for array in arrays.values()) + MARGIN)
        self._start(step, arrays, body)
        return True

    def wait(self) -> None:
        """Blocks until the save in progress is on disk. Raises DataError if it failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        saved = _lowest(error is None)
        if error is not None:
            raise error
        if not saved:
            raise DataError(f"another process could not save in {self.directory}; see its log")

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, extra) of the newest sound step, or of `step`.

        `like` gives the tree, shapes, dtypes and placement: arrays, or jax.ShapeDtypeStruct with
        `sharding`, on any mesh. Values come back bitwise equal.

        Raises UserError when `step` is not there (listing those that are) or when `like` has other
        leaves, shapes or dtypes (naming them; nothing is ever cast); DataError when no step is
        sound, or the requested one is not.
        """
        found, state, body = self._load(like, step, others=True)
        self._restored = found
        self._written.clear()
        return found, state, body["extra"]

    def read(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """`restore` for onlookers: `like` may be a part of the state, as {"params": ...}.

        What it does not name stays on disk unread, and where training continues is not affected.
        """
        found, state, body = self._load(like, step, others=False)
        return found, state, body["extra"]

    def close(self) -> None:
        """Waits for the save in progress and releases the threads. Raises DataError like `wait`."""
        atexit.unregister(self._leave)
        try:
            self.wait()
        except DataError:
            self._store.close()
            self.clean()  # threads of the failed save may have written on after it was given up
            raise
        self._store.close()

    def _start(self, step: int, arrays: dict[str, Any], body: dict[str, Any]) -> None:
        atexit.unregister(self._leave)
        atexit.register(self._leave)
        try:
            self._store.save(self._steps.folder(step), arrays)
        except OSError as error:
            raise self._failure(step, error) from error
        self._written.add(step)
        self._thread = threading.Thread(
            target=self._finish, args=(step, body), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def _finish(self, step: int, body: dict[str, Any]) -> None:
        """On the thread: waits for the arrays, writes the manifest, deletes steps beyond `keep`."""
        try:
            self._store.wait()
            if jax.process_index() == 0:
                write_manifest(self._steps.folder(step), body)
                for old in self._steps.complete()[: -self.keep]:
                    self._steps.delete(old)
        except BaseException as error:
            self._written.discard(step)
            self._error = self._failure(step, error)
            self._error.__cause__ = error

    def _forget_future(self, step: int) -> None:
        """Deletes the steps after the restored one, newest first so that a crash leaves a past."""
        fresh = self._restored is None
        past = -1 if self._restored is None else self._restored
        future = [other for other in self._steps.all() if other > past]
        if jax.process_index() != 0:
            future = []
        held = -_lowest(-max(future, default=-1) if fresh else 1)
        if held >= step:
            raise UserError(
                f"checkpoints: {self.directory} already holds step {held}, cannot start over "
                f"at step {step}; resume from it or choose another workdir"
            )
        for other in () if fresh else reversed(future):
            log.warning("deleting checkpoint %d: the run went back to step %d", other, past)
            self._steps.delete(other)

    def _check_space(self, step: int, needed: int) -> None:
        disk = os.statvfs(self.directory)
        free = disk.f_bavail * disk.f_frsize
        if not _lowest(free >= needed):
            raise DataError(
                f"checkpoint of step {step} needs {_size(needed)} but {self.directory} has "
                f"{_size(free)} free; not saved, steps on disk: {self._steps.listing()}; "
                "free some space and resume"
            )

    def _failure(self, step: int, error: BaseException) -> DataError:
        """Clears what a failed save left, so that the disk does not stay full, and says why."""
        if jax.process_index() == 0:
            self._steps.abandon(step)
        return DataError(
            f"checkpoint of step {step} was not saved in {self.directory}: {explain(error)}; "
            f"steps on disk: {self._steps.listing()}"
        )

    def _leave(self) -> None:
        """At interpreter exit without `close`: a lost save must not look like success."""
        try:
            self.close()
        except DataError as error:
            print(f"error: {error}; Checkpoints was not closed", file=sys.stderr, flush=True)
            os._exit(error.code)

    def _load(self, like: Any, step: int | None, others: bool) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, manifest); `others`: leaves that `like` lacks are a difference too."""
        self.wait()
        found = self._choose(step)
        folder = self._steps.folder(found)
        body = read_manifest(folder)
        leaves = flatten_state(like)
        saved = {path: spec for path, spec in body["leaves"].items() if others or path in leaves}
        difference = describe_difference(saved, leaves)
        if difference:
            raise UserError(
                f"checkpoint {folder} does not fit this state: {difference}; "
                "restore it with the config it was saved with"
            )
        placement = {path: leaf.sharding() for path, leaf in leaves.items() if leaf.stored}
        values = self._store.read(folder, placement)
        restored = [leaf.rebuild(saved[path], values.get(path)) for path, leaf in leaves.items()]
        return found, jax.tree.unflatten(jax.tree.structure(like), restored), body

    def _choose(self, wanted: int | None) -> int:
        """The step to read, chosen by process 0 for all."""
        candidates = [step for step in self._steps.all() if wanted in (None, step)]
        found, damages = sys.maxsize, []
        if jax.process_index() == 0:
            found, damages = self._steps.newest_sound(candidates)
        found = _lowest(found)
        if found >= 0:
            return found
        if wanted is not None and not candidates:
            raise UserError(
                f"no checkpoint {wanted} in {self.directory}; there: {self._steps.listing()}"
            )
        what = "no sound checkpoint" if wanted is None else f"checkpoint {wanted} is not sound"
        why = f": {damages[0]}" if damages else "" if candidates else " (it is empty)"
        raise DataError(f"{what} in {self.directory}{why}; start over in another workdir")


def _lowest(value: int) -> int:
    """The smallest of every process's `value`; all must call."""
    if jax.process_count() == 1:
        return int(value)
    from jax.experimental import multihost_utils

    return int(np.min(multihost_utils.process_allgather(np.int32(min(value, 2**31 - 1)))))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
