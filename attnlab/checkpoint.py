"""Checkpoints that are asynchronous to write and never believed without proof.

A directory holds one folder a step, named by its number: the arrays as orbax writes them (sharded,
compressed, one entry a leaf under its dotted path) and a manifest with the sha256 of every file,
written last. A step without a manifest was cut short; a step that differs from its manifest is
damaged. Both are named on the log and the newest step that is whole is used instead.

Cost of `save`: one device-to-host copy and one all-finite reduction before it returns; the writing,
hashing and pruning happen on a thread. Disk: about the bytes of the state a step, `keep` steps.
Several processes: every process calls every method; process 0 writes manifests and deletes.
"""

import atexit
import json
import logging
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attnlab.errors import DataError, UserError
from attnlab.leaves import Leaf, describe_difference, finite, flatten_state, name_non_finite
from attnlab.manifest import NAME as MANIFEST
from attnlab.manifest import Damage, check_files, check_sizes, read_manifest, write_manifest

log = logging.getLogger(__name__)

STEP = re.compile(r"\d+")
LEFTOVER = re.compile(r"\d+\.orbax-checkpoint-tmp.*")
MARGIN = 1 << 20  # bytes of metadata and slack on top of the arrays


class NotFinite(DataError):
    """The state holds NaN or Inf. It was not saved and the steps on disk are untouched."""


class Checkpoints:
    """The steps saved below `directory`; `keep` newest stay, one is due every `every` steps.

    Use it as a context manager, or call `close`: an error of the last save is raised there. A
    process that forgets ends with exit code 3 if that save failed, never with 0.

    Raises UserError for a path that is a file or cannot be made, or `keep` below 1.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 3, every: int = 1000):
        if keep < 1:
            raise UserError(f"checkpoints: keep={keep}, must be at least 1")
        self.directory = Path(os.path.abspath(directory))
        self.keep = keep
        self.every = every
        self._written: set[int] = set()  # by this object, since the last restore
        self._restored: int | None = None
        self._writer: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except DataError as late:
            if kind is None:
                raise
            # The error already on its way out is the cause; this one must still be seen.
            log.error("%s", late)

    def due(self, step: int) -> bool:
        """Whether `step` is a multiple of `every`; `every` <= 0 means never."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def steps(self) -> list[int]:
        """The complete steps, ascending: manifest sound, every file present with its size."""
        return [step for step in self._folders() if self._glance(step) is None]

    def clean(self) -> None:
        """Deletes what a killed run left half-written, and says so.

        Only for the run that owns the directory: a reader would delete a save in progress.
        The first `save` does it too. Raises UserError when the directory cannot be made.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"checkpoints: cannot make {self.directory}: {error.strerror}; "
                "choose another workdir"
            ) from None
        if jax.process_index() != 0:
            return
        for path in sorted(self.directory.iterdir()):
            unfinished = STEP.fullmatch(path.name) and not (path / MANIFEST).exists()
            if path.is_dir() and (unfinished or LEFTOVER.fullmatch(path.name)):
                log.warning("deleting half-written checkpoint %s", path)
                shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None) -> bool:
        """Copies `state` to the host and writes it as `step` in the background.

        `state` is any pytree of arrays, typed PRNG keys and Python numbers; `extra` is any JSON
        object (of process 0). Returns False, doing nothing, when this run has already saved `step`.
        After a `restore` of an older step, the newer steps are deleted by the first save: they
        belong to a future that is being rewritten.

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
                f"steps on disk: {self._list()}; lower the learning rate and resume"
            )
        leaves = flatten_state(state)
        body = {"step": step, "leaves": {}, "extra": json.loads(json.dumps(extra or {}))}
        arrays = {}
        for path, leaf in leaves.items():
            body["leaves"][path] = leaf.spec
            if leaf.stored:
                arrays[path] = leaf.data()
        self._make_room(step, sum(array.nbytes for array in arrays.values()))
        self._start(step, arrays, body)
        return True

    def wait(self) -> None:
        """Blocks until the save in progress is on disk. Raises DataError if it failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        _barrier(f"attnlab manifest {max(self._written)} {len(self._written)}")

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, extra) of the newest sound step, or of `step`.

        `like` gives the tree, shapes, dtypes and shardings: arrays, or jax.ShapeDtypeStruct with
        `sharding`, on any mesh. Values come back bitwise equal.

        Raises UserError when `step` is not there (listing those that are) or when `like` has other
        leaves, shapes or dtypes (naming them; nothing is ever cast); DataError when no step is
        sound, or the requested one is not.
        """
        self.wait()
        found = self._choose(step)
        body = read_manifest(self.directory / str(found))
        leaves = flatten_state(like)
        difference = describe_difference(body["leaves"], leaves)
        if difference:
            raise UserError(
                f"checkpoint {self.directory / str(found)} does not fit this state: {difference}; "
                "restore it with the config it was saved with"
            )
        values = self._read(found, {path: leaf for path, leaf in leaves.items() if leaf.stored})
        restored = [
            leaf.rebuild(body["leaves"][path], values.get(path)) for path, leaf in leaves.items()
        ]
        self._restored = found
        self._written.clear()
        return found, jax.tree.unflatten(jax.tree.structure(like), restored), body["extra"]

    def close(self) -> None:
        """Waits for the save in progress and releases the threads. Raises DataError like `wait`."""
        try:
            self.wait()
        finally:
            atexit.unregister(self._leave)
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    # Saving

    def _make_room(self, step: int, needed: int) -> None:
        if not self._written:
            self.clean()
            self._forget_future(step)
        self._check_space(step, needed + MARGIN)

    def _forget_future(self, step: int) -> None:
        """Deletes the steps after the restored one, newest first so that a crash leaves a past."""
        past = -1 if self._restored is None else self._restored
        future = [other for other in self._folders() if other > past]
        if self._restored is None and any(other >= step for other in future):
            raise UserError(
                f"checkpoints: {self.directory} already holds step {future[-1]}, cannot start over "
                f"at step {step}; resume from it or choose another workdir"
            )
        if self._restored is None:
            return
        for other in reversed(future):
            log.warning("deleting checkpoint %d: the run restarted from step %d", other, past)
            self._delete(other)

    def _check_space(self, step: int, needed: int) -> None:
        disk = os.statvfs(self.directory)
        free = disk.f_bavail * disk.f_frsize
        if free < needed:
            raise DataError(
                f"checkpoint of step {step} needs {_size(needed)} but {self.directory} has "
                f"{_size(free)} free; not saved, steps on disk: {self._list()}; free some space"
            )

    def _start(self, step: int, arrays: dict[str, Any], body: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        if self._writer is None:
            self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            atexit.register(self._leave)
        try:
            self._writer.save(self.directory / str(step), args=ocp.args.PyTreeSave(arrays))
        except OSError as error:
            raise self._failure(step, error) from error
        self._written.add(step)
        self._thread = threading.Thread(
            target=self._finish, args=(step, body), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def _finish(self, step: int, body: dict[str, Any]) -> None:
        """On the thread: waits for orbax, writes the manifest, deletes steps beyond `keep`."""
        try:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(self.directory / str(step), body)
                for old in self.steps()[: -self.keep]:
                    self._delete(old)
        except BaseException as error:
            self._written.discard(step)
            self._error = self._failure(step, error)
            self._error.__cause__ = error

    def _failure(self, step: int, error: BaseException) -> DataError:
        """Clears what a failed save left, so that the disk does not stay full, and says why."""
        if jax.process_index() == 0:
            for path in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            if not (self.directory / str(step) / MANIFEST).exists():
                shutil.rmtree(self.directory / str(step), ignore_errors=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        return DataError(
            f"checkpoint of step {step} was not saved in {self.directory}: {reason[:300]}; "
            f"steps on disk: {self._list()}"
        )

    def _delete(self, step: int) -> None:
        # Manifest first: a deletion cut short must look half-written, not damaged.
        if jax.process_index() == 0:
            (self.directory / str(step) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.directory / str(step), ignore_errors=True)

    def _leave(self) -> None:
        """At interpreter exit without `close`: a lost save must not look like success."""
        try:
            self.wait()
        except DataError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(error.code)

    # Restoring

    def _choose(self, wanted: int | None) -> int:
        """The step to read, chosen by process 0 for all; every step passed over is logged."""
        found, reason = -1, ""
        if jax.process_index() == 0:
            folders = self._folders()
            if wanted is not None:
                folders = [step for step in folders if step == wanted]
            for step in reversed(folders):
                try:
                    folder = self.directory / str(step)
                    check_files(folder, read_manifest(folder))
                    found = step
                    break
                except Damage as damage:
                    reason = str(damage)
                    log.warning("checkpoint %d passed over: %s", step, damage)
        found = _agree(found)
        if found >= 0:
            return found
        if wanted is not None and not reason:
            raise UserError(f"no checkpoint {wanted} in {self.directory}; there: {self._list()}")
        what = "no sound checkpoint" if wanted is None else f"checkpoint {wanted} is not sound"
        raise DataError(f"{what} in {self.directory}" + (f": {reason}" if reason else ""))

    def _read(self, step: int, leaves: dict[str, Leaf]) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        if not leaves:
            return {}
        arguments = {}
        for path, leaf in leaves.items():
            sharding = leaf.sharding()
            arguments[path] = (
                ocp.RestoreArgs(restore_type=np.ndarray)
                if sharding is None
                else ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
            )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(
                self.directory / str(step),
                args=ocp.args.PyTreeRestore(
                    item={path: 0 for path in leaves}, restore_args=arguments
                ),
            )

    def _folders(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if STEP.fullmatch(name))

    def _glance(self, step: int) -> str | None:
        try:
            check_sizes(self.directory / str(step), read_manifest(self.directory / str(step)))
        except Damage as damage:
            return str(damage)
        return None

    def _list(self) -> str:
        return ", ".join(map(str, self.steps())) or "none"


def _agree(step: int) -> int:
    if jax.process_count() == 1:
        return step
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(step)))


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp

        ocp.multihost.sync_global_processes(name)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
