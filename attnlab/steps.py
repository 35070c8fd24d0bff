"""The numbered folders of a checkpoint directory: which are whole, which are litter.

A folder counts as finished when it has a manifest, as complete when every file in the manifest is
there with its size, as sound when every byte is the one that was written.
"""

import logging
import os
import re
import shutil
from pathlib import Path

from attnlab.errors import UserError
from attnlab.manifest import NAME as MANIFEST
from attnlab.manifest import Damage, check_files, check_sizes, read_manifest
from attnlab.store import TEMPORARY

log = logging.getLogger(__name__)

STEP = re.compile(r"0|[1-9]\d*")
LEFTOVER = re.compile(rf"\d+{re.escape(TEMPORARY)}.*")


class Steps:
    """Looks below `directory` anew at every call; remembers nothing."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(os.path.abspath(directory))
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"checkpoints: {self.directory} is a file; choose a directory")

    def folder(self, step: int) -> Path:
        """Where `step` is or would be."""
        return self.directory / str(step)

    def all(self) -> list[int]:
        """Every numbered folder, ascending, whatever is in it."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if STEP.fullmatch(name))

    def finished(self) -> list[int]:
        """The steps with a manifest. Cost: one stat a step."""
        return [step for step in self.all() if (self.folder(step) / MANIFEST).exists()]

    def complete(self) -> list[int]:
        """The steps with a sound manifest and every file at its size. Cost: one stat a file."""
        return [step for step in self.all() if self._damage(step, check_sizes) is None]

    def newest_sound(self, candidates: list[int]) -> tuple[int, list[str]]:
        """The newest of `candidates` that is sound, or -1, and what was wrong with newer ones.

        What is passed over is logged. Cost: reads every byte of the step found.
        """
        damages = []
        for step in reversed(candidates):
            damage = self._damage(step, check_files)
            if damage is None:
                return step, damages
            damages.append(damage)
            log.warning("checkpoint %d passed over: %s", step, damage)
        return -1, damages

    def clean(self) -> None:
        """Deletes, and names on the log, every folder that a killed save left unfinished."""
        for path in sorted(self.directory.iterdir()):
            unfinished = STEP.fullmatch(path.name) and not (path / MANIFEST).exists()
            if path.is_dir() and (unfinished or LEFTOVER.fullmatch(path.name)):
                log.warning("deleting half-written checkpoint %s", path)
                _remove(path)

    def delete(self, step: int) -> None:
        """Deletes a step; what cannot be deleted is logged and stays."""
        try:
            # First, so that a deletion cut short looks half-written and not damaged.
            (self.folder(step) / MANIFEST).unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot delete checkpoint %s: %s", self.folder(step), error.strerror)
            return
        _remove(self.folder(step))

    def abandon(self, step: int) -> None:
        """Deletes what a failed save of `step` left; a finished step is not touched."""
        for path in self.directory.glob(f"{step}{TEMPORARY}*"):
            _remove(path)
        if step not in self.finished():
            _remove(self.folder(step))

    def listing(self) -> str:
        """The complete steps for an error line: "3, 4" or "none"."""
        return ", ".join(map(str, self.complete())) or "none"

    def _damage(self, step: int, check) -> str | None:
        try:
            check(self.folder(step), read_manifest(self.folder(step)))
        except Damage as damage:
            return str(damage)
        return None


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        log.warning("could not delete all of %s", path)
